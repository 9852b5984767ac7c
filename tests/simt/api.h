// What Python calls in the built module through ctypes, beside the kernels' own bindings. Strings that are returned
// live until the next call.
#pragma once

#include <cstddef>
#include <cstdint>

#define SIMT_API extern "C" __attribute__((visibility("default")))

// Order of threads and blocks in the launches that follow; their numbers start again at 0.
SIMT_API void simt_set_seed(uint64_t seed);
SIMT_API void simt_set_multiprocessors(int count);

// Barriers and exchanges by place. A file matches by the end of its path, an empty kernel name matches every kernel.
SIMT_API void simt_record_sites(int on);  // starts a new record, or ends it
SIMT_API const char* simt_sites();        // lines "kernel\tfile\tline\twhat\tcalls"
SIMT_API void simt_disable(const char* file, int line, const char* kernel);
SIMT_API void simt_enable_all();

// Bank conflicts by place, of shared memory accesses through wrappers.
SIMT_API void simt_record_conflicts(int on);  // starts a new record, or ends it
SIMT_API const char* simt_conflicts();        // lines "kernel\tfile\tline\twhat\taccesses\textra wavefronts"

// Memory that ends at a page nobody may touch (and begins after one), full of 0xff bytes. The address is
// `misalignment` past a multiple of 16, so up to 15 bytes are left before the guard page; these and the ones before the
// start are 0xff too, and simt_free() returns how many of them were changed.
SIMT_API void* simt_alloc(size_t bytes, size_t misalignment, const char* name);
SIMT_API void simt_seal(void* memory);  // may be read only from now on
SIMT_API size_t simt_free(void* memory);
