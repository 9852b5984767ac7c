// Backward: the weights are computed again from the saved maximum and sum of each row; five products per tile. The
// products of inputs take the elements of the forward pass, so that scores are its scores to the bit. Weights and
// gradients of scores stay in the accumulation type: rounded to bf16 they cost dq two thirds of its accuracy
// (bench/notes/attention.md).
#pragma once
#include "attention_rows.h"

namespace pyops::PYOPS_ISA {

constexpr int kQueries = 8 * kTileRows;  // against one key block at a time

// The units (sequence, key head) that add to the same elements of dmask, which one thread therefore visits in turn;
// without dmask every unit is a group of its own.
template <typename T>
struct Groups {
  explicit Groups(const AttentionBwdParams<T>& p) : Hk(p.Hk) {
    over_b = p.dmask != nullptr && p.dmask_stride[0] == 0;
    over_h = p.dmask != nullptr && p.dmask_stride[1] == 0;
    count = (over_b ? 1 : p.B) * (over_h ? 1 : p.Hk);
    size = p.B * p.Hk / count;
  }
  struct Unit {
    int64_t b, hk;
  };
  Unit unit(int64_t group, int64_t member) const {
    if (over_b && over_h) return {member / Hk, member % Hk};
    if (over_b) return {member, group};
    if (over_h) return {group, member};
    return {group / Hk, group % Hk};
  }
  int64_t Hk, count, size;
  bool over_b, over_h;
};

// How the (group, key block) pairs are dealt out: a contiguous part for each thread, by the work in them. A group whose
// blocks lie in several parts has its dq summed from one partial sum of each, in the order of the parts.
template <typename T>
class Deal {
 public:
  Deal(const AttentionBwdParams<T>& p, const Groups<T>& groups, int parts, int64_t* begins)
      : p_(p), groups_(groups), blocks_((p.max_k + kKeys - 1) / kKeys), begins_(begins) {
    const int64_t pairs = groups.count * blocks_;
    double total = 0, done = 0;
    for (int64_t pair = 0; pair < pairs; ++pair) total += work(pair);
    int part = 0;
    begins[0] = 0;
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const double w = work(pair);
      while (part + 1 < parts && done + w / 2 >= total * (part + 1) / parts) begins[++part] = pair;
      done += w;
    }
    while (part < parts) begins[++part] = pairs;
  }

  int64_t begin(int part) const { return begins_[part]; }
  int64_t end(int part) const { return begins_[part + 1]; }
  int64_t group(int64_t pair) const { return pair / blocks_; }
  int64_t block(int64_t pair) const { return pair % blocks_; }
  int64_t blocks() const { return blocks_; }
  // Whether all of a group lies in this part.
  bool is_whole(int64_t group, int part) const {
    return begin(part) <= group * blocks_ && end(part) >= (group + 1) * blocks_;
  }

 private:
  // Queries that see the block, roughly; the fixed part stands for packing.
  double work(int64_t pair) const {
    double sum = 0;
    const int64_t j0 = block(pair) * kKeys;
    for (int64_t m = 0; m < groups_.size; ++m) {
      const auto unit = groups_.unit(group(pair), m);
      const Sequence s = sequence(p_, unit.b);
      const int64_t j1 = j0 + kKeys < s.S ? j0 + kKeys : s.S;
      if (j0 >= j1) continue;
      const int64_t middle = (j0 + j1) / 2;
      int64_t from = p_.right < 0 ? 0 : middle - p_.right - s.offset,
              to = p_.left < 0 ? s.L : middle + p_.left - s.offset + 1;
      from = from < 0 ? 0 : from;
      to = to > s.L ? s.L : to;
      sum += static_cast<double>(j1 - j0) * (16 + (to > from ? to - from : 0));
    }
    return sum + 1;
  }

  const AttentionBwdParams<T>& p_;
  const Groups<T>& groups_;
  int64_t blocks_;
  int64_t* begins_;
};

