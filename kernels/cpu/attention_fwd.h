// Forward: one pass over the keys with an online softmax (Milakov, Gimelshein 2018; Dao et al. 2022).
#pragma once
#include "attention_rows.h"

namespace pyops::PYOPS_ISA {

// A block of queries on its way over the keys.
template <typename T>
struct ForwardScratch {
  using A = acc_t<T>;
  using E = Element<T>;
  static constexpr int kStep = kStripStep<A>;

  explicit ForwardScratch(const AttentionParams<T>& p, int most_rows)
      : d_steps(round_up(steps_of<E>(p.D), kLanes<A>)),
        v_columns(round_up(p.Dv, kLanes<A>)),
        v_panels((p.Dv + kPanel<E> - 1) / kPanel<E>),
        strips((most_rows + kTileRows - 1) / kTileRows),
        keys(d_steps * kKeys),
        values(kKeys * v_panels * kPanel<E>),
        queries(strips * d_steps * kStep),
        scores(kTileRows * kKeys),
        weights(is_pair<E> ? kTileRows * kKeys / 2 : 0),
        out(strips * kTileRows * v_columns),
        max(strips * kStep),
        sum(strips * kTileRows * kLanes<A>) {}

  int64_t d_steps, v_columns, v_panels, strips;
  Scratch<E> keys, values, queries;
  Scratch<A> scores;
  Scratch<E> weights;  // of pairs; else the weights take the place of the scores
  Scratch<A> out, max, sum;
  Scratch<QueryRow<T>> rows{kMostRows};
};

// scores to weights in place (to `weights` as pairs): exp2(s - m), and what the state of the rows becomes.
template <bool kDrop, typename E, typename T, typename A = acc_t<T>>
PYOPS_INLINE void softmax_strip(const AttentionParams<T>& p, const QueryRow<T>* rows, int n, const StripView& view,
                                int64_t j0, A* scores, E* weights, A* max, A* sum, A* rescale) {
  constexpr int L = kLanes<A>;
  constexpr int kPadded = static_cast<int>(round_up(kTileRows, L));
  alignas(kVectorBytes) A held[kPadded];
  for (int r = 0; r < n; ++r) {
    const A* s = scores + r * kKeys;
    Vec<A> m0 = splat(max[r]), m1 = m0;
    int c = view.lo;
    for (; c + 2 * L <= view.hi; c += 2 * L) {
      const Vec<A> a = load(s + c, Full{}), b = load(s + c + L, Full{});
      m0 = a > m0 ? a : m0;
      m1 = b > m1 ? b : m1;
    }
    if (c < view.hi) {
      const Vec<A> a = load(s + c, Full{});
      m0 = a > m0 ? a : m0;
    }
    held[r] = reduce_max<A>(m0 > m1 ? m0 : m1);
  }
  for (int r = 0; r < n; r += L) {
    const Vec<A> before = load(max + r, Full{}), now = load(held + r, Full{});
    const Vec<A> finite = now == -kInfinity<A> ? Vec<A>{} : now;
    store(rescale + r, exp2<A>(before - finite), Full{});
    store(max + r, now, Full{});
    store(held + r, finite, Full{});
  }
  alignas(64) uint32_t keep[kKeys + 4 * L];
  for (int r = 0; r < n; ++r) {
    A* s = scores + r * kKeys;
    if constexpr (kDrop) {
      dropout_row(keep + view.lo, p.seed, rows[r].row, view.hi - view.lo, p.drop_threshold, j0 + view.lo);
    }
    const Vec<A> m = splat(held[r]);
    const auto weight = [&](int c, Vec<A>& total) PYOPS_ALWAYS_INLINE {
      Vec<A> e = exp2<A>(load(s + c, Full{}) - m);
      total += e;
      if constexpr (kDrop) {
        auto kept = load_mask(keep + c, A{});
        e = bit_cast<Vec<A>>(bit_cast<decltype(kept)>(e) & kept);
      }
      return e;
    };
    Vec<A> sum0 = load(sum + r * L, Full{}) * rescale[r], sum1{};
    int c = view.lo;
    for (; c + 2 * L <= view.hi; c += 2 * L) {
      const Vec<A> a = weight(c, sum0), b = weight(c + L, sum1);
      if constexpr (is_pair<E>) {
        const U32 pairs = bf16_in_order(a, b);
        __builtin_memcpy(weights + (r * kKeys + c) / 2, &pairs, sizeof(pairs));
      } else {
        store(s + c, a, Full{});
        store(s + c + L, b, Full{});
      }
    }
    if (c < view.hi) store(s + c, weight(c, sum0), Full{});
    store(sum + r * L, sum0 + sum1, Full{});
  }
}

template <typename E, typename T, typename A = acc_t<T>>
PYOPS_INLINE void softmax(const AttentionParams<T>& p, const QueryRow<T>* rows, int n, const StripView& view,
                          int64_t j0, A* scores, E* weights, A* max, A* sum, A* rescale) {
  if (p.seed == nullptr) {
    softmax_strip<false, E>(p, rows, n, view, j0, scores, weights, max, sum, rescale);
  } else {
    softmax_strip<true, E>(p, rows, n, view, j0, scores, weights, max, sum, rescale);
  }
}

// Where a row begins: nothing seen but the sink.
template <typename T, typename A = acc_t<T>>
PYOPS_INLINE void begin_row(const AttentionParams<T>& p, int64_t h, A& max, A* sum) {
  max = p.sinks != nullptr ? add_bias<A>(Vec<A>{}, splat(p.sinks[h]))[0] : -kInfinity<A>;
  Vec<A> one{};
  one[0] = max == -kInfinity<A> ? A(0) : A(1);
  store(sum, one, Full{});
}

template <typename T, typename A = acc_t<T>>
PYOPS_INLINE void store_result(const AttentionFwdParams<T>& p, const Sequence& seq, const QueryRow<T>& row,
                               const A* weighted, A max, A sum) {
  const A factor = sum == 0 ? A(0) : (p.seed != nullptr ? p.dropout_scale : A(1)) / sum;
  T* out = at(p, p.out, p.out_stride, seq, seq.q_begin, row.h, row.i);
  if (p.residue == nullptr) {
    store_row(out, weighted, p.Dv, factor);
  } else {
    store_row(out, at(p, p.residue, p.residue_stride, seq, seq.q_begin, row.h, row.i), weighted, p.Dv, factor);
  }
  p.stats[row.row] = max;
  p.stats[stats_rows(p) + row.row] = sum;
}

// Rows [begin, end) of key head hk of a sequence.
template <typename T>
void forward_rows(const AttentionFwdParams<T>& p, const Sequence& seq, int64_t hk, int64_t begin, int64_t end,
                  ForwardScratch<T>& scratch) {
  using A = acc_t<T>;
  using E = Element<T>;
  constexpr int L = kLanes<A>, kStep = kStripStep<A>;
  const int n = static_cast<int>(end - begin), strips = (n + kTileRows - 1) / kTileRows;
  const int64_t Dp = scratch.d_steps, Vp = scratch.v_columns;
  const A scale = p.scale * kLog2E<A>;
  QueryRow<T>* rows = scratch.rows.get();
  int64_t lo = seq.S, hi = 0;
  rows_of_unit(p, seq, hk, begin, end, rows, lo, hi);
  const auto query = [&](int r) { return at(p, p.q, p.q_stride, seq, seq.q_begin, rows[r].h, rows[r].i); };
  for (int strip = 0; strip < strips; ++strip) {
    const int first = strip * kTileRows, count = n - first < kTileRows ? n - first : kTileRows;
    pack_transposed<kStep, E, T>([&](int r) { return query(first + r); }, count, p.D, scale,
                                 scratch.queries.get() + strip * Dp * kStep, 0);
  }
  for (int r = 0; r < n; ++r) {
    begin_row(p, rows[r].h, scratch.max.get()[r / kTileRows * kStep + r % kTileRows], scratch.sum.get() + r * L);
  }
  __builtin_memset(scratch.out.get(), 0, round_up(n, kTileRows) * Vp * sizeof(A));

  for (int64_t j0 = lo / kKeys * kKeys; j0 < hi; j0 += kKeys) {
    const int width = static_cast<int>(seq.S - j0 < kKeys ? seq.S - j0 : kKeys);
    bool packed = false;
    for (int strip = 0; strip < strips; ++strip) {
      const int first = strip * kTileRows, count = n - first < kTileRows ? n - first : kTileRows;
      StripView view;
      if (!view_strip(p, rows + first, count, j0, width, view)) continue;
      if (!packed) {
        packed = true;
        pack_transposed<kPanel<E>, E, T>([&](int j) { return at(p, p.k, p.k_stride, seq, seq.k_begin, hk, j0 + j); },
                                         width, p.D, A(1), scratch.keys.get(), Dp * kPanel<E>);
        pack_rows<E, T>([&](int j) { return at(p, p.v, p.v_stride, seq, seq.k_begin, hk, j0 + j); }, width, p.Dv,
                        scratch.values.get(), kKeys * kPanel<E>);
      }
      prefetch_mask(p, rows + first + count, n - first - count, j0, width);
      A* scores = scratch.scores.get();
      multiply<Into::product, 1, kStep>(count, scratch.queries.get() + strip * Dp * kStep,
                                        scratch.keys.get() + view.lo * Dp, Dp * kPanel<E>,
                                        static_cast<int>(steps_of<E>(p.D)), scores + view.lo, int64_t{kKeys},
                                        view.hi - view.lo, is_pair<E> ? &scale : nullptr);
      for (int r = 0; r < count; ++r) {
        if (has_plain_scores(p, rows[first + r], view, r)) continue;
        finish_scores<T>(p, seq, rows[first + r], view, r, j0, width, scores + r * kKeys, nullptr);
      }
      alignas(kVectorBytes) A rescale[round_up(kTileRows, L)];
      A* max = scratch.max.get() + strip * kStep;
      A* sum = scratch.sum.get() + first * L;
      softmax(p, rows + first, count, view, j0, scores, scratch.weights.get(), max, sum, rescale);
      A* out = scratch.out.get() + first * Vp;
      const int columns = static_cast<int>(Vp);
      if constexpr (is_pair<E>) {
        multiply<Into::scaled, kKeys / 2, 1>(count, scratch.weights.get() + view.lo / 2,
                                             scratch.values.get() + view.lo / 2 * kPanel<E>, int64_t{kKeys} * kPanel<E>,
                                             (view.last + 1 - view.lo) / 2, out, Vp, columns, rescale);
      } else {
        multiply<Into::scaled, kKeys, 1>(count, scores + view.lo, scratch.values.get() + view.lo * kPanel<E>,
                                         int64_t{kKeys} * kPanel<E>, view.last - view.lo, out, Vp, columns, rescale);
      }
    }
  }

  for (int r = 0; r < n; ++r) {
    store_result(p, seq, rows[r], scratch.out.get() + r * Vp, scratch.max.get()[r / kTileRows * kStep + r % kTileRows],
                 reduce_add<A>(load(scratch.sum.get() + r * L, Full{})));
  }
}

// ---- few queries: keys and values as they lie ----
//
// Packing a key block pays when many queries share it. Up to kLeastRows of them (decoding) read it in place, and where
// there are fewer units than threads, several threads share the keys of one. Not before a backward: the scores add up
// in another order than there, and large ones would then exceed the saved maximum.

constexpr int kFewRows = kLeastRows;
constexpr int kManyKeys = 1024;  // from here on

// Rows of a cache of keys lie a page or more apart, which the hardware's prefetchers do not follow.
constexpr int kRowsAhead = 16;
template <typename T>
PYOPS_INLINE void prefetch_rows(const T* row, int64_t stride, int rows, int64_t columns) {
  for (int r = 0; r < rows; ++r) {
    const char* line = reinterpret_cast<const char*>(row + r * stride);
    for (int64_t byte = 0; byte < columns * static_cast<int64_t>(sizeof(T)); byte += 64)
      __builtin_prefetch(line + byte);
  }
}

// scores[r][j] = q_r . k_j for keys of one block; queries are rows of `columns` numbers, zero behind D.
template <typename T, typename A = acc_t<T>>
void score_in_place(const A* queries, int n, int64_t columns, const T* keys, int64_t stride, int64_t D, int from,
                    int to, A* scores) {
  constexpr int L = kLanes<A>;
  for (int j = from; j < to; j += 2) {
    const T* first = keys + j * stride;
    const T* second = j + 1 < to ? first + stride : first;
    prefetch_rows(first + kRowsAhead * stride, stride, 2, D);
    Vec<A> sum[kFewRows][2] = {};
    for (int64_t c = 0; c < D; c += L) {
      Vec<A> a, b;
      if (D - c >= L) {
        a = load(first + c, Full{});
        b = load(second + c, Full{});
      } else {
        a = load(first + c, Partial{static_cast<int>(D - c)});
        b = load(second + c, Partial{static_cast<int>(D - c)});
      }
      for (int r = 0; r < n; ++r) {
        const Vec<A> q = load(queries + r * columns + c, Full{});
        sum[r][0] += q * a;
        sum[r][1] += q * b;
      }
    }
    for (int r = 0; r < n; ++r) {
      A second_sum;
      reduce_add<A>(sum[r][0], sum[r][1], scores[r * kKeys + j], second_sum);
      if (j + 1 < to) scores[r * kKeys + j + 1] = second_sum;
    }
  }
}

// out[r] = rescale_r out[r] + sum_j weights[r][j] v_j
template <int kRows, typename T, typename A = acc_t<T>>
void add_values_in_place(const A* weights, const T* values, int64_t stride, int64_t Dv, int from, int to, A* out,
                         int64_t columns, const A* rescale) {
  constexpr int L = kLanes<A>, kVectors = 4;
  for (int64_t c = 0; c < Dv; c += kVectors * L) {
    Vec<A> sum[kRows][kVectors];
    int lanes[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left = Dv - c - v * L;
      lanes[v] = left >= L ? L : left > 0 ? static_cast<int>(left) : 0;
      for (int r = 0; r < kRows; ++r) {
        sum[r][v] = lanes[v] > 0 ? load(out + r * columns + c + v * L, Full{}) * rescale[r] : Vec<A>{};
      }
    }
    const auto run = [&](auto load_value) PYOPS_ALWAYS_INLINE {
      for (int j = from; j < to; ++j) {
        if (c == 0) prefetch_rows(values + (j + kRowsAhead) * stride, stride, 1, Dv);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const Vec<A> value = load_value(values + j * stride + c + v * L, v);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) sum[r][v] += splat(weights[r * kKeys + j]) * value;
        }
      }
    };
    if (lanes[kVectors - 1] == L) {
      run([](const T* at, int) PYOPS_ALWAYS_INLINE { return load(at, Full{}); });
    } else {
      run([&](const T* at, int v) PYOPS_ALWAYS_INLINE { return load(at, Partial{lanes[v]}); });
    }
    for (int v = 0; v < kVectors && lanes[v] > 0; ++v) {
      for (int r = 0; r < kRows; ++r) store(out + r * columns + c + v * L, sum[r][v], Full{});
    }
  }
}

