// What one layer_norm call needs. R rows (flattened leading dimensions), C features.
//
//   h    = x                                     without residual
//   h    = dropout(x, p) + residual              with residual; dropout(x, p) and h are each rounded to T
//   xhat = (h - mean) * rstd                     LayerNorm: mean over C, rstd = 1 / sqrt(var + eps)
//   xhat = h * rstd                              RMSNorm:   rstd = 1 / sqrt(mean(h^2) + eps)
//   y    = xhat * (weight_offset + weight) + bias
//
// Layout: P == 1: element (r, c) of x lies at r * x_stride + c. P > 1 (channels first, NCHW): row r = b * P + p is
// pixel p of image b, and its element c lies at (b * C + c) * P + p in every tensor; no residual, no strides.
// Everything that is written is dense. Outputs may not alias inputs.
//
// Dropout: element (r, c) takes lane c % 4 of Philox-4x32-10 with counter (c / 4, r, r >> 32, seed[1]) and key
// (seed[0], seed[0] >> 32), each truncated to 32 bits. It is kept when (lane >> 8) >= drop_threshold, and then scaled.
#pragma once
#include "types.h"

namespace pyops {

template <typename T, typename W>
struct LayerNormFwdParams {
  const T* x;           // [R, C]
  const T* residual;    // [R, C] or null
  const W* weight;      // [C] or null: all ones (weight_offset is then ignored)
  const W* bias;        // [C] or null: zeros
  const int64_t* seed;  // [2], on the device of x; null without dropout
  T* y;                 // [R, C]; null on the CPU only: statistics alone
  T* sum;               // [R, C] h; null without residual
  acc_t<T>* mean;       // [R] or null; null for RMSNorm
  acc_t<T>* rstd;       // [R] or null
  int64_t R, C, P;
  int64_t x_stride, residual_stride;  // elements between rows
  acc_t<T> eps;
  acc_t<T> weight_offset;   // 1 for a zero-centred weight, else 0
  acc_t<T> dropout_scale;   // 1 / (1 - p); 0 when p is 1
  uint32_t drop_threshold;  // ceil(p * 2^24)
  bool rms;
  int num_threads;  // CPU only
};

//   g  = dy * (weight_offset + weight)
//   dh = rstd * (g - mean_C(g) - xhat * mean_C(g * xhat)) + dsum      (RMSNorm: without mean_C(g))
//   dx = dropout'(dh), dresidual = dh
//   dweight = sum_R(dy * xhat), dbias = sum_R(dy)
template <typename T, typename W>
struct LayerNormBwdParams {
  const T* dy;           // [R, C]
  const T* dsum;         // [R, C] or null
  const T* saved;        // [R, C] h, or y when from_output
  const W* weight;       // [C] or null
  const W* bias;         // [C] or null; read only when from_output
  const acc_t<T>* mean;  // [R]; null for RMSNorm, when from_output, and on the CPU to have it computed again
  const acc_t<T>* rstd;  // [R]
  const int64_t* seed;   // [2] or null
  T* dx;                 // [R, C] or null
  T* dresidual;          // [R, C] or null; written only under dropout (without it dresidual equals dx)
  W* dweight;            // [C] or null
  W* dbias;              // [C] or null
  acc_t<T>* workspace;   // layer_norm_bwd_workspace() elements, GPU only: partial sums of dweight, dbias
  int64_t R, C, P;
  int64_t dy_stride, dsum_stride, saved_stride;
  acc_t<T> weight_offset;
  acc_t<T> dropout_scale;
  uint32_t drop_threshold;
  bool rms, from_output;
  int num_threads;  // CPU only
};

}  // namespace pyops
