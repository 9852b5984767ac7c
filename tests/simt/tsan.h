// ThreadSanitizer's view of the fibers: each is a thread of its own, and a switch orders nothing. What orders memory is
// said in so many words: launch and end of a kernel, sync_block, sync_warp, cp_async_wait, and a word's release for who
// acquires it. Shuffles, votes, relaxed words and matrix instructions order nothing, as on the device. Blocks of one
// launch are unordered but for that.
#pragma once

#ifdef PYOPS_SIMT_TSAN
#include <sanitizer/tsan_interface.h>

#include <vector>

extern "C" void __tsan_read_range(void* address, unsigned long bytes);
extern "C" void __tsan_write_range(void* address, unsigned long bytes);
extern "C" void AnnotateIgnoreWritesBegin(const char* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char* file, int line);
#endif

namespace pyops::simt {

#ifdef PYOPS_SIMT_TSAN
constexpr bool kTsan = true;
inline void* tsan_current_fiber() { return __tsan_get_current_fiber(); }
inline void* tsan_fiber(unsigned number) {  // kept: making one takes a third of a millisecond
  static std::vector<void*> fibers;
  while (fibers.size() <= number) fibers.push_back(__tsan_create_fiber(0));
  return fibers[number];
}
inline void tsan_switch(void* fiber) { __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync); }
inline void tsan_release(void* address) { __tsan_release(address); }
inline void tsan_acquire(void* address) { __tsan_acquire(address); }
inline void tsan_read(const void* address, size_t bytes) { __tsan_read_range(const_cast<void*>(address), bytes); }
inline void tsan_write(void* address, size_t bytes) { __tsan_write_range(address, bytes); }
inline void tsan_ignore_begin() { AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
inline void tsan_ignore_end() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__); }
#else
constexpr bool kTsan = false;
inline void* tsan_current_fiber() { return nullptr; }
inline void* tsan_fiber(unsigned) { return nullptr; }
inline void tsan_switch(void*) {}
inline void tsan_release(void*) {}
inline void tsan_acquire(void*) {}
inline void tsan_ignore_begin() {}
inline void tsan_ignore_end() {}
#endif

}  // namespace pyops::simt