// The state of the rows of one unit after a part of its keys.
template <typename T>
struct FewRows {
  using A = acc_t<T>;
  alignas(64) A max[round_up(kFewRows, kLanes<A>)];
  alignas(64) A sum[kFewRows * kLanes<A>];
};

template <typename T, typename A = acc_t<T>>
void forward_few(const AttentionFwdParams<T>& p, const Sequence& seq, int64_t hk, Range keys, bool has_sink,
                 FewRows<T>& state, A* out, A* queries) {
  constexpr int L = kLanes<A>;
  const int64_t columns = round_up(p.D, L), Vc = round_up(p.Dv, L);
  const int n = static_cast<int>(p.H / p.Hk * seq.L);
  QueryRow<T> rows[kFewRows];
  int64_t lo = seq.S, hi = 0;
  rows_of_unit(p, seq, hk, 0, n, rows, lo, hi);
  const A scale = p.scale * kLog2E<A>;
  for (int r = 0; r < n; ++r) {
    const T* q = at(p, p.q, p.q_stride, seq, seq.q_begin, rows[r].h, rows[r].i);
    for (int64_t c = 0; c < p.D; c += L) {
      const int left = static_cast<int>(p.D - c);
      store(queries + r * columns + c, (left >= L ? load(q + c, Full{}) : load(q + c, Partial{left})) * scale, Full{});
    }
    begin_row(p, rows[r].h, state.max[r], state.sum + r * L);
    if (!has_sink) {
      state.max[r] = -kInfinity<A>;
      store(state.sum + r * L, Vec<A>{}, Full{});
    }
  }
  __builtin_memset(out, 0, n * Vc * sizeof(A));
  lo = lo > keys.begin ? lo : keys.begin;
  hi = hi < keys.end ? hi : keys.end;
  alignas(64) A scores[kFewRows * kKeys];
  for (int64_t j0 = lo / kKeys * kKeys; j0 < hi; j0 += kKeys) {
    const int width = static_cast<int>(seq.S - j0 < kKeys ? seq.S - j0 : kKeys);
    StripView view;
    if (!view_strip(p, rows, n, j0, width, view)) continue;
    // Behind the last key: finish_scores hides it.
    for (int r = 0; r < n; ++r)
      __builtin_memset(scores + r * kKeys + view.last / L * L, 0, (view.hi - view.last / L * L) * sizeof(A));
    score_in_place(queries, n, columns, at(p, p.k, p.k_stride, seq, seq.k_begin, hk, j0), p.k_stride.l, p.D, view.lo,
                   view.last, scores);
    for (int r = 0; r < n; ++r) {
      if (has_plain_scores(p, rows[r], view, r)) continue;
      finish_scores<T>(p, seq, rows[r], view, r, j0, width, scores + r * kKeys, nullptr);
    }
    alignas(kVectorBytes) A rescale[round_up(kTileRows, L)];
    softmax(p, rows, n, view, j0, scores, scores, state.max, state.sum, rescale);
    const T* values = at(p, p.v, p.v_stride, seq, seq.k_begin, hk, j0);
    int r = 0;
    for (; r + 2 <= n; r += 2) {
      add_values_in_place<2>(scores + r * kKeys, values, p.v_stride.l, p.Dv, view.lo, view.last, out + r * Vc, Vc,
                             rescale + r);
    }
    if (r < n) {
      add_values_in_place<1>(scores + r * kKeys, values, p.v_stride.l, p.Dv, view.lo, view.last, out + r * Vc, Vc,
                             rescale + r);
    }
  }
}

