// Launches, scheduling and barriers of the SIMT executor (state.h has the state).
//
// A fiber runs until it waits or ends; then one of the ready fibers, chosen at random, runs. A barrier makes all
// threads of the block ready at once when the last one arrives. When nobody is ready and somebody waits, the launch has
// a deadlock, and the report says who waits where. Blocks run in random order, one after another; those of a
// cooperative launch run together, and the next fiber is any of theirs. All choices come from the seed and the number
// of the launch, so a report can be replayed.
#include <algorithm>
#include <map>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "state.h"
#include "tsan.h"

namespace pyops::simt {

const Thread* current_thread = nullptr;
uint3 current_block;
dim3 block_size, grid_size;
Executor executor;

namespace {

const char* name_of(Wait wait) {
  constexpr const char* kNames[] = {"runs",
                                    "has exited",
                                    "waits in sync_block",
                                    "waits in sync_warp",
                                    "waits in a vote",
                                    "waits in a shuffle",
                                    "waits in ldmatrix",
                                    "waits in stmatrix",
                                    "waits in an mma",
                                    "polls"};
  return kNames[static_cast<int>(wait)];
}

constexpr const char* kNobody = "divergence: no thread can go on";

std::string triple(uint3 v) {
  return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

void switch_fiber(Context* from, Fiber* to) {
  executor.running = to;
  current_thread = to;
  current_block = to->block->index;
  tsan_switch(to->tsan);
  switch_context(from, &to->context);
}

void switch_to_host(Context* from) {
  executor.running = nullptr;
  current_thread = nullptr;
  tsan_switch(executor.tsan_host);
  switch_context(from, &executor.host);
}

Fiber* choose() { return executor.ready[--executor.ready_count]; }

[[noreturn, gnu::noinline]] void report_two_barriers(const Fiber& other, CallSite site) {
  fail("divergence: sync_block is reached at " + text(other.site) + " by thread " + triple(other.index) + " and at " +
       text(site) + " by this one");
}

[[noreturn]] void run_thread() {
  Fiber* me = executor.running;
  tsan_acquire(&executor.tsan_launch);
  tsan_acquire(me->block->tsan_before);
  executor.kernel(executor.kernel_context);
  check_no_copies_left();
  tsan_release(me->block->tsan_after);
  tsan_release(&executor.tsan_done);
  me->wait = Wait::kExited;
  make_progress();
  if (--executor.live == 0) {
    switch_to_host(&me->context);
  } else {
    if (executor.ready_count == 0) report_deadlock(kNobody);
    switch_fiber(&me->context, choose());
  }
  __builtin_unreachable();
}

// Under ThreadSanitizer blocks take turns on several sets of fibers, each with shared memory of its own. Blocks on one
// set are ordered, so that reuse of stacks and shared memory is no race; blocks on different sets are not.
unsigned fiber_sets() { return kTsan ? std::min(kTsanSets, 2 * kMaxThreads / executor.threads) : 1; }

// Makes the threads of a block ready to run, on a set of fibers.
void begin_block(uint3 index, unsigned set) {
  Executor& e = executor;
  const unsigned first_fiber = set * e.threads;
  Block& block = e.blocks[set];
  block.index = index;
  block.fibers = e.fibers + first_fiber;
  block.barrier_arrived = block.barrier_generation = 0;
  block.shared = shared_memory_block(set, e.shared_bytes);
  tsan_ignore_begin();
  if (e.shared_bytes > 0) memset(block.shared, 0xff, e.shared_bytes);
  tsan_ignore_end();

  const unsigned first_warp = set * ((e.threads + kWarpLanes - 1) / kWarpLanes);
  for (unsigned i = 0; i < e.threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.index = {i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y)};
    fiber.block = &block;
    fiber.warp = &e.warps[first_warp + i / kWarpLanes];
    fiber.lane = i % kWarpLanes;
    fiber.wait = Wait::kNone;
    fiber.warp_syncs = 0;
    fiber.polls = 0;
    fiber.number = first_fiber + i;
    if (kTsan) fiber.tsan = tsan_fiber(fiber.number);
    // Tops at different offsets in their pages: at equal ones the stacks of a block would share a few cache sets.
    const size_t stack_bytes = kStackBytes - i % 64 * 256;
    make_context(&fiber.context, stack_of(first_fiber + i), stack_bytes, run_thread);
    make_ready(&fiber);
  }
  for (unsigned i = 0; i < e.threads; i += kWarpLanes) {
    Warp& warp = e.warps[first_warp + i / kWarpLanes];
    warp.lanes = &block.fibers[i];
    warp.count = std::min(kWarpLanes, e.threads - i);
    warp.waiting = 0;
  }
  copies_begin_block(block);
  e.fibers_begun = std::max(e.fibers_begun, first_fiber + e.threads);
  e.live += e.threads;
}

void run_blocks() {
  Executor& e = executor;
  switch_fiber(&e.host, choose());
  conflicts_end_block();
  if (!e.failure.empty()) throw std::runtime_error(e.failure);
}

void begin_blocks() { executor.live = executor.ready_count = executor.fibers_begun = 0; }

void run_block(uint3 index, uint64_t turn) {
  Executor& e = executor;
  const unsigned set = turn % fiber_sets();
  const unsigned round = turn / fiber_sets() % 2;  // a block must be ordered after the one before, not after itself
  e.blocks[set].tsan_before = &e.tsan_sets[set][1 - round];
  e.blocks[set].tsan_after = &e.tsan_sets[set][round];
  begin_blocks();
  begin_block(index, set);
  run_blocks();
}

void check_launch(const char* name, dim3 grid, dim3 block, size_t smem_bytes, bool cooperative) {
  const auto refuse = [&](const char* why) {
    throw std::runtime_error(std::string("cuda: launch of ") + name + " failed: " + why);
  };
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) refuse("the grid is empty");
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) refuse("the grid is too large");
  if (block.x == 0 || block.y == 0 || block.z == 0) refuse("the block is empty");
  if (block.x > 1024 || block.y > 1024 || block.z > 64) refuse("the block is too large");
  if (uint64_t(block.x) * block.y * block.z > kMaxThreads) refuse("the block has too many threads");
  if (smem_bytes > kMaxSharedBytes) refuse("the block has too much shared memory");
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (cooperative && (blocks > uint64_t(executor.multiprocessors) || blocks > kMaxBlocks ||
                      blocks * block.x * block.y * block.z > kMaxFibers)) {
    refuse("the blocks of a cooperative launch must run together, one to a multiprocessor");
  }
}

}  // namespace