// Zeros for the columns of a key block in all rows of a group's dmask.
template <typename T>
void clear_dmask(const AttentionBwdParams<T>& p, typename Groups<T>::Unit unit, const Groups<T>& groups, int64_t j0) {
  using A = acc_t<T>;
  const int64_t heads = groups.over_h ? 1 : p.H / p.Hk, queries = p.dmask_stride[2] == 0 ? 1 : p.max_q;
  const int64_t width = p.max_k - j0 < kKeys ? p.max_k - j0 : kKeys;
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t i = 0; i < queries; ++i) {
      A* row = p.dmask + unit.b * p.dmask_stride[0] + (unit.hk * (p.H / p.Hk) + h) * p.dmask_stride[1] +
               i * p.dmask_stride[2] + j0;
      __builtin_memset(row, 0, width * sizeof(A));
    }
  }
}

// Rows [begin, end) of a unit's dq from their sums.
template <typename T>
void store_dq(const AttentionBwdParams<T>& p, const Sequence& seq, int64_t hk, int64_t begin, int64_t end,
              const acc_t<T>* sums, int64_t columns) {
  for (int64_t r = begin; r < end; ++r) {
    const int64_t h = hk * (p.H / p.Hk) + r / seq.L, i = r % seq.L;
    store_row(at(p, p.dq, p.dq_stride, seq, seq.q_begin, h, i), sums + r * columns, p.D, p.scale);
  }
}

template <typename T>
struct BackwardScratch {
  using A = acc_t<T>;
  using E = Element<T>;
  static constexpr int kStep = kStripStep<A>;
  static constexpr int kStrips = kQueries / kTileRows;

  explicit BackwardScratch(const AttentionParams<T>& p)
      : d_panels((p.D + kPanel<A> - 1) / kPanel<A>),
        v_panels((p.Dv + kPanel<A> - 1) / kPanel<A>),
        d_columns(round_up(p.D, kLanes<A>)),
        v_columns(round_up(p.Dv, kLanes<A>)),
        d_steps(round_up(steps_of<E>(p.D), kLanes<A>)),
        v_steps(round_up(steps_of<E>(p.Dv), kLanes<A>)),
        keys_t(d_steps * kKeys),
        values_t(v_steps * kKeys),
        keys(d_panels * kKeys * kPanel<A>),
        dk(round_up(kKeys, kTileRows) * d_columns),
        dv(round_up(kKeys, kTileRows) * v_columns),
        queries_t(kStrips * d_steps * kStep),
        douts_t(kStrips * v_steps * kStep),
        queries(d_panels * kQueries * kPanel<A>),
        douts(v_panels * kQueries * kPanel<A>),
        weights(kQueries * kKeys + kTileRows),
        dscores(kQueries * kKeys + kTileRows) {}

  int64_t d_panels, v_panels, d_columns, v_columns, d_steps, v_steps;
  Scratch<E> keys_t, values_t;  // of the key block
  Scratch<A> keys, dk, dv;
  Scratch<E> queries_t, douts_t;  // of the query block
  Scratch<A> queries, douts;
  Scratch<A> weights, dscores;  // of both
  Scratch<QueryRow<T>> rows{kQueries};
};