// The parts of one unit's keys, put together in their order.
template <typename T, typename A = acc_t<T>>
void store_few(const AttentionFwdParams<T>& p, const Sequence& seq, int64_t hk, const FewRows<T>* parts, A* outs,
               int64_t count, int64_t out_size) {
  constexpr int L = kLanes<A>;
  const int64_t Vc = round_up(p.Dv, L);
  const int n = static_cast<int>(p.H / p.Hk * seq.L);
  QueryRow<T> rows[kFewRows];
  int64_t lo = seq.S, hi = 0;
  rows_of_unit(p, seq, hk, 0, n, rows, lo, hi);
  for (int r = 0; r < n; ++r) {
    A max = -kInfinity<A>, sum = 0;
    for (int64_t part = 0; part < count; ++part) max = parts[part].max[r] > max ? parts[part].max[r] : max;
    const A finite = max == -kInfinity<A> ? A(0) : max;
    A* total = outs + r * Vc;
    for (int64_t part = 0; part < count; ++part) {
      const A factor = exp2<A>(splat(parts[part].max[r] - finite))[0];
      sum += factor * reduce_add<A>(load(parts[part].sum + r * L, Full{}));
      const A* out = outs + part * out_size + r * Vc;
      for (int64_t c = 0; c < Vc; c += L) {
        store(total + c, (part > 0 ? load(total + c, Full{}) : Vec<A>{}) + load(out + c, Full{}) * factor, Full{});
      }
    }
    store_result(p, seq, rows[r], total, max, sum);
  }
}

