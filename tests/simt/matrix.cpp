// ldmatrix, stmatrix and the mma: each computed once for the whole warp, on what its lanes left in Warp. mma.cuh says
// which lane holds which elements. The sum over k begins with d, goes upwards and rounds to nearest after every
// addition (products of 16-bit and tf32 operands are exact); the hardware adds several products at a time and
// truncates.
#include <bit>

#include "state.h"

// Copies for newer processors, chosen when the program is loaded. All give the same bits: nothing is contracted.
#if defined(__x86_64__) && __GNUC__ >= 12 && !defined(PYOPS_SIMT_TSAN)
#define FOR_EACH_ISA __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_ISA
#endif

namespace pyops::simt {
namespace {

constexpr int kColumns = 8;  // of d

typedef float Row __attribute__((vector_size(kColumns * sizeof(float))));

// d [16, 8] += a b, with a [16, K] and d in the order of the fragments and b [K, 8] by rows.
template <int K>
[[gnu::always_inline]] inline void multiply(const float* a, const float (*b)[kColumns], float (*d)[4]) {
  constexpr int kPerLane = K / 2, kPack = K / 8;  // elements of a in a lane and in a register
  for (int g = 0; g < 8; ++g) {
    float (*fragment)[4] = d + 4 * g;
    Row upper, lower;
#pragma GCC unroll 8
    for (int n = 0; n < kColumns; ++n) {
      upper[n] = fragment[n / 2][n % 2];
      lower[n] = fragment[n / 2][2 + n % 2];
    }
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) {
      const int half = k / (K / 2), t = k % (K / 2) / kPack, e = k % kPack;
      const float* lane = a + (4 * g + t) * kPerLane;
      Row row;
      __builtin_memcpy(&row, b[k], sizeof row);
      upper += lane[2 * half * kPack + e] * row;
      lower += lane[(2 * half + 1) * kPack + e] * row;
    }
#pragma GCC unroll 8
    for (int n = 0; n < kColumns; ++n) {
      fragment[n / 2][n % 2] = upper[n];
      fragment[n / 2][2 + n % 2] = lower[n];
    }
  }
}

template <float (*convert)(uint16_t)>
[[gnu::always_inline]] inline void multiply_16bit(Warp& warp) {
  uint16_t bits[kWarpLanes * 8];
  float a[kWarpLanes * 8], fragments[kWarpLanes * 4], b[16][kColumns];
  __builtin_memcpy(bits, warp.a, sizeof warp.a);
  for (unsigned i = 0; i < kWarpLanes * 8; ++i) a[i] = convert(bits[i]);
  __builtin_memcpy(bits, warp.b, sizeof warp.b);
  for (unsigned i = 0; i < kWarpLanes * 4; ++i) fragments[i] = convert(bits[i]);
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < kColumns; ++n) b[k][n] = fragments[(4 * n + k % 8 / 2) * 4 + k / 8 * 2 + k % 2];
  }
  multiply<16>(a, b, warp.d);
}

FOR_EACH_ISA void multiply_bf16(Warp& warp) { multiply_16bit<bf16_to_float>(warp); }
FOR_EACH_ISA void multiply_f16(Warp& warp) { multiply_16bit<f16_to_float>(warp); }

FOR_EACH_ISA void multiply_tf32(Warp& warp) {
  const auto truncated = [](uint32_t bits) { return std::bit_cast<float>(bits & ~uint32_t(0x1fff)); };
  float a[kWarpLanes * 4], b[8][kColumns];
  for (unsigned i = 0; i < kWarpLanes * 4; ++i) a[i] = truncated(warp.a[i / 4][i % 4]);
  for (int k = 0; k < 8; ++k) {
    for (int n = 0; n < kColumns; ++n) b[k][n] = truncated(warp.b[4 * n + k % 4][k / 4]);
  }
  multiply<8>(a, b, warp.d);
}

FOR_EACH_ISA void multiply_f64(Warp& warp) {
  double d[kWarpLanes][2];
  for (int m = 0; m < 8; ++m) {
    for (int n = 0; n < 8; ++n) {
      double sum = warp.d64[4 * m + n / 2][n % 2];
      for (int k = 0; k < 4; ++k) sum = __builtin_fma(warp.a64[4 * m + k], warp.b64[4 * n + k], sum);
      d[4 * m + n / 2][n % 2] = sum;
    }
  }
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    for (int i = 0; i < 2; ++i) warp.d64[lane][i] = d[lane][i];
  }
}

uint32_t element(const MatrixRow& row, unsigned column) { return row.words[column / 2] >> column % 2 * 16 & 0xffff; }

void set_element(MatrixRow& row, unsigned column, uint32_t v) {
  row.words[column / 2] &= column % 2 ? 0x0000ffffu : 0xffff0000u;
  row.words[column / 2] |= v << column % 2 * 16;
}

