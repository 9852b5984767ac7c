// Backward: the steps in the opposite order. A tile forms dh = dy + dp' W_hh of the step that came before, then the
// gradients of its units' gates, which go out as dgx and, packed, to the next tile. Gradients of W_hh are one product
// over all steps afterwards, outside of the kernel.
#pragma once
#include "recurrent_steps.h"

namespace pyops::PYOPS_ISA {

// Of a row that was normalised: its mean and rstd, and the means of the gradient of the result and of that times xhat.
template <typename A>
struct RowNorm {
  A mean, rstd, of_d, of_d_xhat;
};

template <typename T, RecurrentCell kFamily>
struct BackwardMemory {
  using A = acc_t<T>;
  using E = Element<T>;
  static constexpr int kMost = kGates<kFamily>, U = kUnits<T>;
  // Sums over rows: for biases, peepholes, the norm of the gates and that of the cell.
  static constexpr int kOfPeepholes = kSaved<kFamily>, kOfGates = kOfPeepholes + (kHasCells<kFamily> ? kMost - 1 : 0);
  static constexpr int kOfCell = kOfGates + kMost, kSums = kOfCell + (kHasCells<kFamily> ? 2 : 0);

  BackwardMemory(const RecurrentBwdParams<T>& p, const Division& division)
      : G(gates_of<kFamily>(p.cell)),
        single(p.B == 1),
        normalised(p.direction[0].ln_gates != nullptr),
        projected(p.direction[0].w_hr != nullptr),
        most_rows(division.most_rows),
        strip_rows(division.strip_rows),
        strips(division.strips),
        units((p.H + U - 1) / U),
        width(units * U),
        outputs((p.P + U - 1) / U, G * width, single),
        inputs(projected ? Blocks<T>(units, p.P, single) : Blocks<T>(0, 0, true)),
        weights(p.directions * outputs.count * outputs.panel),
        projections(p.directions * inputs.count * inputs.panel),
        dp(division.teams * 2 * strips * outputs.strip),
        dm(division.teams * strips * inputs.strip),
        dp_row(single ? p.directions * 2 * outputs.row : 0),
        dm_row(single && projected ? p.directions * inputs.row : 0),
        product_row(single ? p.directions * 2 * (outputs.count > units ? outputs.count : units) * U : 0),
        direct(division.teams * most_rows * outputs.count * U),
        dc(kHasCells<kFamily> ? division.teams * most_rows * width : 0),
        d(normalised ? division.teams * most_rows * width * G : 0),
        seen(normalised && kHasCells<kFamily> ? division.teams * most_rows * width * 3 : 0),
        norms(normalised ? division.teams * most_rows : 0),
        sums(division.teams * kSums * 2 * width),
        meetings(division.teams) {
    __builtin_memset(meetings.get(), 0, division.teams * sizeof(Meeting));
    __builtin_memset(sums.get(), 0, division.teams * kSums * 2 * width * sizeof(A));
    used_sums = normalised ? kSums : p.dpeephole[0] != nullptr ? kOfGates : kOfPeepholes;
  }