template <typename T>
void forward_few(const AttentionFwdParams<T>& p, int threads) {
  using A = acc_t<T>;
  const int64_t units = p.B * p.Hk, out_size = kFewRows * round_up(p.Dv, kLanes<A>);
  const int64_t blocks = (p.max_k + kKeys - 1) / kKeys, wanted = (2 * threads + units - 1) / units;
  const int64_t parts = threads == 1 ? 1 : wanted < blocks ? wanted : blocks;
  Scratch<FewRows<T>> states(units * parts);
  Scratch<A> outs(units * parts * out_size);
  in_parallel(threads, [&](int thread, int count) {
    Scratch<A> queries(kFewRows * round_up(p.D, kLanes<A>));
    const Range tasks = share(units * parts, thread, count);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t unit = task / parts;
      const Sequence seq = sequence(p, unit / p.Hk);
      Range keys = share((seq.S + kKeys - 1) / kKeys, static_cast<int>(task % parts), static_cast<int>(parts));
      keys = {keys.begin * kKeys, keys.end * kKeys};
      const bool has_sink = task % parts == 0;  // it belongs to one part alone
      forward_few(p, seq, unit % p.Hk, keys, has_sink, states.get()[task], outs.get() + task * out_size, queries.get());
    }
    wait_for_all(count);
    const Range mine = share(units, thread, count);
    for (int64_t unit = mine.begin; unit < mine.end; ++unit) {
      store_few(p, sequence(p, unit / p.Hk), unit % p.Hk, states.get() + unit * parts,
                outs.get() + unit * parts * out_size, parts, out_size);
    }
  });
}