void Random::seed(uint64_t a, uint64_t b) {  // splitmix64 of both, so that neighbouring seeds differ everywhere
  uint64_t z = a * 0x9e3779b97f4a7c15u + b * 0xd1b54a32d192ed03u + 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  state_ = (z ^ (z >> 31)) | 1;
}

std::string text(CallSite site) { return std::string(site.file_name()) + ":" + std::to_string(site.line()); }

void fail(const std::string& what) {
  Executor& e = executor;
  e.failure = std::string("simt: ") + e.kernel_name + ": " + what + " [block " + triple(current_block) + ", thread " +
              triple(e.running->index) + ", seed " + std::to_string(e.seed) + ", launch " + std::to_string(e.launches) +
              "]";
  switch_to_host(&e.running->context);
  __builtin_unreachable();
}

void fail(const std::string& what, CallSite site) { fail(what + " at " + text(site)); }

// Groups the threads by what they wait in.
[[gnu::noinline]] void report_deadlock(const char* what) {
  struct Group {
    unsigned count = 0;
    const Fiber* first = nullptr;
  };
  std::map<std::string, Group> groups;
  for (unsigned i = 0; i < executor.fibers_begun; ++i) {
    const Fiber& fiber = executor.fibers[i];
    if (!executor.cooperative && fiber.block != executor.running->block) continue;  // another set's
    std::string text_of = name_of(fiber.wait);
    if (fiber.wait != Wait::kExited) text_of += " at " + text(fiber.site);
    if (fiber.wait > Wait::kSyncBlock && fiber.wait < Wait::kPoll) {
      char mask[24];
      snprintf(mask, sizeof mask, " with mask 0x%08x", fiber.mask);
      text_of += mask;
    }
    Group& group = groups[text_of];
    if (group.count++ == 0) group.first = &fiber;
  }
  std::string report = what;
  for (const auto& [text_of, group] : groups) {
    report += "; thread " + triple(group.first->index);
    if (executor.cooperative) report += " of block " + triple(group.first->block->index);
    if (group.count > 1) report += " and " + std::to_string(group.count - 1) + " more";
    report += " " + text_of;
  }
  fail(report);
}