  int G;
  bool single, normalised, projected;
  int64_t most_rows;
  int strip_rows;
  int64_t strips, units, width;
  int used_sums;
  Blocks<T> outputs;          // of W_hh: columns of h
  Blocks<T> inputs;           // of W_hr: columns of m
  Scratch<E> weights;         // [directions, outputs.count, outputs.panel]
  Scratch<E> projections;     // [directions, inputs.count, inputs.panel]
  Scratch<E> dp;              // [teams, 2, strips, outputs.strip] of even and of odd steps
  Scratch<E> dm;              // [teams, strips, inputs.strip] what goes through W_hr
  Scratch<A> dp_row;          // [directions, 2, outputs.row] the same of a single sequence
  Scratch<A> dm_row;          // [directions, inputs.row]
  Scratch<A> product_row;     // [directions, 2, columns] dp W_hh, and dm W_hr
  Scratch<A> direct;          // [teams, most_rows, columns] what reaches the last h past the product
  Scratch<A> dc;              // [teams, most_rows, width]
  Scratch<A> d;               // [teams, most_rows, units, G, U] gradients before the norm of the gates
  Scratch<A> seen;            // [teams, most_rows, units, 3, U] c', the gradient of its norm's result, that of m
  Scratch<RowNorm<A>> norms;  // [teams, most_rows]
  Scratch<A> sums;            // [teams, kSums, 2, width] over rows, and what they lack
  Scratch<Meeting> meetings;
};

// Packs block i of all that belong to the directions: columns of W_hh, then of W_hr.
template <typename T, RecurrentCell kFamily>
void pack_weights(const RecurrentBwdParams<T>& p, BackwardMemory<T, kFamily>& m, int64_t i) {
  using E = Element<T>;
  constexpr int U = kUnits<T>;
  const auto pack = [](const T* matrix, int64_t row, int64_t rows, int64_t columns, int64_t u0, E* to) {
    pack_rows<E, T>([&](int j) { return matrix + j * row + u0; }, static_cast<int>(rows),
                    columns - u0 < U ? columns - u0 : U, to, 0);
  };
  if (i < p.directions * m.outputs.count) {
    const RecurrentDirection<T>& w = p.direction[i / m.outputs.count];
    E* to = m.weights.get() + i * m.outputs.panel;
    __builtin_memset(to, 0, m.outputs.panel * sizeof(E));
    for (int g = 0; g < m.G; ++g) {
      pack(w.w_hh + g * p.H * w.w_hh_row, w.w_hh_row, p.H, p.P, i % m.outputs.count * U,
           to + g * steps_of<E>(m.width) * kPanel<E>);
    }
  } else {
    i -= p.directions * m.outputs.count;
    const RecurrentDirection<T>& w = p.direction[i / m.inputs.count];
    E* to = m.projections.get() + i * m.inputs.panel;
    __builtin_memset(to, 0, m.inputs.panel * sizeof(E));
    pack(w.w_hr, w.w_hr_row, p.P, p.H, i % m.inputs.count * U, to);
  }
}

// products[begin, end) = sum over j < rows of d[j] matrix[j], from the matrix as it lies; added to what is there.
template <typename T>
__attribute__((noinline)) void add_rows(const T* matrix, int64_t row, int64_t rows, const acc_t<T>* d, int64_t begin,
                                        int64_t end, acc_t<T>* products) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>, kRows = 4;
  const auto column = [&](int64_t j, int64_t c, auto lanes) PYOPS_ALWAYS_INLINE {
    Vec<A> sum = load(products + c, lanes);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      if (j + i < rows) sum += load(matrix + (j + i) * row + c, lanes) * d[j + i];
    }
    store(products + c, sum, lanes);
  };
  for (int64_t j = 0; j < rows; j += kRows) {
    int64_t c = begin;
    for (; c + L <= end; c += L) column(j, c, Full{});
    if (c < end) column(j, c, Partial{static_cast<int>(end - c)});
  }
}

template <typename T, RecurrentCell kFamily>
class BackwardTeam {
  using A = acc_t<T>;
  using E = Element<T>;
  using Memory = BackwardMemory<T, kFamily>;
  static constexpr int kMost = kGates<kFamily>, U = kUnits<T>, L = kLanes<A>;

  // A sequence, and where it stands: it has had a step after t (`visited`), and has step t (`active`) or is done.
  struct Place {
    int64_t b, state;
    bool visited, active;
    bool cut;  // h and c were cleared before the step visited last
    int64_t n = 0;
    bool reset = false;
    int64_t before = -1;         // the row of the step to be visited next
    const T* h = nullptr;        // that the step began with; null: 0
    const A* c = nullptr;        // and c, within the sequence
    const T* c_start = nullptr;  // or at its beginning; null: 0
  };
  using Norm = RowNorm<A>;

 public:
  BackwardTeam(const RecurrentBwdParams<T>& p, Memory& memory, const Team& team)
      : p_(p),
        w_(p.direction[team.d]),
        G(memory.G),
        S(saved_of<kFamily>(p.cell)),
        of_g_(G - 2),
        of_o_(G - 1),
        coupled_(p.cell == RecurrentCell::coupled),
        m_(memory),
        team_(team),
        walk_(p, team_),
        units_(share(m_.units, team.index, team.threads)),
        outputs_(share(m_.outputs.count, team.index, team.threads)) {}

  void run() {
    int before = 0;  // sequences that had a step when the last one was visited
    for (int64_t s = p_.T_; s >= 0; --s) {
      // Below the first step: what is left of dh and dc belongs to h0 and c0.
      const int64_t t = s > 0 ? walk_.step(s - 1) : -1;
      const int active = s > 0 ? walk_.active(t) : 0, most = active > before ? active : before, parity = s % 2;
      if (m_.single && before > 0) multiply_dp(parity);
      for_each_tile(outputs_, most, before, active,
                    [&](int64_t k, int r, int visited, int of) { outputs_tile(t, parity, k, r, visited, of); });
      if (m_.projected) {
        team_.wait();
        if (m_.single && active > 0) multiply_dm();
        for_each_tile(units_, most, before, active,
                      [&](int64_t k, int r, int visited, int of) { units_tile(t, parity, k, r, visited, of); });
      }
      if (m_.normalised) {
        if constexpr (kHasCells<kFamily>) {
          for_each_row(active, [&](int r) { find_cell_norm(r); });
          for_each_tile(units_, active, before, active,
                        [&](int64_t k, int r, int visited, int of) { cell_tile(t, k, r, visited, of); });
          for_each_row(active, [&](int r) { find_cell_gradient(r); });
          for_each_tile(units_, active, before, active,
                        [&](int64_t k, int r, int visited, int of) { normalised_tile(t, k, r, visited, of); });
        }
        for_each_row(active, [&](int r) { find_gates_norm(t, r); });
        for_each_tile(units_, active, before, active,
                      [&](int64_t k, int r, int, int of) { gates_tile(t, parity, k, r, of); });
      }
      before = active;
      team_.wait();
    }
  }