void rows_to_registers(Warp& warp) {
  for (unsigned i = 0; i < warp.instruction.matrices; ++i) {
    const MatrixRow* rows = warp.rows + 8 * i;
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
      const unsigned g = lane / 4, t = lane % 4;
      warp.registers[lane][i] =
          warp.instruction.transpose ? element(rows[2 * t], g) | element(rows[2 * t + 1], g) << 16 : rows[g].words[t];
    }
  }
}

void registers_to_rows(Warp& warp) {
  for (unsigned i = 0; i < warp.instruction.matrices; ++i) {
    MatrixRow* rows = warp.rows + 8 * i;
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
      const unsigned g = lane / 4, t = lane % 4;
      const uint32_t v = warp.registers[lane][i];
      if (warp.instruction.transpose) {
        set_element(rows[2 * t], g, v & 0xffff);
        set_element(rows[2 * t + 1], g, v >> 16);
      } else {
        rows[g].words[t] = v;
      }
    }
  }
}

void multiply(Warp& warp) {
  if (warp.instruction.f64) return multiply_f64(warp);
  switch (warp.instruction.kind) {
    case Mma::kBf16:
      return multiply_bf16(warp);
    case Mma::kF16:
      return multiply_f16(warp);
    case Mma::kTf32:
      return multiply_tf32(warp);
  }
}

}  // namespace

void complete_matrices(Warp& warp, Wait kind) {
  if (kind == Wait::kLdmatrix) rows_to_registers(warp);
  if (kind == Wait::kStmatrix) registers_to_rows(warp);
  if (kind == Wait::kMma) multiply(warp);
}

bool takes_row(const void* row, int matrices, const char* what, CallSite site) {
  const unsigned lanes = 8 * matrices;
  if (executor.running->lane >= lanes) return false;
  check_access(what, row, sizeof(MatrixRow), site, kAllLanes >> (kWarpLanes - lanes));
  if (!in_shared_memory(row, sizeof(MatrixRow))) fail(std::string("row outside of shared memory in ") + what, site);
  return true;
}

// Switched off: the lane's own row.
void exchange_loaded(const MatrixRow& row, uint32_t* r, int matrices, bool transpose, CallSite site) {
  const Fiber* me = executor.running;
  Warp& warp = *me->warp;
  const uint32_t* result = row.words;
  if (!switched_off(site, Wait::kLdmatrix)) {
    warp.rows[me->lane] = row;
    warp.instruction.matrices = matrices;
    warp.instruction.transpose = transpose;
    join(Wait::kLdmatrix, kAllLanes, site);
    result = warp.registers[me->lane];
  }
  for (int i = 0; i < 4; ++i) {
    if (i < matrices) r[i] = result[i];
  }
}

// Switched off: nothing is stored.
bool exchange_stored(const uint32_t* r, MatrixRow* row, int matrices, bool transpose, CallSite site) {
  if (switched_off(site, Wait::kStmatrix)) return false;
  const Fiber* me = executor.running;
  Warp& warp = *me->warp;
  for (int i = 0; i < 4; ++i) {
    if (i < matrices) warp.registers[me->lane][i] = r[i];
  }
  warp.instruction.matrices = matrices;
  warp.instruction.transpose = transpose;
  join(Wait::kStmatrix, kAllLanes, site);
  *row = warp.rows[me->lane];
  return true;
}

// Switched off: nothing is added.
void mma(Mma kind, float* d, const uint32_t* a, const uint32_t* b, CallSite site) {
  if (switched_off(site, Wait::kMma)) return;
  const Fiber* me = executor.running;
  Warp& warp = *me->warp;
  __builtin_memcpy(warp.a[me->lane], a, sizeof warp.a[0]);
  __builtin_memcpy(warp.b[me->lane], b, sizeof warp.b[0]);
  __builtin_memcpy(warp.d[me->lane], d, sizeof warp.d[0]);
  warp.instruction.kind = kind;
  warp.instruction.f64 = false;
  join(Wait::kMma, kAllLanes, site);
  __builtin_memcpy(d, warp.d[me->lane], sizeof warp.d[0]);
}

void mma_f64(double* d, double a, double b, CallSite site) {
  if (switched_off(site, Wait::kMma)) return;
  const Fiber* me = executor.running;
  Warp& warp = *me->warp;
  warp.a64[me->lane] = a;
  warp.b64[me->lane] = b;
  __builtin_memcpy(warp.d64[me->lane], d, sizeof warp.d64[0]);
  warp.instruction.f64 = true;
  join(Wait::kMma, kAllLanes, site);
  __builtin_memcpy(d, warp.d64[me->lane], sizeof warp.d64[0]);
}

}  // namespace pyops::simt