// A strip of weights and of gradients of the scores, from raw scores and dout . v, in place. Columns outside of the
// view become 0.
template <bool kDrop, typename T, typename A = acc_t<T>>
PYOPS_INLINE void differentiate_strip(const AttentionBwdParams<T>& p, const Sequence& seq, const QueryRow<T>* rows,
                                      int n, const StripView& view, int64_t j0, int width, const A* delta, A* weights,
                                      A* dscores) {
  constexpr int L = kLanes<A>;
  alignas(64) uint32_t keep[kKeys + 4 * L];
  alignas(64) A factors[kKeys];
  for (int r = 0; r < n; ++r) {
    A* s = weights + r * kKeys;
    A* d = dscores + r * kKeys;
    if (!has_plain_scores(p, rows[r], view, r)) {
      finish_scores<T>(p, seq, rows[r], view, r, j0, width, s, factors);
    }
    const A total = p.stats[stats_rows(p) + rows[r].row];
    A m = p.stats[rows[r].row];
    if (total == 0) m = 0;  // a row that sees nothing: all its scores are -inf
    const A inverse = total == 0 ? A(0) : A(1) / total;
    if constexpr (kDrop) {
      dropout_row(keep + view.lo, p.seed, rows[r].row, view.hi - view.lo, p.drop_threshold, j0 + view.lo);
    }
    const auto weight_of = [&](int c) PYOPS_ALWAYS_INLINE { return exp2<A>(load(s + c, Full{}) - m) * inverse; };
    const auto drop = [&](int c, Vec<A> v) PYOPS_ALWAYS_INLINE {
      if constexpr (!kDrop) return v;
      auto kept = load_mask(keep + c, A{});
      return bit_cast<Vec<A>>(bit_cast<decltype(kept)>(v * p.dropout_scale) & kept);
    };
    if (rows[r].lo >= j0 && rows[r].hi <= j0 + width) {
      // All that the row sees lies here: delta = sum_j P_ij dP_ij, whose rounding cancels that of dP_ij.
      Vec<A> sum{};
      for (int c = view.lo; c < view.hi; c += L) {
        const Vec<A> weight = weight_of(c), dweight = drop(c, load(d + c, Full{}));
        sum += weight * dweight;
        store(s + c, weight, Full{});
        store(d + c, dweight, Full{});
      }
      const A correction = reduce_add<A>(sum) - (p.dlse != nullptr ? p.dlse[rows[r].row] : A(0));
      for (int c = view.lo; c < view.hi; c += L) {
        const Vec<A> weight = load(s + c, Full{});
        store(s + c, drop(c, weight), Full{});
        store(d + c, weight * (load(d + c, Full{}) - correction), Full{});
      }
    } else {
      const A correction = delta[rows[r].row];
      for (int c = view.lo; c < view.hi; c += L) {
        const Vec<A> weight = weight_of(c);
        store(s + c, drop(c, weight), Full{});
        store(d + c, weight * (drop(c, load(d + c, Full{})) - correction), Full{});
      }
    }
    if (p.dmask != nullptr && view.from[r] < view.to[r]) {
      A* sum = p.dmask + seq.b * p.dmask_stride[0] + rows[r].h * p.dmask_stride[1] + rows[r].i * p.dmask_stride[2] + j0;
      for (int c = view.from[r] / L * L; c < view.to[r]; c += L) {
        const int lanes = width - c;
        const Vec<A> bias = load_bias<T>(rows[r].mask, p.mask_kind, j0 + c, lanes);
        const Vec<A> gradient = bias == kInfinity<A> ? Vec<A>{} : load(d + c, Full{});
        if (lanes >= L) {
          store(sum + c, load(sum + c, Full{}) + gradient, Full{});
        } else {
          store(sum + c, load(sum + c, Partial{lanes}) + gradient, Partial{lanes});
        }
      }
    }
    if (p.softcap > 0) {
      for (int c = view.lo; c < view.hi; c += L) store(d + c, load(d + c, Full{}) * load(factors + c, Full{}), Full{});
    }
    __builtin_memset(s, 0, view.lo * sizeof(A));
    __builtin_memset(d, 0, view.lo * sizeof(A));
    __builtin_memset(s + view.hi, 0, (kKeys - view.hi) * sizeof(A));
    __builtin_memset(d + view.hi, 0, (kKeys - view.hi) * sizeof(A));
  }
}

