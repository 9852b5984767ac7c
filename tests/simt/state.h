// What the parts of the executor share. One launch runs at a time (launch() holds a lock), its blocks one after
// another, the threads of a block as fibers of the OS thread that called launch().
#pragma once

#include <cstdint>
#include <string>

#include "fiber.h"
#include "simt.h"

namespace pyops::simt {

constexpr unsigned kWarpLanes = 32;
constexpr unsigned kMaxThreads = 1024;          // per block
constexpr size_t kMaxSharedBytes = 227 * 1024;  // per block, compute capability 9.0
constexpr unsigned kTsanSets = 8;               // of fibers, see fiber_sets()
constexpr unsigned kStacks = 2 * kMaxThreads;   // two sets of the largest block

// What a thread waits in. The names stand in reports.
enum class Wait : uint8_t { kNone, kExited, kSyncBlock, kSyncWarp, kBallot, kShuffle };

struct Warp;

struct Fiber : Thread {
  Context context;
  Warp* warp = nullptr;
  unsigned lane = 0;
  Wait wait = Wait::kNone;
  CallSite site;  // of the wait
  // The exchange it waits in: operands, then result.
  unsigned mask = 0;
  Shuffle shuffle = Shuffle::kIndex;
  int operand = 0, width = 0;
  uint64_t value = 0, result = 0;
  unsigned warp_syncs = 0;
  void* tsan = nullptr;
};

struct Warp {
  Fiber* lanes = nullptr;  // consecutive
  unsigned count = 0;
  unsigned waiting = 0;  // lanes in an exchange that is not complete
  char tsan_sync[2][kWarpLanes] = {};
};

class Random {
 public:
  void seed(uint64_t a, uint64_t b);
  unsigned below(unsigned n) {  // uniform enough: n is far below 2^32
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return unsigned((state_ >> 32) * n >> 32);
  }

 private:
  uint64_t state_ = 1;
};

struct Executor {
  Fiber fibers[kMaxThreads];
  Warp warps[kMaxThreads / kWarpLanes];
  Fiber* ready[kMaxThreads];
  Fiber* running = nullptr;  // null outside of fibers
  Context host;
  unsigned threads = 0, live = 0, ready_count = 0;
  unsigned barrier_arrived = 0, barrier_generation = 0;
  Random random;

  const char* kernel_name = "";
  void (*kernel)(void*) = nullptr;
  void* kernel_context = nullptr;
  char* shared = nullptr;
  size_t shared_bytes = 0;
  std::string failure;

  uint64_t seed = 1, launches = 0;
  int multiprocessors = 4;

  void* tsan_host = nullptr;
  char tsan_launch = 0, tsan_done = 0, tsan_barrier[2] = {}, tsan_sets[kTsanSets][2] = {};
  char *tsan_before = nullptr, *tsan_after = nullptr;  // of the current block on its set of fibers
};

extern Executor executor;

// executor.cpp. Runs another ready fiber until this one is chosen again.
void wait_for_turn();
// The ready fibers stand in random order: a new one is put at a random place, and the last one runs next.
inline void make_ready(Fiber* fiber) {
  const unsigned i = executor.random.below(executor.ready_count + 1);
  executor.ready[executor.ready_count++] = executor.ready[i];
  executor.ready[i] = fiber;
}
// Abandons the launch, which then throws with this text and where it happened.
[[noreturn]] void fail(const std::string& what);
[[noreturn]] void fail(const std::string& what, CallSite site);
std::string text(CallSite site);
inline bool same_site(CallSite a, CallSite b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || strcmp(a.file_name(), b.file_name()) == 0);
}

// sites.cpp. True when this barrier or exchange is switched off; also keeps the record of sites.
void sites_begin_launch();
bool switched_off_slowly(CallSite site, Wait kind);
extern bool sites_in_use;
inline bool switched_off(CallSite site, Wait kind) { return sites_in_use && switched_off_slowly(site, kind); }

// memory.cpp
char* stack_of(unsigned fiber);
constexpr size_t kStackBytes = 64 * 1024;
char* shared_memory_block(unsigned set, size_t bytes);  // ends at a guard page
std::string describe_address(const void* address, const char* access);

// faults.cpp. Turns a hardware fault in a fiber into fail().
class FaultHandler {
 public:
  FaultHandler();
  ~FaultHandler();
};

}  // namespace pyops::simt
