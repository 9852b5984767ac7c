// cp.async. A copy takes effect at a random moment between its issue and the wait that covers it: at once, when the
// wait comes, or when threads meet in between; its source is read then. Until then its destination holds poison.
//
// For ThreadSanitizer the copies of a thread are the work of a thread beside it, which begins at the issue and is
// joined by the wait: whoever touches the destination or writes the source in between is in a race with it, the thread
// itself included, and other threads are ordered by nothing but a barrier after the wait.
#include "state.h"
#include "tsan.h"

namespace pyops::simt {

struct Copy {
  char* to;
  const char* from;
  unsigned bytes;
  bool valid;     // else it writes zeros
  bool sometime;  // may happen before it is waited for
  bool done;
  unsigned group;
  CallSite site;
  Fiber* issuer;
  Copy* next;
};

namespace {

Copy* unused = nullptr;  // chained by next

Copy* make_copy() {
  if (unused == nullptr) {
    constexpr int kMore = 1024;
    Copy* copies = new Copy[kMore]();
    for (int i = 0; i < kMore; ++i) {
      copies[i].next = unused;
      unused = &copies[i];
    }
  }
  Copy* copy = unused;
  unused = copy->next;
  return copy;
}

void release_copy(Copy* copy) {
  copy->next = unused;
  unused = copy;
  --executor.copies;
}

template <unsigned kBytes>
void move(const Copy& copy) {
  if (copy.valid) {
    __builtin_memcpy(copy.to, copy.from, kBytes);
  } else {
    __builtin_memset(copy.to, 0, kBytes);
  }
}

// A fault while it reads is the issuer's.
void take_effect(Copy& copy) {
  Executor& e = executor;
  Fiber* running = e.running;
  e.running = copy.issuer;
  e.copying = &copy;
  asm volatile("" ::: "memory");  // a fault comes between what stands before and after
  if (copy.bytes == 4) move<4>(copy);
  if (copy.bytes == 8) move<8>(copy);
  if (copy.bytes == 16) move<16>(copy);
  asm volatile("" ::: "memory");
  e.copying = nullptr;
  e.running = running;
  copy.done = true;
}

void poison(const Copy& copy) {
  if (copy.bytes == 4) __builtin_memset(copy.to, 0xff, 4);
  if (copy.bytes == 8) __builtin_memset(copy.to, 0xff, 8);
  if (copy.bytes == 16) __builtin_memset(copy.to, 0xff, 16);
}

// ThreadSanitizer's thread beside each thread. Groups in turn: an address is used again 64 groups later.
#ifdef PYOPS_SIMT_TSAN
struct Beside {
  void* fiber = nullptr;
  char issued = 0, complete[64] = {};
};
Beside beside_of[kMaxFibers];

void tsan_issue(const Copy& copy) {
  Fiber* me = executor.running;
  Beside& beside = beside_of[me->number];
  if (beside.fiber == nullptr) beside.fiber = __tsan_create_fiber(0);
  tsan_release(&beside.issued);
  tsan_switch(beside.fiber);
  tsan_acquire(&beside.issued);
  if (copy.valid) tsan_read(copy.from, copy.bytes);
  tsan_write(copy.to, copy.bytes);
  tsan_switch(me->tsan);
}

void tsan_commit(unsigned group) {
  Fiber* me = executor.running;
  Beside& beside = beside_of[me->number];
  if (beside.fiber == nullptr) return;
  tsan_switch(beside.fiber);
  tsan_release(&beside.complete[group % 64]);
  tsan_switch(me->tsan);
}

void tsan_wait(unsigned group) { tsan_acquire(&beside_of[executor.running->number].complete[group % 64]); }
#else
void tsan_issue(const Copy&) {}
void tsan_commit(unsigned) {}
void tsan_wait(unsigned) {}
#endif

}  // namespace

std::string text(const Copy& copy) { return "cp_async at " + text(copy.site); }

void copies_begin_block(Block& block) {
  Executor& e = executor;
  e.copying = nullptr;
  for (unsigned i = 0; i < e.threads; ++i) {
    Fiber& fiber = block.fibers[i];
    while (fiber.first_copy != nullptr) {  // of a launch that was abandoned
      Copy* copy = fiber.first_copy;
      fiber.first_copy = copy->next;
      release_copy(copy);
    }
    fiber.last_copy = nullptr;
    fiber.groups_committed = fiber.groups_complete = 0;
  }
}

void copy_async(void* shared, const void* global, unsigned bytes, bool valid, CallSite site) {
  Executor& e = executor;
  Fiber* me = e.running;
  check_access("cp_async", shared, bytes, site);
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0) misaligned(global, bytes, site);
  if (!in_shared_memory(shared, bytes)) fail("cp_async to an address outside of shared memory", site);
  Copy* copy = make_copy();
  *copy = {static_cast<char*>(shared),
           static_cast<const char*>(global),
           bytes,
           valid,
           false,
           false,
           me->groups_committed,
           site,
           me,
           nullptr};
  (me->last_copy != nullptr ? me->last_copy->next : me->first_copy) = copy;
  me->last_copy = copy;
  ++e.copies;
  tsan_issue(*copy);
  const unsigned moment = e.random.below(4);
  copy->sometime = moment == 1;
  if (moment == 0) {
    take_effect(*copy);
  } else {
    poison(*copy);
  }
}

void commit_copies(CallSite site) {
  if (switched_off(site, Wait::kCopyCommit)) return;
  tsan_commit(executor.running->groups_committed++);
}

void wait_for_copies(unsigned latest, CallSite site) {
  if (switched_off(site, Wait::kCopyWait)) return;
  Fiber* me = executor.running;
  while (me->groups_complete + latest < me->groups_committed) {
    while (me->first_copy != nullptr && me->first_copy->group == me->groups_complete) {
      Copy* copy = me->first_copy;
      if (!copy->done) take_effect(*copy);
      me->first_copy = copy->next;
      release_copy(copy);
    }
    if (me->first_copy == nullptr) me->last_copy = nullptr;
    tsan_wait(me->groups_complete++);
  }
}

void let_copies_happen() {
  Executor& e = executor;
  if (e.copies == 0) return;
  for (Copy* copy = e.running->block->fibers[e.random.below(e.threads)].first_copy; copy != nullptr;
       copy = copy->next) {
    if (copy->sometime && !copy->done && e.random.below(2) == 0) take_effect(*copy);
  }
}

void check_no_copies_left() {
  const Copy* copy = executor.running->first_copy;
  if (copy == nullptr) return;
  unsigned count = 0;
  for (const Copy* left = copy; left != nullptr; left = left->next) ++count;
  fail("the thread exits with " + std::to_string(count) +
       " asynchronous copies that it has not waited for, the first by " + text(*copy));
}

}  // namespace pyops::simt