 private:
  static int clamp(int64_t n, int most) { return n < 0 ? 0 : n < most ? static_cast<int>(n) : most; }
  template <typename F>
  PYOPS_INLINE void for_each_tile(Range blocks, int rows, int visited, int active, F&& f) {
    const int group = kGroup * m_.strip_rows;
    for (int64_t k = blocks.begin; k < blocks.end; ++k) {
      for (int r = 0; r < rows; r += group) {
        const int end = clamp(rows - r, group);
        f(k, r, clamp(visited - r, end), clamp(active - r, end));
      }
    }
  }
  // What is known of whole rows, once for all blocks: after all that was before, and before all that follows.
  template <typename F>
  void for_each_row(int rows, F&& f) {
    team_.wait();
    for (int r = team_.index; r < rows; r += team_.threads) f(r);
    team_.wait();
  }
  Norm& norm_of(int r) { return m_.norms.get()[team_.slot * m_.most_rows + r]; }
  E* dp_strip(int parity, int r) {
    return m_.dp.get() + ((team_.slot * 2 + parity) * m_.strips + r / m_.strip_rows) * m_.outputs.strip;
  }
  E* dm_strip(int r) { return m_.dm.get() + (team_.slot * m_.strips + r / m_.strip_rows) * m_.inputs.strip; }
  A* dp_row(int parity) { return m_.dp_row.get() + (team_.d * 2 + parity) * m_.outputs.row; }
  A* dm_row() { return m_.dm_row.get() + team_.d * m_.inputs.row; }
  A* product_row(int which) {
    const int64_t columns = m_.outputs.count > m_.units ? m_.outputs.count : m_.units;
    return m_.product_row.get() + (team_.d * 2 + which) * columns * U;
  }
  A* direct_of(int r) { return m_.direct.get() + (team_.slot * m_.most_rows + r) * m_.outputs.count * U; }
  A* dc_of(int r) { return m_.dc.get() + (team_.slot * m_.most_rows + r) * m_.width; }
  A* d_of(int64_t k, int r) { return m_.d.get() + ((team_.slot * m_.most_rows + r) * m_.units + k) * G * U; }
  A* seen_of(int64_t k, int r) { return m_.seen.get() + ((team_.slot * m_.most_rows + r) * m_.units + k) * 3 * U; }

  // Of a single sequence, for the team's columns.
  void multiply_dp(int parity) {
    const int64_t begin = outputs_.begin * U, last = outputs_.end * U, end = last < p_.P ? last : p_.P;
    A* const products = product_row(0);
    for (int64_t c = begin; c < last; ++c) products[c] = 0;
    for (int g = 0; g < G; ++g) {
      add_rows(w_.w_hh + g * p_.H * w_.w_hh_row, w_.w_hh_row, p_.H, dp_row(parity) + g * m_.width, begin, end,
               products);
    }
  }
  void multiply_dm() {
    const int64_t begin = units_.begin * U, last = units_.end * U, end = last < p_.H ? last : p_.H;
    A* const products = product_row(1);
    for (int64_t c = begin; c < last; ++c) products[c] = 0;
    add_rows(w_.w_hr, w_.w_hr_row, p_.P, dm_row(), begin, end, products);
  }

  Place place(int64_t t, int r, bool visited, bool active) const {
    Place at;
    at.b = team_.sequence(r);
    at.state = team_.d * p_.B + at.b;
    at.visited = visited;
    at.active = active;
    const int64_t later = !visited ? -1 : active ? (walk_.reverse ? t - 1 : t + 1) : walk_.first_step(at.b);
    at.cut = visited && walk_.resets(walk_.row(later, at.b));
    if (!active) return at;
    at.n = walk_.row(t, at.b);
    at.reset = walk_.resets(at.n);
    const int64_t before = walk_.reverse ? t + 1 : t - 1;
    if (walk_.has(before, at.b)) at.before = walk_.row(before, at.b);
    if (at.reset) return at;
    if (at.before >= 0) {
      at.h = w_.y + at.before * p_.y_row;
      if (w_.cells != nullptr) at.c = w_.cells + at.before * p_.H;
    } else {
      if (w_.h0 != nullptr) at.h = w_.h0 + at.b * p_.P;
      if (w_.c0 != nullptr) at.c_start = w_.c0 + at.b * p_.H;
    }
    return at;
  }