// One key block of one unit: dk and dv of it, and what it adds to dq (rows of the unit).
template <typename T>
void backward_block(const AttentionBwdParams<T>& p, const Sequence& seq, int64_t hk, int64_t j0, const acc_t<T>* delta,
                    acc_t<T>* dq, BackwardScratch<T>& scratch) {
  using A = acc_t<T>;
  using E = Element<T>;
  constexpr int kStep = kStripStep<A>;
  const int width = static_cast<int>(seq.S - j0 < kKeys ? seq.S - j0 : kKeys);
  const int64_t Dc = scratch.d_columns, Vc = scratch.v_columns, Ds = scratch.d_steps, Vs = scratch.v_steps;
  const A scale = p.scale * kLog2E<A>;
  const bool need_dv = p.dv != nullptr, need_dk = p.dk != nullptr, need_dq = p.dq != nullptr;
  const auto key = [&](int j) { return at(p, p.k, p.k_stride, seq, seq.k_begin, hk, j0 + j); };
  const auto value = [&](int j) { return at(p, p.v, p.v_stride, seq, seq.k_begin, hk, j0 + j); };
  pack_transposed<kPanel<E>, E, T>(key, width, p.D, A(1), scratch.keys_t.get(), Ds * kPanel<E>);
  pack_transposed<kPanel<E>, E, T>(value, width, p.Dv, A(1), scratch.values_t.get(), Vs * kPanel<E>);
  if (need_dq) pack_rows<A, T>(key, width, p.D, scratch.keys.get(), kKeys * kPanel<A>);
  const int key_rows = static_cast<int>(round_up(width, kTileRows));
  __builtin_memset(scratch.dk.get(), 0, key_rows * Dc * sizeof(A));
  __builtin_memset(scratch.dv.get(), 0, key_rows * Vc * sizeof(A));

  QueryRow<T>* rows = scratch.rows.get();
  A *weights = scratch.weights.get(), *dscores = scratch.dscores.get();
  const int64_t unit_rows = p.H / p.Hk * seq.L;
  for (int64_t begin = 0; begin < unit_rows; begin += kQueries) {
    const int64_t end = begin + kQueries < unit_rows ? begin + kQueries : unit_rows;
    const int n = static_cast<int>(end - begin);
    int64_t lo = seq.S, hi = 0;
    rows_of_unit(p, seq, hk, begin, end, rows, lo, hi);
    if (hi <= j0 || lo >= j0 + width) continue;
    const auto query = [&](int r) { return at(p, p.q, p.q_stride, seq, seq.q_begin, rows[r].h, rows[r].i); };
    const auto dout = [&](int r) { return at(p, p.dout, p.dout_stride, seq, seq.q_begin, rows[r].h, rows[r].i); };
    StripView views[BackwardScratch<T>::kStrips];
    bool sees[BackwardScratch<T>::kStrips], any = false;
    const int strips = (n + kTileRows - 1) / kTileRows;
    for (int strip = 0; strip < strips; ++strip) {
      const int first = strip * kTileRows, count = n - first < kTileRows ? n - first : kTileRows;
      StripView& view = views[strip];
      A *s = weights + first * kKeys, *d = dscores + first * kKeys;
      sees[strip] = view_strip(p, rows + first, count, j0, width, view);
      if (!sees[strip]) {
        // Between strips that see the block it takes part in the products over the queries.
        __builtin_memset(s, 0, count * kKeys * sizeof(A));
        __builtin_memset(d, 0, count * kKeys * sizeof(A));
      } else {
        any = true;
        prefetch_mask(p, rows + first + count, n - first - count, j0, width);
        E *q = scratch.queries_t.get() + strip * Ds * kStep, *g = scratch.douts_t.get() + strip * Vs * kStep;
        pack_transposed<kStep, E, T>([&](int r) { return query(first + r); }, count, p.D, scale, q, 0);
        pack_transposed<kStep, E, T>([&](int r) { return dout(first + r); }, count, p.Dv, A(1), g, 0);
        multiply<Into::product, 1, kStep>(count, q, scratch.keys_t.get() + view.lo * Ds, Ds * kPanel<E>,
                                          static_cast<int>(steps_of<E>(p.D)), s + view.lo, int64_t{kKeys},
                                          view.hi - view.lo, is_pair<E> ? &scale : nullptr);
        multiply<Into::product, 1, kStep>(count, g, scratch.values_t.get() + view.lo * Vs, Vs * kPanel<E>,
                                          static_cast<int>(steps_of<E>(p.Dv)), d + view.lo, int64_t{kKeys},
                                          view.hi - view.lo);
        if (p.seed == nullptr) {
          differentiate_strip<false, T>(p, seq, rows + first, count, view, j0, width, delta, s, d);
        } else {
          differentiate_strip<true, T>(p, seq, rows + first, count, view, j0, width, delta, s, d);
        }
      }
      if (need_dq && sees[strip]) {
        multiply<Into::add, kKeys, 1>(count, d + view.lo, scratch.keys.get() + view.lo * kPanel<A>,
                                      int64_t{kKeys} * kPanel<A>, view.last - view.lo, dq + (begin + first) * Dc, Dc,
                                      static_cast<int>(Dc));
      }
    }
    if (!any) continue;
    if (need_dk) pack_rows<A, T>(query, n, p.D, scratch.queries.get(), kQueries * kPanel<A>);
    if (need_dv) pack_rows<A, T>(dout, n, p.Dv, scratch.douts.get(), kQueries * kPanel<A>);
    for (int j = 0; j < width; j += kTileRows) {
      const int count = width - j < kTileRows ? width - j : kTileRows;
      int from = 0, to = strips;  // the strips that see one of these keys
      while (from < to && !(sees[from] && views[from].lo < j + count && views[from].last > j)) ++from;
      while (to > from && !(sees[to - 1] && views[to - 1].lo < j + count && views[to - 1].last > j)) --to;
      if (from == to) continue;
      const int first = from * kTileRows, last = to * kTileRows < n ? to * kTileRows : n;
      const int64_t a = int64_t{first} * kKeys + j, b = first * kPanel<A>;
      if (need_dv) {
        multiply<Into::add, 1, kKeys>(count, weights + a, scratch.douts.get() + b, kQueries * kPanel<A>, last - first,
                                      scratch.dv.get() + j * Vc, Vc, static_cast<int>(Vc));
      }
      if (need_dk) {
        multiply<Into::add, 1, kKeys>(count, dscores + a, scratch.queries.get() + b, kQueries * kPanel<A>, last - first,
                                      scratch.dk.get() + j * Dc, Dc, static_cast<int>(Dc));
      }
    }
  }
  for (int j = 0; j < width; ++j) {
    if (need_dk) {
      store_row(at(p, p.dk, p.dk_stride, seq, seq.k_begin, hk, j0 + j), scratch.dk.get() + j * Dc, p.D, p.scale);
    }
    if (need_dv) {
      store_row(at(p, p.dv, p.dv_stride, seq, seq.k_begin, hk, j0 + j), scratch.dv.get() + j * Vc, p.Dv, A(1));
    }
  }
}

