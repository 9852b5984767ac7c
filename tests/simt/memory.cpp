// Memory with guard pages: stacks of fibers, shared memory of a block, and copies of the tests' tensors.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <stdexcept>

#include "api.h"
#include "state.h"

namespace pyops::simt {
namespace {

constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point type, -1 in integers

size_t page_bytes() {
  static const size_t bytes = sysconf(_SC_PAGESIZE);
  return bytes;
}

size_t whole_pages(size_t bytes) { return (bytes + page_bytes() - 1) / page_bytes() * page_bytes(); }

char* reserve(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("simt: out of memory");
  return static_cast<char*>(memory);
}

void protect(char* memory, size_t bytes, int protection) {
  if (bytes > 0 && mprotect(memory, bytes, protection) != 0) throw std::runtime_error("simt: mprotect failed");
}

struct Region {
  char *map = nullptr, *map_end = nullptr;  // guard pages included
  char* begin = nullptr;
  size_t bytes = 0;
  std::string name;
};

std::map<char*, Region> regions;  // by begin

// Stacks grow downwards onto the guard page below each.
class Stacks {
 public:
  char* operator[](unsigned fiber) {
    if (memory_ == nullptr) memory_ = reserve(kMaxFibers * pitch());
    for (; made_ <= fiber; ++made_) protect(memory_ + made_ * pitch() + page_bytes(), kStackBytes, kReadWrite);
    return memory_ + fiber * pitch() + page_bytes();
  }
  bool contains(const char* address) const {
    return memory_ != nullptr && address >= memory_ && address < memory_ + kMaxFibers * pitch();
  }

 private:
  static constexpr int kReadWrite = PROT_READ | PROT_WRITE;
  static size_t pitch() { return kStackBytes + page_bytes(); }
  char* memory_ = nullptr;
  unsigned made_ = 0;
};

Stacks stacks;
Region shared_of[kMaxBlocks];

bool describe(const Region& region, const char* address, std::string& text) {
  if (address < region.map || address >= region.map_end) return false;
  const auto distance = [](const char* a, const char* b) { return std::to_string(a - b); };
  const char* end = region.begin + region.bytes;
  text = address >= end           ? distance(address, end) + " bytes past the end of "
         : address < region.begin ? distance(region.begin, address) + " bytes before the start of "
                                  : "byte " + distance(address, region.begin) + " (read-only) of ";
  text += region.name + " (" + std::to_string(region.bytes) + " bytes)";
  return true;
}

}  // namespace

char* stack_of(unsigned fiber) { return stacks[fiber]; }

char* shared_memory_block(unsigned set, size_t bytes) {
  Region& shared = shared_of[set];
  const size_t capacity = whole_pages(kMaxSharedBytes), page = page_bytes();
  if (shared.map == nullptr) {
    shared.map = reserve(capacity + 2 * page);
    shared.map_end = shared.map + capacity + 2 * page;
    shared.name = "shared memory";
  }
  char* end = shared.map_end - page;
  if (bytes != shared.bytes) {
    protect(end - whole_pages(shared.bytes), whole_pages(shared.bytes), PROT_NONE);
    protect(end - whole_pages(bytes), whole_pages(bytes), PROT_READ | PROT_WRITE);
  }
  shared.begin = end - (bytes + 15) / 16 * 16;
  shared.bytes = bytes;
  return shared.begin;
}

std::string describe_address(const void* address, const char* access) {
  const char* at = static_cast<const char*>(address);
  if (stacks.contains(at)) return "stack overflow";
  char buffer[24];
  snprintf(buffer, sizeof buffer, "%p", address);
  std::string text = std::string("invalid ") + access + " at address " + buffer, where;
  for (const Region& region : shared_of) {
    if (describe(region, at, where)) return text + ", " + where;
  }
  for (const auto& [begin, region] : regions) {
    if (describe(region, at, where)) return text + ", " + where;
  }
  return text;
}

}  // namespace pyops::simt

using namespace pyops::simt;

void* simt_alloc(size_t bytes, size_t misalignment, const char* name) {
  const size_t page = page_bytes(), usable = whole_pages(bytes + 15);
  char* map = reserve(usable + 2 * page);
  protect(map + page, usable, PROT_READ | PROT_WRITE);
  memset(map + page, kPoison, usable);
  char* end = map + page + usable;
  char* begin = end - bytes - misalignment;
  begin -= reinterpret_cast<uintptr_t>(begin) % 16;
  begin += misalignment;
  regions[begin] = {map, end + page, begin, bytes, name};
  return begin;
}

void simt_seal(void* memory) {
  const Region& region = regions.at(static_cast<char*>(memory));
  protect(region.map + page_bytes(), region.map_end - region.map - 2 * page_bytes(), PROT_READ);
}

size_t simt_free(void* memory) {
  const auto it = regions.find(static_cast<char*>(memory));
  if (it == regions.end()) return 0;
  const Region& region = it->second;
  const auto changed = [](char c) { return static_cast<unsigned char>(c) != kPoison; };
  const size_t damaged = std::count_if(region.map + page_bytes(), region.begin, changed) +
                         std::count_if(region.begin + region.bytes, region.map_end - page_bytes(), changed);
  munmap(region.map, region.map_end - region.map);
  regions.erase(it);
  return damaged;
}