void wait_for_turn() {
  Executor& e = executor;
  if (e.ready_count == 0) report_deadlock(kNobody);
  Fiber* me = e.running;
  Fiber* next = choose();
  if (next == me) return;
  // Many stacks do not fit in the nearest cache. What runs after this one is known but for late arrivals.
  if (e.ready_count >= 2) {
    __builtin_prefetch(e.ready[e.ready_count - 2]);
    const char* stack = static_cast<const char*>(stack_pointer(e.ready[e.ready_count - 1]->context));
    for (int line = 0; line < 4; ++line) __builtin_prefetch(stack + line * 64);
  }
  switch_fiber(&me->context, next);
}

void sync_block(CallSite site) {
  if (switched_off(site, Wait::kSyncBlock)) return;
  Executor& e = executor;
  Fiber* me = e.running;
  Block& block = *me->block;
  me->wait = Wait::kSyncBlock;
  me->site = site;
  // Two in turn: a thread cannot come to the barrier after the next before every thread has left this one.
  char* order = &block.tsan_barrier[block.barrier_generation % 2];
  tsan_release(order);
  if (++block.barrier_arrived == e.threads) {
    block.barrier_arrived = 0;
    ++block.barrier_generation;
    for (unsigned i = 0; i < e.threads; ++i) {
      if (!same_site(block.fibers[i].site, site)) report_two_barriers(block.fibers[i], site);
      make_ready(&block.fibers[i]);
    }
    make_progress();
    let_copies_happen();
  }
  wait_for_turn();
  me->wait = Wait::kNone;
  tsan_acquire(order);
}

void* shared_memory(size_t bytes, size_t alignment, CallSite site) {
  if (bytes > executor.shared_bytes) {
    fail("shared storage of " + std::to_string(bytes) + " bytes in a launch with " +
             std::to_string(executor.shared_bytes),
         site);
  }
  char* const shared = executor.running->block->shared;
  if (reinterpret_cast<uintptr_t>(shared) % alignment != 0) {  // it ends at a page, to 16 bytes
    fail("shared storage aligned to " + std::to_string(alignment) + " bytes, of which the launch asks for no multiple",
         site);
  }
  return shared;
}

void misaligned(const void* p, size_t bytes, CallSite site) {
  char address[24];
  snprintf(address, sizeof address, "%p", p);
  fail("misaligned access: " + std::to_string(bytes) + " bytes at " + address, site);
}

int multiprocessor_count() { return executor.multiprocessors; }

size_t max_shared_bytes() { return kMaxSharedBytes; }

void launch(const char* name, dim3 grid, dim3 block, size_t smem_bytes, bool cooperative, void (*kernel)(void*),
            void* context) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  check_launch(name, grid, block, smem_bytes, cooperative);

  Executor& e = executor;
  grid_size = grid;
  block_size = block;
  e.threads = block.x * block.y * block.z;
  e.kernel_name = name;
  e.kernel = kernel;
  e.kernel_context = context;
  e.cooperative = cooperative;
  e.shared_bytes = smem_bytes;
  e.failure.clear();
  e.random.seed(e.seed, e.launches++);
  e.tsan_host = tsan_current_fiber();
  sites_begin_launch();
  words_begin_launch();

  std::vector<uint32_t> order(uint64_t(grid.x) * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[e.random.below(i)]);

  const FaultHandler handler;
  tsan_release(&e.tsan_launch);
  const auto index = [&](uint32_t i) { return uint3{i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)}; };
  if (cooperative) {
    begin_blocks();
    for (unsigned i = 0; i < order.size(); ++i) {
      e.blocks[i].tsan_before = &e.tsan_launch;
      e.blocks[i].tsan_after = &e.tsan_done;
      begin_block(index(order[i]), i);
    }
    run_blocks();
  } else {
    for (uint64_t turn = 0; turn < order.size(); ++turn) run_block(index(order[turn]), turn);
  }
  words_end_launch();
  tsan_acquire(&e.tsan_done);
}

}  // namespace pyops::simt