// delta_i = dout_i . (out_i + residue_i) - dlse_i of the rows of a unit, for those whose keys lie in several blocks.
// Added up in the order of the products dout . v: where one key has all of the weight, the difference is exactly 0.
template <typename T>
void store_delta(const AttentionBwdParams<T>& p, const Sequence& seq, int64_t hk, acc_t<T>* delta) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  if (seq.S <= kKeys) return;
  const int64_t size = round_up(p.Dv, L) * L;
  Scratch<A> douts(size), outs(size), residues(p.residue == nullptr ? 0 : size);
  for (int64_t h = hk * (p.H / p.Hk); h < (hk + 1) * (p.H / p.Hk); ++h) {
    for (int64_t i = 0; i < seq.L; i += L) {
      const int count = static_cast<int>(seq.L - i < L ? seq.L - i : L);
      const auto pack = [&](const T* data, const AttentionStrides& stride, A* to) {
        const auto row = [&](int r) { return at(p, data, stride, seq, seq.q_begin, h, i + r); };
        pack_transposed<L, A, T>(row, count, p.Dv, A(1), to, 0);
      };
      pack(p.dout, p.dout_stride, douts.get());
      pack(p.out, p.out_stride, outs.get());
      if (p.residue != nullptr) pack(p.residue, p.residue_stride, residues.get());
      Vec<A> sum{};
      for (int64_t c = 0; c < p.Dv; ++c) {
        Vec<A> value = load(outs.get() + c * L, Full{});
        if (p.residue != nullptr) value += load(residues.get() + c * L, Full{});
        sum += load(douts.get() + c * L, Full{}) * value;
      }
      alignas(kVectorBytes) A sums[L];
      store(sums, sum, Full{});
      for (int r = 0; r < count; ++r) {
        const int64_t row = query_row(p, seq, h, i + r).row;
        delta[row] = sums[r] - (p.dlse != nullptr ? p.dlse[row] : A(0));
      }
    }
  }
}