// How many blocks the rows of a unit are cut into.
struct RowBlocks {
  int64_t count, rows;
};

template <typename T>
RowBlocks row_blocks(const AttentionParams<T>& p, int threads) {
  const int64_t rows = p.H / p.Hk * p.max_q, units = p.B * p.Hk;
  int64_t count = (rows + kMostRows - 1) / kMostRows;
  // Enough blocks that the last ones to finish leave no thread waiting for long.
  if (threads > 1 && units * count < 4 * threads) {
    const int64_t wanted = (4 * threads + units - 1) / units, most = (rows + 4 * kTileRows - 1) / (4 * kTileRows);
    count = wanted < most ? wanted : most;
    if (count * kMostRows < rows) count = (rows + kMostRows - 1) / kMostRows;
  }
  const int64_t size = round_up((rows + count - 1) / count, kTileRows);
  return {(rows + size - 1) / size, size};
}

template <typename T>
void forward(const AttentionFwdParams<T>& p) {
  const int threads = attention_threads(p);
  const bool few = p.H / p.Hk * p.max_q <= kFewRows && p.max_k >= kManyKeys;
  if (few && !p.differentiated) return forward_few(p, threads);
  const RowBlocks blocks = row_blocks(p, threads);
  const int64_t tasks = p.B * p.Hk * blocks.count, group = p.H / p.Hk;
  int64_t next = 0;
  in_parallel(threads, [&](int, int) {
    ForwardScratch<T> scratch(p, static_cast<int>(blocks.rows));
    // Which thread takes a task changes nothing in its result. The last rows first: under a causal mask they are the
    // long ones.
    for (int64_t task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;) {
      const int64_t block = blocks.count - 1 - task / (p.B * p.Hk), unit = task % (p.B * p.Hk);
      const Sequence seq = sequence(p, unit / p.Hk);
      const int64_t begin = block * blocks.rows, rows = group * seq.L;
      const int64_t end = begin + blocks.rows < rows ? begin + blocks.rows : rows;
      if (begin < end) forward_rows(p, seq, unit % p.Hk, begin, end, scratch);
    }
  });
}

}  // namespace pyops::PYOPS_ISA
