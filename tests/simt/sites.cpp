// The record of barriers and exchanges by place, and the switches that turn them off. Both are used by few tests, so
// without them a barrier only looks at one flag.
#include <algorithm>
#include <map>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "api.h"
#include "state.h"
#include "tsan.h"

namespace pyops::simt {

bool sites_in_use = false;

namespace {

struct Site {
  CallSite place;
  const char* what;
  bool off;
  uint64_t calls;
};

struct Disabled {
  std::string file;
  int line;
  std::string kernel;
};

using Key = std::tuple<std::string, std::string, int, std::string>;

bool recording = false;
std::vector<Disabled> disabled;
std::map<Key, uint64_t> record;
std::vector<Site> launch_sites;  // met in the current launch; searched from the front, there are few
std::string launch_kernel;

void merge_launch() {
  for (const Site& site : launch_sites) {
    record[{launch_kernel, site.place.file_name(), int(site.place.line()), site.what}] += site.calls;
  }
  launch_sites.clear();
}

bool is_disabled(CallSite place) {
  const std::string_view file = place.file_name();
  return std::any_of(disabled.begin(), disabled.end(), [&](const Disabled& d) {
    return d.line == int(place.line()) && file.ends_with(d.file) && (d.kernel.empty() || d.kernel == launch_kernel);
  });
}

const char* name_of(Wait kind) {
  switch (kind) {
    case Wait::kSyncBlock:
      return "sync_block";
    case Wait::kSyncWarp:
      return "sync_warp";
    case Wait::kBallot:
      return "ballot";
    case Wait::kLdmatrix:
      return "ldmatrix";
    case Wait::kStmatrix:
      return "stmatrix";
    case Wait::kMma:
      return "mma";
    case Wait::kPoll:
      return "await_stamped";
    case Wait::kStore:
      return "store_relaxed";
    case Wait::kCopyCommit:
      return "cp_async_commit";
    case Wait::kCopyWait:
      return "cp_async_wait";
    default:
      return "shuffle";
  }
}

}  // namespace

void sites_begin_launch() {
  merge_launch();
  launch_kernel = executor.kernel_name;
}

namespace {

bool look_up(CallSite place, Wait kind) {
  for (Site& site : launch_sites) {
    if (same_site(site.place, place)) {
      ++site.calls;
      return site.off;
    }
  }
  launch_sites.push_back({place, name_of(kind), is_disabled(place), 1});
  return launch_sites.back().off;
}

}  // namespace

bool switched_off_slowly(CallSite place, Wait kind) {
  tsan_ignore_begin();  // it knows what the C library does to these books
  const bool off = look_up(place, kind);
  tsan_ignore_end();
  return off;
}

}  // namespace pyops::simt

using namespace pyops::simt;

void simt_record_sites(int on) {
  launch_sites.clear();
  if (on) record.clear();
  recording = on != 0;
  sites_in_use = recording || !disabled.empty();
}

const char* simt_sites() {
  static std::string lines;
  merge_launch();
  lines.clear();
  for (const auto& [key, calls] : record) {
    const auto& [kernel, file, line, what] = key;
    lines += kernel + "\t" + file + "\t" + std::to_string(line) + "\t" + what + "\t" + std::to_string(calls) + "\n";
  }
  return lines.c_str();
}

void simt_disable(const char* file, int line, const char* kernel) {
  disabled.push_back({file, line, kernel});
  sites_in_use = true;
}

void simt_enable_all() {
  disabled.clear();
  sites_in_use = recording;
}

void simt_set_seed(uint64_t seed) {
  executor.seed = seed;
  executor.launches = 0;
}

void simt_set_multiprocessors(int count) { executor.multiprocessors = count; }
