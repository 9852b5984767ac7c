// Gradients of a small call that are products over its rows: dx = dgx W_ih, dW_ih = dgx^T x, dW_hh = dp^T h'. Threads
// share the rows of the weights, and the columns of x.
#pragma once
#include "recurrent_steps.h"

namespace pyops::PYOPS_ISA {

// Steps of a product that meet a panel of 16 KB. Sums of blocks lose fewer digits than one long sum.
constexpr int kBlockSteps = 128;

constexpr int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// C (rows x columns) = A B. pack(r, count, strip) packs rows r, r + 1, .. of A, all steps; row_of(k) is row k of B.
// `strips` has room for tiles_of(rows) of `steps` steps, `sums` for as many tiles of one panel's width.
template <typename T, typename Pack, typename RowOf>
void multiply_rows_of(Pack&& pack, int64_t rows, RowOf&& row_of, int64_t steps, T* c, int64_t c_row, int64_t columns,
                      acc_t<T>* strips, acc_t<T>* sums) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>, U = kPanel<A>, kStep = kStripStep<A>;
  alignas(kVectorBytes) A panel[kBlockSteps * U] = {};  // what is not packed is multiplied: denormals would be slow
  const auto rows_from = [&](int64_t r) { return rows - r < kTileRows ? static_cast<int>(rows - r) : kTileRows; };
  const auto strip_of = [&](int64_t r) { return strips + r / kTileRows * round_up(steps, L) * kStep; };
  for (int64_t r = 0; r < rows; r += kTileRows) pack(r, rows_from(r), strip_of(r));
  for (int64_t n = 0; n < columns; n += U) {
    const int64_t width = columns - n < U ? columns - n : U;
    for (int64_t k = 0; k < steps; k += kBlockSteps) {
      const int block = steps - k < kBlockSteps ? static_cast<int>(steps - k) : kBlockSteps;
      pack_rows<A, T>([&](int j) { return row_of(k + j) + n; }, block, width, panel, 0);
      for (int64_t r = 0; r < rows; r += kTileRows) {
        const A* const strip = strip_of(r) + k * kStep;
        if (k == 0) {
          multiply<Into::product, 1, kStep>(rows_from(r), strip, panel, 0, block, sums + r * U, U, U);
        } else {
          multiply<Into::add, 1, kStep>(rows_from(r), strip, panel, 0, block, sums + r * U, U, U);
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t v = 0; v < width; v += L) {
        const Vec<A> sum = load(sums + r * U + v, Full{});
        if (width - v >= L) {
          store(c + r * c_row + n + v, sum, Full{});
        } else {
          store(c + r * c_row + n + v, sum, Partial{static_cast<int>(width - v)});
        }
      }
    }
  }
}

template <typename T>
void gradients(const RecurrentGradients<T>& p) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>, kStep = kStripStep<A>;
  constexpr int64_t kLeastProducts = 1 << 18;  // of a thread
  const int64_t useful = p.rows * p.columns * (p.F + p.P) / kLeastProducts;
  const int threads = useful < 1 ? 1 : useful < p.num_threads ? static_cast<int>(useful) : p.num_threads;
  const int64_t unit_tiles = tiles_of((p.columns + threads - 1) / threads), row_tiles = tiles_of(p.rows);
  const int64_t of_weights = unit_tiles * round_up(p.rows, L);
  const int64_t of_x = p.dx == nullptr ? 0 : row_tiles * round_up(p.columns, L);
  const int64_t strip_size = (of_weights > of_x ? of_weights : of_x) * kStep;
  const int64_t sum_size = (unit_tiles > row_tiles ? unit_tiles : row_tiles) * kTileRows * kPanel<A>;
  Scratch<A> strips(threads * strip_size), sums(threads * sum_size);
  const auto part = [&](int index) {
    const Range units = share(p.columns, index, threads);
    const int64_t count = units.end - units.begin;
    A *const own = strips.get() + index * strip_size, *const own_sums = sums.get() + index * sum_size;
    // Of rows `from` on of d [rows, columns], the units of this thread as rows.
    const auto pack_units = [&](const T* d, int64_t from) {
      return [=, &p](int64_t r, int, A* strip) {
        const int64_t left = p.columns - units.begin - r;
        for (int64_t k = from; k < p.rows; ++k, strip += kStep) {
          for (int64_t i = 0; i < kTileRows && i < left; i += L) {
            const T* const numbers = d + k * p.columns + units.begin + r + i;
            store(strip + i, left - i >= L ? load(numbers, Full{}) : load(numbers, Partial{static_cast<int>(left - i)}),
                  Full{});
          }
        }
      };
    };
    if (p.dw_ih != nullptr) {
      multiply_rows_of<T>(
          pack_units(p.dgx, 0), count, [&](int64_t k) { return p.x + k * p.x_row; }, p.rows,
          p.dw_ih + units.begin * p.F, p.F, p.F, own, own_sums);
    }
    // Each row has the h of the row B before it.
    const int64_t from = p.h0 == nullptr ? p.B : 0;
    if (p.dw_hh != nullptr && from < p.rows) {
      const auto h_of = [&](int64_t k) { return k + from < p.B ? p.h0 + k * p.P : p.y + (k + from - p.B) * p.P; };
      multiply_rows_of<T>(pack_units(p.dp, from), count, h_of, p.rows - from, p.dw_hh + units.begin * p.P, p.P, p.P,
                          own, own_sums);
    } else if (p.dw_hh != nullptr) {
      __builtin_memset(static_cast<void*>(p.dw_hh + units.begin * p.P), 0, count * p.P * sizeof(T));
    }
    const Range columns = share(p.F, index, threads);
    if (p.dx != nullptr && columns.begin < columns.end) {
      const auto pack = [&](int64_t r, int of, A* strip) {
        pack_transposed<kStep, A, T>([&](int i) { return p.dgx + (r + i) * p.columns; }, of, p.columns, A(1), strip, 0);
      };
      multiply_rows_of<T>(
          pack, p.rows, [&](int64_t k) { return p.w_ih + k * p.w_ih_row + columns.begin; }, p.columns,
          p.dx + columns.begin, p.F, columns.end - columns.begin, own, own_sums);
    }
  };
  in_parallel(threads, [&](int index, int count) {
    for (int i = index; i < threads; i += count) part(i);  // OpenMP may give fewer threads than were asked for
  });
}

}  // namespace pyops::PYOPS_ISA
