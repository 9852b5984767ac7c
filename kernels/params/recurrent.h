// What one recurrent layer needs: T steps over B sequences, in one direction or both. H hidden units, P numbers in h
// (P = H, or the projection's size), G products for each unit.
//
//   gx = x W_ih^T + biases            [rows, G H], ahead of the call; every bias is in it but b_n
//   p  = W_hh h'                      h' = keep * h, the last step's h on its way into the product
//   p  = norm(p) * ln_gates           with normalised gates: over all G H products of a row
//
//   rnn    G = 1   m = tanh(gx + p), or relu
//   gru    G = 3   r = sigmoid(gx_r + p_r), z = sigmoid(gx_z + p_z), q = p_n + b_n
//                  n = tanh(gx_n + r q), m = n + z (h - n)
//   lstm   G = 4   i = sigmoid(gx_i + p_i + w_i c), f = sigmoid(gx_f + p_f + w_f c), g = tanh(gx_g + p_g)
//                  c' = f c + i g, o = sigmoid(gx_o + p_o + w_o c'), m = o tanh(norm(c'))
//                  w: the peepholes; norm(c') is c' unless the gates are normalised
//   coupled G = 3  the same with f = 1 - i; its gates are i, g, o
//
//   m  = W_hr m                       with a projection (lstm)
//   h <- h + u_h (m - h),  c <- c + u_c (c' - c)      u: zoneout, else 1
//
// Zoneout draws u = 0 with probability p when training, by the Philox numbers of params/attention.h with row
// 2 (d rows + n) + (0 of h, 1 of c) for row n of direction d; else u = 1 - p.
//
// Rows. Step t of sequence b has the row t step_rows + b batch_rows, or with offsets (packed sequences, sorted by
// falling length) offsets[t] + b for b < offsets[t + 1] - offsets[t]. Direction 1 goes from the last step to the first,
// a sequence at a time: one of length l begins at its step l - 1. Where reset[row] is set, h and c are 0 before the
// step.
//
// Numerics: sums, gates and c in acc_t<T>; h is rounded to T, also on its way into the product.
#pragma once
#include "types.h"

namespace pyops {

enum class RecurrentCell : int32_t { rnn_tanh, rnn_relu, gru, lstm, coupled };

// Of one direction. All dense but where a row's length is given.
template <typename T>
struct RecurrentDirection {
  const T* gx;    // [rows, G H]
  const T* w_hh;  // [G H, P]
  int64_t gx_row, w_hh_row, w_hr_row;
  const T* b_n;       // [H], gru
  const T* w_hr;      // [P, H] or null
  const T* peephole;  // [3, H] of i, f, o; coupled [2, H] of i, o; or null
  const T* ln_gates;  // [G H] or null
  const T* ln_cell;   // [2, H], weight and bias; or null
  const T* h0;        // [B, P] or null: 0
  const T* c0;        // [B, H] or null: 0
  const T* keep;      // [B, P] or null: 1
  T* y;               // [rows, P], rows of both directions side by side
  T* gates;         // [rows, S H] what the gates became, or null; may be gx itself where S = G. S: lstm 4 (i, f, g, o),
                    // coupled 3, gru 4 (r, z, n, q), rnn 1
  acc_t<T>* cells;  // [rows, H] c, or null
};

template <typename T>
struct RecurrentParams {
  RecurrentDirection<T> direction[2];
  RecurrentCell cell;
  int directions;
  int64_t T_, B, H, P;
  int64_t rows;            // of all steps
  const int64_t* offsets;  // [T + 1] or null
  int64_t step_rows, batch_rows;
  int64_t y_row;
  const bool* reset;    // [rows] or null
  const int64_t* seed;  // [2], zoneout in training
  acc_t<T> zoneout_h, zoneout_c;
  acc_t<T> eps;  // of the norms
  int num_threads;
};

// What gx is made of, where a kernel makes it: for calls of a few rows, whose matrix product would cost more to start
// than to compute, and where both weights fit into a core's own cache, so that no gx is needed.
template <typename T>
struct RecurrentInput {
  const T* x;     // [rows, F]
  const T* w_ih;  // [G H, F]
  int64_t x_row, w_ih_row;
  const T* b_ih;                    // [G H] or null
  const T* b_hh;                    // [G H] or null; its first `added` numbers are added (a GRU's last H are b_n)
  T* gx;                            // [rows, G H], or null: each step makes its own, of more than one sequence
  int64_t rows, columns, F, added;  // columns: G H
};

template <typename T>
struct RecurrentFwdParams : RecurrentParams<T> {
  const RecurrentInput<T>* input;  // null: gx is given
  T* h_n;                          // [directions, B, P] or null
  T* c_n;                          // [directions, B, H] or null
};

template <typename T>
struct RecurrentBwdParams : RecurrentParams<T> {
  const T* dy[2];  // [rows, P] or null
  int64_t dy_row;
  const T* dh_n;                // [directions, B, P] or null
  const T* dc_n;                // [directions, B, H] or null
  const acc_t<T>* dcells[2];    // [rows, H] or null
  T* dgx[2];                    // [rows, G H] gradient of gx
  T* dp[2];                     // [rows, G H] gradient of W_hh h' where it differs (gru, normalised gates), else null
  T* dm[2];                     // [rows, P] gradient of W_hr m, with a projection
  const acc_t<T>* products[2];  // [rows, G H] W_hh h' again, with normalised gates
  acc_t<T>* dbias[2];           // [S, H] sums over the rows of dgx, and last for gru of dq; or null
  acc_t<T>* dpeephole[2];       // like peephole, or null
  acc_t<T>* dln_gates[2];       // like ln_gates, or null
  acc_t<T>* dln_cell[2];        // like ln_cell, or null
  acc_t<T>* dh0;                // [directions, B, P]
  acc_t<T>* dc0;                // [directions, B, H] or null
};

// The gradients that are products over the rows, of a small call of one direction whose rows stand in the order of its
// steps. Each is null where it is not wanted.
template <typename T>
struct RecurrentGradients {
  const T *dgx, *dp;  // [rows, columns]
  const T* x;         // [rows, F]
  const T* w_ih;      // [columns, F]
  int64_t x_row, w_ih_row;
  const T* y;   // [rows, P]
  const T* h0;  // [B, P] or null: 0
  int64_t rows, columns, F, B, P;
  T *dx, *dw_ih, *dw_hh;  // like x, W_ih and W_hh, dense
  int num_threads;
};

}  // namespace pyops