template <typename T>
void backward(const AttentionBwdParams<T>& p) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  const int parts = attention_threads(p);
  const Groups<T> groups(p);
  Scratch<int64_t> begins(parts + 1);
  const Deal<T> deal(p, groups, parts, begins.get());
  const int64_t heads = p.H / p.Hk, Dc = round_up(p.D, L), units = p.B * p.Hk;
  const int64_t group_rows = groups.size * round_up(heads * p.max_q, kTileRows);
  Scratch<A> delta(stats_rows(p));
  // The dq of a group in the making: of each part's first group and of its later ones.
  Scratch<A> sums(p.dq == nullptr ? 0 : 2 * parts * group_rows * Dc);
  const auto sum_of = [&](int part, int64_t group) {
    const bool first = group == deal.group(deal.begin(part));
    return sums.get() + (2 * part + (first ? 0 : 1)) * group_rows * Dc;
  };
  const auto rows_of = [&](int64_t group, int64_t member) {
    return heads * sequence(p, groups.unit(group, member).b).L;
  };
  const auto begin_of = [&](int64_t member) { return member * (group_rows / groups.size); };

  in_parallel(parts, [&](int thread, int count) {
    const Range share_of_units = share(units, thread, count);
    for (int64_t unit = share_of_units.begin; unit < share_of_units.end; ++unit) {
      store_delta(p, sequence(p, unit / p.Hk), unit % p.Hk, delta.get());
    }
    wait_for_all(count);
    BackwardScratch<T> scratch(p);
    for (int part = thread; part < parts; part += count) {  // the team may be smaller than asked for
      int64_t current = -1;
      for (int64_t pair = deal.begin(part); pair < deal.end(part); ++pair) {
        const int64_t group = deal.group(pair), j0 = deal.block(pair) * kKeys;
        A* dq = p.dq == nullptr ? nullptr : sum_of(part, group);
        for (int64_t m = 0; group != current && dq != nullptr && m < groups.size; ++m) {
          __builtin_memset(dq + begin_of(m) * Dc, 0, rows_of(group, m) * Dc * sizeof(A));
        }
        current = group;
        if (p.dmask != nullptr) clear_dmask(p, groups.unit(group, 0), groups, j0);
        for (int64_t m = 0; m < groups.size; ++m) {
          const auto unit = groups.unit(group, m);
          const Sequence seq = sequence(p, unit.b);
          if (j0 < seq.S) {
            backward_block(p, seq, unit.hk, j0, delta.get(), dq == nullptr ? nullptr : dq + begin_of(m) * Dc, scratch);
          }
        }
        if (dq == nullptr || !deal.is_whole(group, part) || deal.block(pair) + 1 < deal.blocks()) continue;
        for (int64_t m = 0; m < groups.size; ++m) {
          const auto unit = groups.unit(group, m);
          store_dq(p, sequence(p, unit.b), unit.hk, 0, rows_of(group, m), dq + begin_of(m) * Dc, Dc);
        }
      }
    }
    if (p.dq == nullptr || parts == 1) return;
    wait_for_all(count);
    // Groups that several parts share: their sums are added up where the first of them lies.
    for (int first = 0; first < parts; ++first) {
      if (deal.begin(first) == deal.end(first)) continue;
      const int64_t group = deal.group(deal.end(first) - 1);
      const bool begins_here = deal.begin(first) <= group * deal.blocks();
      if (!begins_here || deal.is_whole(group, first)) continue;
      for (int64_t m = 0; m < groups.size; ++m) {
        const auto unit = groups.unit(group, m);
        const Range mine = share(rows_of(group, m), thread, count);
        A* to = sum_of(first, group) + begin_of(m) * Dc;
        for (int other = first + 1; other < parts; ++other) {
          if (deal.begin(other) == deal.end(other)) continue;
          if (deal.group(deal.begin(other)) != group) break;
          const A* from = sum_of(other, group) + begin_of(m) * Dc;
          for (int64_t c = mine.begin * Dc; c < mine.end * Dc; c += L) {
            store(to + c, load(to + c, Full{}) + load(from + c, Full{}), Full{});
          }
        }
        store_dq(p, sequence(p, unit.b), unit.hk, mine.begin, mine.end, to, Dc);
      }
    }
  });
}

}  // namespace pyops::PYOPS_ISA
