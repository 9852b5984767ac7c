// Words in global memory that blocks exchange while they run together.
//
// A store waits in a buffer of its block and reaches memory at a random moment, in any order but that of stores to one
// address; the threads of its block see it at once. A release sends what its block has stored before ahead of itself.
// Plain stores are not delayed: that relaxed accesses order nothing for them is for ThreadSanitizer to see, which
// learns of acquire and release alone.
//
// Every load lets other threads run, so that a loop around it is no deadlock. When a thread has polled often and
// nothing else has happened in all of that time, it is one.
#include "state.h"
#include "tsan.h"

namespace pyops::simt {
namespace {

constexpr uint64_t kMostPolls = 4096;  // of one thread in vain, far more than it loads words between two waits
constexpr unsigned kMostDelayed = 64;

struct Store {
  const Block* block;
  uint64_t* to;
  uint64_t value;
};
Store delayed[kMostDelayed + 1];  // at most one of a block to an address
unsigned delayed_count = 0;

void take_effect(unsigned i) {
  const Store store = delayed[i];
  delayed[i] = delayed[--delayed_count];
  __atomic_store_n(store.to, store.value, __ATOMIC_RELAXED);
  make_progress();
}

uint64_t value_of(const uint64_t* p, const Block* block) {
  for (unsigned i = 0; i < delayed_count; ++i) {
    if (delayed[i].block == block && delayed[i].to == p) return delayed[i].value;
  }
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}

void check_word(const uint64_t* p, CallSite site) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof *p != 0) misaligned(p, sizeof *p, site);
}

}  // namespace

void words_begin_launch() { delayed_count = 0; }

void words_end_launch() {
  while (delayed_count > 0) take_effect(0);
}

uint64_t load_word(const uint64_t* p, bool acquire, CallSite site) {
  check_word(p, site);
  Executor& e = executor;
  Fiber* me = e.running;
  if (delayed_count > 0 && e.random.below(8) == 0) take_effect(e.random.below(delayed_count));
  if (me->progress_seen != e.progress || me->polls == 0) {
    me->progress_seen = e.progress;
    me->polls = 0;
  }
  me->wait = Wait::kPoll;
  me->site = site;
  if (++me->polls > kMostPolls) report_deadlock("deadlock: threads poll words that nobody writes");
  // The value is that of the load's issue or of its arrival.
  const bool early = e.random.below(2) == 0;
  uint64_t value = early ? value_of(p, me->block) : 0;
  make_ready(me);
  wait_for_turn();
  me->wait = Wait::kNone;
  if (!early) value = value_of(p, me->block);
  if (acquire) tsan_acquire(const_cast<uint64_t*>(p));
  return value;
}

void store_word(uint64_t* p, uint64_t v, bool release, CallSite site) {
  if (switched_off(site, Wait::kStore)) return;
  check_word(p, site);
  const Block* block = executor.running->block;
  for (unsigned i = 0; i < delayed_count;) {
    if (delayed[i].block == block && (release || delayed[i].to == p)) {
      take_effect(i);
    } else {
      ++i;
    }
  }
  if (release) tsan_release(p);
  delayed[delayed_count++] = {block, p, v};
  if (delayed_count > kMostDelayed) take_effect(executor.random.below(delayed_count));
}

bool await_is_off(CallSite site) { return switched_off(site, Wait::kPoll); }

}  // namespace pyops::simt