  // What the units of block k will read of row n, which lies far from what is read before it.
  PYOPS_INLINE void fetch(int64_t n, int64_t k) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int s = 0; s < S; ++s) {
      for (int64_t c = 0; c < U; c += kLine) __builtin_prefetch(w_.gates + (n * S + s) * p_.H + k * U + c);
    }
  }

  // dh of step t, from the step that was visited last; and all else, where h is m and nothing is normalised.
  __attribute__((noinline)) void outputs_tile(int64_t t, int parity, int64_t k, int r, int visited, int active) {
    alignas(kVectorBytes) A own[kGroupRows * U];
    alignas(kVectorBytes) T next[kGroupRows * kMost * U];
    alignas(kVectorBytes) A sums[Memory::kSums * U];
    const A* products = own;
    if (visited > 0 && m_.single) {
      products = product_row(0) + k * U;
    } else if (visited > 0) {
      const auto dp_of = [&](int i) PYOPS_ALWAYS_INLINE { return dp_strip(parity, r + i); };
      multiply_panel<T>(m_.outputs, m_.weights.get() + (team_.d * m_.outputs.count + k) * m_.outputs.panel, visited,
                        m_.strip_rows, dp_of, own, U);
    }
    if (!m_.projected) __builtin_memset(sums, 0, m_.used_sums * U * sizeof(A));
    for (int i = 0; i < visited || i < active; ++i) {
      const Place at = place(t, r + i, i < visited, i < active);
      const Zoneout<T> zoneout(p_, p_.zoneout_h, 2 * (team_.d * p_.rows + at.n), k * U);
      T* const row = next + i * G * U;
      if (active > 0) __builtin_memset(row, 0, G * U * sizeof(T));
      if (!m_.projected && at.before >= 0) fetch(at.before, k);
      A* const direct = direct_of(r + i) + k * U;
      for_each_vector<T>(p_.P, k * U, [&](int c, auto lanes) PYOPS_ALWAYS_INLINE {
        const int64_t u = k * U + c;
        Vec<A> dh{};
        if (!at.visited) {
          dh = load_or_zero(p_.dh_n == nullptr ? nullptr : p_.dh_n + at.state * p_.P, u, lanes);
        } else if (!at.cut) {
          dh = load(products + i * U + c, Full{});
          if (w_.keep != nullptr) dh *= load(w_.keep + at.b * p_.P + u, lanes);
          dh += load(direct + c, Full{});
        }
        if (!at.active) {
          store(p_.dh0 + at.state * p_.P + u, dh, lanes);
          if (!m_.projected) finish_cell(at, r + i, u, lanes);
          return;
        }
        if (p_.dy[team_.d] != nullptr) dh += load(p_.dy[team_.d] + at.n * p_.dy_row + u, lanes);
        Vec<A> past{};
        if (!zoneout.idle()) {
          const Vec<A> update = zoneout(c);
          past = (A(1) - update) * dh;
          dh *= update;
        }
        if (m_.projected) {
          store(p_.dm[team_.d] + at.n * p_.P + u, dh, lanes);
          store(row + c, dh, lanes);
        } else {
          past += unit(at, r + i, k, c, dh, row, sums, lanes);
        }
        store(direct + c, past, Full{});
      });
    }
    if (active == 0) return;
    if (!m_.projected) {
      if (!m_.normalised) send_strips(next, 1 - parity, k, r, active);
      add_sums(sums, k);
    } else if (m_.single) {
      pack_row<T>(next, k * U, p_.P, dm_row());
    } else {
      in_strips(active, m_.strip_rows,
                [&](int i, int of) { pack_strip<T>(next + i * G * U, G * U, k * U, p_.P, of, dm_strip(r + i)); });
    }
  }

  // From dm to the gates, behind a projection.
  __attribute__((noinline)) void units_tile(int64_t t, int parity, int64_t k, int r, int visited, int active) {
    alignas(kVectorBytes) A own[kGroupRows * U];
    alignas(kVectorBytes) T next[kGroupRows * kMost * U];
    alignas(kVectorBytes) A sums[Memory::kSums * U];
    const A* products = own;
    if (active > 0 && m_.single) {
      products = product_row(1) + k * U;
    } else if (active > 0) {
      const auto dm_of = [&](int i) PYOPS_ALWAYS_INLINE { return dm_strip(r + i); };
      multiply_panel<T>(m_.inputs, m_.projections.get() + (team_.d * m_.inputs.count + k) * m_.inputs.panel, active,
                        m_.strip_rows, dm_of, own, U);
    }
    __builtin_memset(sums, 0, m_.used_sums * U * sizeof(A));
    for (int i = 0; i < visited || i < active; ++i) {
      const Place at = place(t, r + i, i < visited, i < active);
      T* const row = next + i * G * U;
      if (active > 0) __builtin_memset(row, 0, G * U * sizeof(T));
      for_each_vector<T>(p_.H, k * U, [&](int c, auto lanes) PYOPS_ALWAYS_INLINE {
        if (!at.active) return finish_cell(at, r + i, k * U + c, lanes);
        const Vec<A> dm = load(products + i * U + c, Full{});
        unit(at, r + i, k, c, dm, row, sums, lanes);
      });
    }
    if (active == 0) return;
    if (!m_.normalised) send_strips(next, 1 - parity, k, r, active);
    add_sums(sums, k);
  }

  template <typename Lanes>
  PYOPS_INLINE Vec<A> arriving_cell(const Place& at, int r, int64_t u, Lanes lanes) {
    if (at.cut) return Vec<A>{};
    if (!at.visited) return load_or_zero(p_.dc_n == nullptr ? nullptr : p_.dc_n + at.state * p_.H, u, lanes);
    return load(dc_of(r) + u, Full{});
  }
  template <typename Lanes>
  PYOPS_INLINE void finish_cell(const Place& at, int r, int64_t u, Lanes lanes) {
    if constexpr (kHasCells<kFamily>) store(p_.dc0 + at.state * p_.H + u, arriving_cell(at, r, u, lanes), lanes);
  }

  // The gradients of a unit's gates from dm. What reaches the last h past the product comes back. With normalised cells
  // only what the norm must see of the whole row first.
  template <typename Lanes>
  __attribute__((noinline)) Vec<A> unit(const Place& at, int r, int64_t k, int c, Vec<A> dm, T* next, A* sums,
                                        Lanes lanes) {
    const int64_t u = k * U + c;
    const auto saved = [&](int g) PYOPS_ALWAYS_INLINE { return load(w_.gates + (at.n * S + g) * p_.H + u, lanes); };
    const auto give = [&](int g, Vec<A> dgx, Vec<A> d)
                          PYOPS_ALWAYS_INLINE { put(at, r, k, c, g, dgx, d, next, sums, lanes); };
    if constexpr (kFamily == RecurrentCell::rnn_tanh) {
      const Vec<A> m = saved(0);
      const Vec<A> d = p_.cell == RecurrentCell::rnn_tanh ? dm * (A(1) - m * m) : m > A(0) ? dm : Vec<A>{};
      give(0, d, d);
      return Vec<A>{};
    } else if constexpr (kFamily == RecurrentCell::gru) {
      const Vec<A> z_ = saved(1), r_ = saved(0), n = saved(2), q = saved(3);
      const Vec<A> dn = dm * (A(1) - z_) * (A(1) - n * n), dq = dn * r_;
      const Vec<A> dr = dn * q * r_ * (A(1) - r_);
      const Vec<A> dz = dm * (load_or_zero(at.h, u, lanes) - n) * z_ * (A(1) - z_);
      give(0, dr, dr);
      give(1, dz, dz);
      give(2, dn, dq);
      add(sums, 3, c, dq);
      return dm * z_;
    } else {
      if (m_.normalised) {
        const Vec<A> i = saved(0), f = coupled_ ? A(1) - i : saved(1);
        store(seen_of(k, r) + c, f * old_cell(at, u, lanes) + i * saved(of_g_), Full{});
        store(seen_of(k, r) + 2 * U + c, dm, Full{});
        return Vec<A>{};
      }
      const Vec<A> i = saved(0), f = coupled_ ? A(1) - i : saved(1), g = saved(of_g_), o = saved(of_o_);
      const Vec<A> old = old_cell(at, u, lanes);
      const Vec<A> now = p_.zoneout_c == 0 ? load(w_.cells + at.n * p_.H + u, lanes) : f * old + i * g;
      const Vec<A> tanh_now = tanh<A>(now);
      cell(at, r, k, c, i, f, g, old, now, dm * tanh_now * o * (A(1) - o), dm * o * (A(1) - tanh_now * tanh_now), next,
           sums, lanes);
      return Vec<A>{};
    }
  }

  template <typename Lanes>
  PYOPS_INLINE Vec<A> old_cell(const Place& at, int64_t u, Lanes lanes) const {
    return at.c != nullptr ? load(at.c + u, lanes) : load_or_zero(at.c_start, u, lanes);
  }

  // The gates of an LSTM, from the gradient of the output gate's sum and the part of that of c' that came through m.
  template <typename Lanes>
  __attribute__((noinline)) void cell(const Place& at, int r, int64_t k, int c, Vec<A> i, Vec<A> f, Vec<A> g,
                                      Vec<A> old, Vec<A> now, Vec<A> d_o, Vec<A> dnow, T* next, A* sums, Lanes lanes) {
    const int of_out = coupled_ ? 1 : 2;
    const int64_t u = k * U + c;
    const auto peephole = [&](int gate, Vec<A> d) PYOPS_ALWAYS_INLINE {
      return w_.peephole == nullptr ? Vec<A>{} : load(w_.peephole + gate * p_.H + u, lanes) * d;
    };
    const auto add_peephole = [&](int gate, Vec<A> d) PYOPS_ALWAYS_INLINE {
      if (m_.used_sums > Memory::kOfPeepholes) add(sums, Memory::kOfPeepholes + gate, c, d);
    };
    const auto give = [&](int gate, Vec<A> d) PYOPS_ALWAYS_INLINE { put(at, r, k, c, gate, d, d, next, sums, lanes); };
    Vec<A> dc = arriving_cell(at, r, u, lanes);
    if (p_.dcells[team_.d] != nullptr) dc += load(p_.dcells[team_.d] + at.n * p_.H + u, lanes);
    Vec<A> dold{};
    const Zoneout<T> zoneout(p_, p_.zoneout_c, 2 * (team_.d * p_.rows + at.n) + 1, k * U);
    if (!zoneout.idle()) {
      const Vec<A> update = zoneout(c);
      dold = (A(1) - update) * dc;
      dc *= update;
    }
    dc += dnow + peephole(of_out, d_o);
    const Vec<A> di = dc * (coupled_ ? g - old : g) * i * (A(1) - i);
    dold += dc * f + peephole(0, di);
    give(0, di);
    add_peephole(0, di * old);
    if (!coupled_) {
      const Vec<A> df = dc * old * f * (A(1) - f);
      dold += peephole(1, df);
      give(1, df);
      add_peephole(1, df * old);
    }
    give(of_g_, dc * i * (A(1) - g * g));
    give(of_o_, d_o);
    add_peephole(of_out, d_o * now);
    store(dc_of(r) + u, dold, Full{});
  }

  // Behind the norm of the cells: what its result's gradient is, for the units of block k.
  __attribute__((noinline)) void cell_tile(int64_t t, int64_t k, int r, int visited, int active) {
    alignas(kVectorBytes) A sums[Memory::kSums * U] = {};
    for (int i = 0; i < active; ++i) {
      const Place at = place(t, r + i, i < visited, true);
      const Norm& norm = norm_of(r + i);
      A* const held = seen_of(k, r + i);
      for_each_vector<T>(p_.H, k * U, [&](int c, auto lanes) PYOPS_ALWAYS_INLINE {
        const int64_t u = k * U + c;
        const Vec<A> xhat = (load(held + c, Full{}) - norm.mean) * norm.rstd;
        const Vec<A> seen = tanh_seen(xhat, u, lanes), o = load(w_.gates + (at.n * S + of_o_) * p_.H + u, lanes);
        const Vec<A> d = load(held + 2 * U + c, Full{}) * o * (A(1) - seen * seen);
        add(sums, Memory::kOfCell, c, d * xhat);
        add(sums, Memory::kOfCell + 1, c, d);
        store(held + U + c, d * load(w_.ln_cell + u, lanes), Full{});
      });
    }
    add_sums(sums, k);
  }
  template <typename Lanes>
  PYOPS_INLINE Vec<A> tanh_seen(Vec<A> xhat, int64_t u, Lanes lanes) const {
    return tanh<A>(xhat * load(w_.ln_cell + u, lanes) + load(w_.ln_cell + p_.H + u, lanes));
  }

  void find_cell_norm(int r) {
    find_norm<T>(seen_of(0, r), m_.units, 3, 1, p_.H, p_.eps, norm_of(r).mean, norm_of(r).rstd);
  }
  // Once the gradient of the norm's result is known.
  void find_cell_gradient(int r) {
    Norm& norm = norm_of(r);
    Vec<A> sum{}, sum_xhat{};
    for (int64_t j = 0; j < m_.units; ++j) {
      const A* of = seen_of(j, r);
      for_each_vector<T>(p_.H, j * U, [&](int c, auto lanes) PYOPS_ALWAYS_INLINE {
        const Vec<A> d = inside<A>(load(of + U + c, Full{}), lanes);
        sum += d;
        sum_xhat += d * inside<A>((load(of + c, Full{}) - norm.mean) * norm.rstd, lanes);
      });
    }
    norm.of_d = reduce_add<A>(sum) / p_.H, norm.of_d_xhat = reduce_add<A>(sum_xhat) / p_.H;
  }

  // The gates, once the norm of the cells has seen the row.
  __attribute__((noinline)) void normalised_tile(int64_t t, int64_t k, int r, int visited, int active) {
    alignas(kVectorBytes) A sums[Memory::kSums * U] = {};
    for (int row = 0; row < active; ++row) {
      const Place at = place(t, r + row, row < visited, true);
      const Norm& norm = norm_of(r + row);
      const A* held = seen_of(k, r + row);
      for_each_vector<T>(p_.H, k * U, [&](int c, auto lanes) PYOPS_ALWAYS_INLINE {
        const int64_t u = k * U + c;
        const auto saved = [&](int g) PYOPS_ALWAYS_INLINE { return load(w_.gates + (at.n * S + g) * p_.H + u, lanes); };
        const Vec<A> i = saved(0), f = coupled_ ? A(1) - i : saved(1), g = saved(of_g_), o = saved(of_o_);
        const Vec<A> now = load(held + c, Full{}), xhat = (now - norm.mean) * norm.rstd;
        const Vec<A> dnow = (load(held + U + c, Full{}) - norm.of_d - xhat * norm.of_d_xhat) * norm.rstd;
        const Vec<A> d_o = load(held + 2 * U + c, Full{}) * tanh_seen(xhat, u, lanes) * o * (A(1) - o);
        cell(at, r + row, k, c, i, f, g, old_cell(at, u, lanes), now, d_o, dnow, nullptr, sums, lanes);
      });
    }
    add_sums(sums, k);
  }

  void find_gates_norm(int64_t t, int r) {
    const int64_t H = p_.H;
    const A* x = p_.products[team_.d] + walk_.row(t, team_.sequence(r)) * G * H;
    Norm& norm = norm_of(r);
    find_norm_of_row(x, norm.mean, norm.rstd);
    Vec<A> sum{}, sum_xhat{};
    for (int64_t j = 0; j < m_.units; ++j) {
      for (int g = 0; g < G; ++g) {
        for_each_vector<T>(H, j * U, [&](int c, auto lanes) PYOPS_ALWAYS_INLINE {
          const int64_t u = j * U + c;
          const Vec<A> d = load(d_of(j, r) + g * U + c, lanes) * load(w_.ln_gates + g * H + u, lanes);
          sum += d;
          sum_xhat += d * inside<A>((load(x + g * H + u, lanes) - norm.mean) * norm.rstd, lanes);
        });
      }
    }
    norm.of_d = reduce_add<A>(sum) / (G * H), norm.of_d_xhat = reduce_add<A>(sum_xhat) / (G * H);
  }

  // Through the norm of the gates to dp.
  __attribute__((noinline)) void gates_tile(int64_t t, int parity, int64_t k, int r, int active) {
    alignas(kVectorBytes) T next[kGroupRows * kMost * U];
    alignas(kVectorBytes) A sums[Memory::kSums * U] = {};
    for (int i = 0; i < active; ++i) {
      const int64_t n = walk_.row(t, team_.sequence(r + i)), H = p_.H;
      const A* x = p_.products[team_.d] + n * G * H;
      const Norm& norm = norm_of(r + i);
      T* const row = next + i * G * U;
      __builtin_memset(row, 0, G * U * sizeof(T));
      for (int g = 0; g < G; ++g) {
        for_each_vector<T>(H, k * U, [&](int c, auto lanes) PYOPS_ALWAYS_INLINE {
          const int64_t u = k * U + c;
          const Vec<A> d = load(d_of(k, r + i) + g * U + c, Full{}),
                       xhat = (load(x + g * H + u, lanes) - norm.mean) * norm.rstd;
          const Vec<A> dp = (d * load(w_.ln_gates + g * H + u, lanes) - norm.of_d - xhat * norm.of_d_xhat) * norm.rstd;
          add(sums, Memory::kOfGates + g, c, d * xhat);
          store(p_.dp[team_.d] + (n * G + g) * H + u, dp, lanes);
          store(row + g * U + c, dp, lanes);
        });
      }
    }
    if (active == 0) return;
    send_strips(next, 1 - parity, k, r, active);
    add_sums(sums, k);
  }
  void find_norm_of_row(const A* x, A& mean, A& rstd) const {
    const int64_t n = G * p_.H;
    Vec<A> sum{}, squares{};
    const auto visit = [&](auto&& f) PYOPS_ALWAYS_INLINE {
      int64_t c = 0;
      for (; c + L <= n; c += L) f(load(x + c, Full{}), Full{});
      if (c < n) f(load(x + c, Partial{static_cast<int>(n - c)}), Partial{static_cast<int>(n - c)});
    };
    visit([&](Vec<A> v, auto) PYOPS_ALWAYS_INLINE { sum += v; });
    mean = reduce_add<A>(sum) / n;
    visit([&](Vec<A> v, auto lanes) PYOPS_ALWAYS_INLINE {
      const Vec<A> centred = inside<A>(v - mean, lanes);
      squares += centred * centred;
    });
    rstd = A(1) / __builtin_sqrt(reduce_add<A>(squares) / n + p_.eps);
  }

  PYOPS_INLINE void add(A* sums, int which, int c, Vec<A> d) const {
    store(sums + which * U + c, load(sums + which * U + c, Full{}) + d, Full{});
  }
  // What is known of gate g: its part of dgx, and d, which goes to W_hh, at once or by way of the norm.
  template <typename Lanes>
  PYOPS_INLINE void put(const Place& at, int r, int64_t k, int c, int g, Vec<A> dgx, Vec<A> d, T* next, A* sums,
                        Lanes lanes) {
    const int64_t to = (at.n * G + g) * p_.H + k * U + c;
    add(sums, g, c, dgx);
    store(p_.dgx[team_.d] + to, dgx, lanes);
    if (m_.normalised) {
      store(d_of(k, r) + g * U + c, d, Full{});
    } else {
      if (p_.dp[team_.d] != nullptr) store(p_.dp[team_.d] + to, d, lanes);
      store(next + g * U + c, d, lanes);
    }
  }

  __attribute__((noinline)) void send_strips(const T* rows, int parity, int64_t k, int r, int count) {
    for (int g = 0; g < G; ++g) {
      const int64_t u0 = g * m_.width + k * U;
      if (m_.single) {
        pack_row<T>(rows + g * U, u0, u0 + U, dp_row(parity));
      } else {
        in_strips(count, m_.strip_rows, [&](int i, int of) {
          pack_strip<T>(rows + (i * G + g) * U, G * U, u0, u0 + U, of, dp_strip(parity, r + i));
        });
      }
    }
  }

  // Compensated (Kahan): one addition for each tile of each step.
  PYOPS_INLINE void add_sums(const A* sums, int64_t k) {
    for (int g = 0; g < m_.used_sums; ++g) {
      A* total = m_.sums.get() + (team_.slot * Memory::kSums + g) * 2 * m_.width + k * U;
      for (int c = 0; c < U; c += L) {
        const Vec<A> before = load(total + c, Full{});
        const Vec<A> more = load(sums + g * U + c, Full{}) - load(total + m_.width + c, Full{});
        const Vec<A> now = before + more;
        store(total + c, now, Full{});
        store(total + m_.width + c, (now - before) - more, Full{});
      }
    }
  }

  const RecurrentBwdParams<T>& p_;
  const RecurrentDirection<T>& w_;
  const int G, S;          // products, and saved numbers of a unit
  const int of_g_, of_o_;  // which belong to the new content of the cell, and to the output gate
  const bool coupled_;
  Memory& m_;
  Team team_;
  Walk<T> walk_;
  Range units_, outputs_;  // blocks of this thread
};

