// What the parts of the executor share. One launch runs at a time (launch() holds a lock), the threads of a block as
// fibers of the OS thread that called launch(). Blocks run one after another, those of a cooperative launch together.
#pragma once

#include <cstdint>
#include <string>

#include "fiber.h"
#include "simt.h"

namespace pyops::simt {

constexpr unsigned kWarpLanes = 32;
constexpr unsigned kMaxThreads = 1024;             // per block
constexpr size_t kMaxSharedBytes = 227 * 1024;     // per block, compute capability 9.0
constexpr unsigned kMaxFibers = 16 * kMaxThreads;  // of all blocks that run together
constexpr unsigned kMaxBlocks = 64;                // likewise
constexpr unsigned kTsanSets = 8;                  // of fibers, see fiber_sets()

// What a thread waits in. The names stand in reports.
enum class Wait : uint8_t {
  kNone,
  kExited,
  kSyncBlock,
  kSyncWarp,
  kBallot,
  kShuffle,
  kLdmatrix,
  kStmatrix,
  kMma,
  kPoll,
  kStore,  // the last three are places that can be switched off, no waits: a copy is done when it is waited for
  kCopyCommit,
  kCopyWait,
};

struct Warp;
struct Copy;
struct Block;

// What every switch needs stands first, in one cache line.
struct alignas(64) Fiber : Thread {
  unsigned lane = 0;
  Context context;
  Warp* warp = nullptr;
  Block* block = nullptr;
  CallSite site;  // of the wait
  Wait wait = Wait::kNone;
  // The exchange it waits in: operands, then result.
  unsigned mask = 0;
  Shuffle shuffle = Shuffle::kIndex;
  int operand = 0, width = 0;
  uint64_t value = 0, result = 0;
  unsigned warp_syncs = 0;
  // Polls since anything else was last seen to happen, and when that was.
  uint64_t polls = 0, progress_seen = 0;
  // Asynchronous copies in the order of issue, and numbers of groups.
  Copy *first_copy = nullptr, *last_copy = nullptr;
  unsigned groups_committed = 0, groups_complete = 0;
  unsigned number = 0;  // also among the fibers of other blocks under ThreadSanitizer
  void* tsan = nullptr;
};

struct Warp {
  Fiber* lanes = nullptr;  // consecutive
  unsigned count = 0;
  unsigned waiting = 0;  // lanes in an exchange that is not complete
  // Of the first of them, and whether another one waits in something else.
  Wait wait = Wait::kNone;
  bool differ = false;
  unsigned mask = 0;
  CallSite site;
  char tsan_sync[2][kWarpLanes] = {};
  // Matrix instructions: operands by lane, then results by lane. A lane writes its own part when it comes and reads its
  // own part when it leaves.
  struct {
    unsigned matrices;
    bool transpose;
    Mma kind;
    bool f64;
  } instruction;
  alignas(64) MatrixRow rows[kWarpLanes];
  alignas(64) uint32_t registers[kWarpLanes][4];
  alignas(64) uint32_t a[kWarpLanes][4];
  alignas(64) uint32_t b[kWarpLanes][2];
  alignas(64) float d[kWarpLanes][4];
  alignas(64) double a64[kWarpLanes], b64[kWarpLanes], d64[kWarpLanes][2];
};

struct Block {
  uint3 index;
  Fiber* fibers = nullptr;  // consecutive
  char* shared = nullptr;
  unsigned barrier_arrived = 0, barrier_generation = 0;
  char tsan_barrier[2] = {};
  char *tsan_before = nullptr, *tsan_after = nullptr;  // of this block on its set of fibers
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
  Fiber fibers[kMaxFibers];
  Warp warps[kMaxFibers / kWarpLanes];
  Block blocks[kMaxBlocks];
  Fiber* ready[kMaxFibers];
  Fiber* running = nullptr;  // null outside of fibers
  Context host;
  unsigned threads = 0;       // of a block
  unsigned fibers_begun = 0;  // of all blocks that run
  unsigned live = 0, ready_count = 0;
  uint64_t progress = 0;  // counts what a poll may wait for
  Random random;

  const char* kernel_name = "";
  void (*kernel)(void*) = nullptr;
  void* kernel_context = nullptr;
  bool cooperative = false;
  size_t shared_bytes = 0;
  std::string failure;
  unsigned copies = 0;            // issued and not waited for, of all threads
  const Copy* copying = nullptr;  // while it takes effect

  uint64_t seed = 1, launches = 0;
  int multiprocessors = 4;

  void* tsan_host = nullptr;
  char tsan_launch = 0, tsan_done = 0, tsan_sets[kTsanSets][2] = {};
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
// Threads that poll may find something new.
inline void make_progress() { ++executor.progress; }
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

inline bool in_shared_memory(const void* p, size_t bytes) {
  const uintptr_t offset =
      reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(executor.running->block->shared);
  return offset < executor.shared_bytes && bytes <= executor.shared_bytes - offset;
}

// warp.cpp. Waits until every lane named in the mask waits here; the last one to come does the work of all.
void join(Wait kind, unsigned mask, CallSite site);
constexpr unsigned kAllLanes = 0xffffffffu;
// matrix.cpp
void complete_matrices(Warp& warp, Wait kind);

// executor.cpp
[[noreturn]] void report_deadlock(const char* what);

// copies.cpp
void copies_begin_block(Block& block);
void let_copies_happen();  // some of them, by chance
void check_no_copies_left();
std::string text(const Copy& copy);

// words.cpp
void words_begin_launch();
void words_end_launch();

// conflicts.cpp
void conflicts_end_block();

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
