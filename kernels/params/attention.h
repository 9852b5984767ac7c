// What one attention call needs. B sequences, H query heads, Hk key heads (H a multiple of Hk; query head h reads key
// head h / (H / Hk)), L queries, S keys, head sizes D (q, k) and Dv (v, out).
//
//   off  = 0, or S - L when bottom_right                  (L and S of the sequence)
//   s_ij = scale * q_i . k_j
//   s_ij = softcap * tanh(s_ij / softcap)                 when softcap > 0
//   s_ij = s_ij + bias_ij - slope_h * |i + off - j|       bias: an additive mask
//   s_ij = -inf    unless  i + off - left <= j <= i + off + right  (a negative side is unlimited), and mask_ij
//   p_ij = exp(s_ij) / (sum_j exp(s_ij) + exp(sink_h))    0 in a row without a visible key
//   out_i = sum_j drop(p_ij) v_j
//
// Numerics. Scores in base 2: s2 = s * log2(e). An additive bias in base 2 is held within [-max, 2^100], max being the
// largest finite number of acc_t, and -inf stays -inf: so a row of finfo.min is an average over its keys, and keys at
// +inf share the row. stats holds for each row m2 = max(s2) (-inf in a row without a visible key or sink) and
// l = sum exp2(s2 - m2), the sink included, before dropout: two numbers, because m2 + log2(l) rounds l away when |m2|
// is large. lse = (m2 + log2(l)) / log2(e).
//
//   P'_ij = drop(P_ij), dP_ij = drop(dout_i . v_j), delta_i = dout_i . out_i - dlse_i
//   dS_ij = P_ij (dP_ij - delta_i)          gradient of s_ij; of the bias (0 where the bias is +inf)
//   dS_ij *= 1 - (capped / softcap)^2       behind the softcap
//   dv_j = sum_i P'_ij dout_i,  dq_i = scale * sum_j dS_ij k_j,  dk_j = scale * sum_i dS_ij q_i
//
// Where one key has almost all of the weight, dP and delta cancel, and dS shows how 16 bits rounded out. With a
// residue, delta_i = dout_i . (out_i + residue_i) - dlse_i.
//
// Rows. Query i of head h of sequence b has the row (b H + h) L + i. With cu_q and cu_k (packed sequences, then batch
// strides are ignored): L and S count all sequences together, sequence b holds queries cu_q[b] .. cu_q[b + 1] and keys
// cu_k[b] .. cu_k[b + 1] of the tensors, and query i of it has the row h L + cu_q[b] + i. i, j, and the mask's last two
// indices count within the sequence.
//
// Dropout: element (row, j) takes lane j % 4 of Philox-4x32-10 with counter (j / 4, row, row >> 32, seed[1]) and key
// (seed[0], seed[0] >> 32), each truncated to 32 bits. It is kept when (lane >> 8) >= drop_threshold, then scaled.
#pragma once
#include "types.h"

namespace pyops {

// Elements between neighbours in the first three dimensions of [B, H, L, D]; the last one is dense.
struct AttentionStrides {
  int64_t b, h, l;
};

enum class AttentionMask : int32_t {
  none,
  boolean,  // a byte; 0 hides the key
  same,     // an additive bias of type T
  wide,     // an additive bias of type float beside a 16-bit T
};

template <typename T>
struct AttentionParams {
  const T* q;              // [B, H, L, D]
  const T* k;              // [B, Hk, S, D]
  const T* v;              // [B, Hk, S, Dv]
  const void* mask;        // [B, H, L, S], broadcast dimensions with stride 0
  const acc_t<T>* slopes;  // [B, H] or null
  const acc_t<T>* sinks;   // [H] or null
  const int64_t* seed;     // [2], on the device of q; null without dropout
  const int32_t* cu_q;     // [B + 1] or null
  const int32_t* cu_k;     // [B + 1] or null
  AttentionStrides q_stride, k_stride, v_stride;
  int64_t mask_stride[4];  // the last one is 0 or 1
  AttentionMask mask_kind;
  int64_t B, H, Hk, L, S, D, Dv;
  int64_t max_q, max_k;  // the longest sequence; L and S without cu_q
  acc_t<T> scale;
  acc_t<T> softcap;     // 0: none
  int64_t left, right;  // of the window; negative: unlimited. Causal is right == 0
  bool bottom_right;
  acc_t<T> dropout_scale;   // 1 / (1 - p)
  uint32_t drop_threshold;  // ceil(p * 2^24)
  int num_threads;          // CPU only
};

template <typename T>
struct AttentionFwdParams : AttentionParams<T> {
  T* out;  // [B, H, L, Dv]
  AttentionStrides out_stride;
  acc_t<T>* stats;              // [2, rows]: m2, then l
  acc_t<T>* workspace;          // attention_fwd_workspace() elements, GPU only
  T* residue = nullptr;         // like out: what rounding took from it, or null
  bool differentiated = false;  // whether a backward will compute the scores again
  AttentionStrides residue_stride = {};
};

template <typename T>
struct AttentionBwdParams : AttentionParams<T> {
  const T* dout;          // [B, H, L, Dv]
  const T* out;           // [B, H, L, Dv]
  const acc_t<T>* stats;  // [2, rows]
  const acc_t<T>* dlse;   // [rows] or null
  AttentionStrides dout_stride, out_stride;
  T* dq;  // like q, or null
  T* dk;  // like k, or null
  T* dv;  // like v, or null
  AttentionStrides dq_stride, dk_stride, dv_stride;
  acc_t<T>* dmask;          // or null; the sum of dS over the dimensions in which dmask_stride is 0. Only with a mask
                            // whose mask_stride[3] is 1; all of it is written
  int64_t dmask_stride[3];  // of the first three dimensions, 0 where the mask is broadcast; the last one is dense
  acc_t<T>* workspace;      // attention_bwd_workspace() elements, GPU only
  const T* residue = nullptr;
  AttentionStrides residue_stride = {};
};

}  // namespace pyops
