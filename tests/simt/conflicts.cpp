// Bank conflicts of the accesses that go through wrappers (load_vec, store_vec, ldmatrix, stmatrix, cp_async to shared
// memory); plain C++ accesses are not seen. Shared memory has 32 banks of 4 bytes. Lanes are served in phases of 128
// bytes: 8 lanes of 16, 16 of 8, 32 of at most 4. A phase takes as many wavefronts as the fullest bank has different
// words in it; those beyond the first are extra.
//
// Lanes are brought together by count: the k-th time that each lane of a warp comes to a place is one access of the
// warp. Where lanes run through a loop a different number of times, that is a guess.
#include <algorithm>
#include <deque>
#include <map>
#include <string>
#include <tuple>

#include "api.h"
#include "state.h"

namespace pyops::simt {

bool conflicts_recorded = false;

namespace {

constexpr unsigned kBanks = 32, kBankBytes = 4, kPhaseBytes = kBanks * kBankBytes;

struct Figure {
  uint64_t accesses = 0, extra = 0;
};
std::map<std::tuple<std::string, std::string, int, std::string>, Figure> figures;

struct Access {
  unsigned lanes = 0;  // a mask
  uint32_t offset[kWarpLanes];
};

// What one warp does at one place.
struct Stream {
  const char* what = "";
  unsigned bytes = 0;
  uint64_t first = 0;  // number of open[0]
  uint64_t count[kWarpLanes] = {};
  std::deque<Access> open;
  Figure figure;
};
std::map<std::tuple<const char*, unsigned, unsigned, unsigned>, Stream> streams;  // file, line, column, warp

unsigned extra_wavefronts(const Access& access, unsigned bytes) {
  const unsigned lanes = std::min(kWarpLanes, kPhaseBytes / bytes), words = (bytes + kBankBytes - 1) / kBankBytes;
  unsigned extra = 0;
  for (unsigned begin = 0; begin < kWarpLanes; begin += lanes) {
    unsigned in_bank[kBanks] = {}, fullest = 1;
    uint32_t seen[kWarpLanes];
    unsigned seen_count = 0;
    for (unsigned lane = begin; lane < begin + lanes; ++lane) {
      if ((access.lanes >> lane & 1) == 0) continue;
      for (unsigned i = 0; i < words; ++i) {
        const uint32_t word = access.offset[lane] / kBankBytes + i;
        if (std::find(seen, seen + seen_count, word) != seen + seen_count) continue;
        seen[seen_count++] = word;
        fullest = std::max(fullest, ++in_bank[word % kBanks]);
      }
    }
    extra += fullest - 1;
  }
  return extra;
}

void close_first(Stream& stream) {
  ++stream.figure.accesses;
  stream.figure.extra += extra_wavefronts(stream.open.front(), stream.bytes);
  stream.open.pop_front();
  ++stream.first;
}

}  // namespace

void record_access(const char* what, const void* p, size_t bytes, unsigned lanes, CallSite site) {
  const Fiber* me = executor.running;
  if (!in_shared_memory(p, bytes)) return;
  Stream& stream = streams[{site.file_name(), site.line(), site.column(), unsigned(me->warp - executor.warps)}];
  stream.what = what;
  stream.bytes = bytes;
  const uint64_t number = stream.count[me->lane]++ - stream.first;
  if (number == stream.open.size()) stream.open.emplace_back();
  Access& access = stream.open[number];
  access.lanes |= 1u << me->lane;
  access.offset[me->lane] = static_cast<const char*>(p) - me->block->shared;
  while (!stream.open.empty() && stream.open.front().lanes == lanes) close_first(stream);
}

void conflicts_end_block() {
  for (auto& [place, stream] : streams) {
    while (!stream.open.empty()) close_first(stream);
    const auto& [file, line, column, warp] = place;
    Figure& figure = figures[{executor.kernel_name, file, int(line), stream.what}];
    figure.accesses += stream.figure.accesses;
    figure.extra += stream.figure.extra;
  }
  streams.clear();
}

}  // namespace pyops::simt

using namespace pyops::simt;

void simt_record_conflicts(int on) {
  if (on) figures.clear();
  conflicts_recorded = on != 0;
}

const char* simt_conflicts() {
  static std::string lines;
  lines.clear();
  for (const auto& [key, figure] : figures) {
    const auto& [kernel, file, line, what] = key;
    lines += kernel + "\t" + file + "\t" + std::to_string(line) + "\t" + what + "\t" + std::to_string(figure.accesses) +
             "\t" + std::to_string(figure.extra) + "\n";
  }
  return lines.c_str();
}