template <typename T, RecurrentCell kFamily>
void backward(const RecurrentBwdParams<T>& p) {
  using Memory = BackwardMemory<T, kFamily>;
  const Division division(p, gates_of<kFamily>(p.cell));
  Memory memory(p, division);
  in_parallel(division.threads, [&](int index, int count) {
    if (!memory.single) {
      const int64_t blocks = p.directions * (memory.outputs.count + memory.inputs.count);
      for (int64_t i = index; i < blocks; i += count) pack_weights(p, memory, i);
      wait_for_all(count);
    }
    division.for_each_team(p, index, count, memory.meetings.get(),
                           [&](const Team& team) { BackwardTeam<T, kFamily>(p, memory, team).run(); });
  });
  for (int d = 0; d < p.directions; ++d) {
    const auto write = [&](acc_t<T>* to, int first, int count) {
      for (int64_t i = 0; to != nullptr && i < count * p.H; ++i) {
        const int64_t g = first + i / p.H, u = i % p.H;
        to[i] = 0;
        for (int slot = d * division.chunks; slot < (d + 1) * division.chunks; ++slot) {
          to[i] += memory.sums.get()[(slot * Memory::kSums + g) * 2 * memory.width + u];
        }
      }
    };
    write(p.dbias[d], 0, saved_of<kFamily>(p.cell));
    write(p.dpeephole[d], Memory::kOfPeepholes, memory.G - 1);
    write(p.dln_gates[d], Memory::kOfGates, memory.G);
    write(p.dln_cell[d], Memory::kOfCell, 2);
  }
}

}  // namespace pyops::PYOPS_ISA
