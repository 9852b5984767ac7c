// Forward: the steps of a layer, one after the other, in one parallel region.
//
// W_hh is packed once, so that the G products of kUnits units lie together and a tile's epilogue has all that a unit
// needs. A single sequence or step reads W_hh as it lies instead: packing it costs several steps.
#pragma once
#include "recurrent_steps.h"

namespace pyops::PYOPS_ISA {

template <typename T, RecurrentCell kFamily>
struct ForwardMemory {
  using A = acc_t<T>;
  using E = Element<T>;
  static constexpr int U = kUnits<T>;

  ForwardMemory(const RecurrentFwdParams<T>& p, const Division& division)
      : G(gates_of<kFamily>(p.cell)),
        in_place(p.B == 1 || p.T_ == 1),
        few(p.B <= kFewRows),
        normalised(p.direction[0].ln_gates != nullptr),
        projected(p.direction[0].w_hr != nullptr),
        folded(p.input != nullptr && p.input->gx == nullptr),
        most_rows(division.most_rows),
        strip_rows(division.strip_rows),
        strips(division.strips),
        columns_of_unit(folded && kFamily == RecurrentCell::gru ? G + 1 : G),
        units((p.H + U - 1) / U, p.P, in_place),
        outputs(projected ? Blocks<T>((p.P + U - 1) / U, p.H, in_place) : Blocks<T>(0, 0, true)),
        inputs(folded ? Blocks<T>(units.count, p.input->F, false) : Blocks<T>(0, 0, true)),
        weights(p.directions * units.count * G * units.panel),
        input_weights(inputs.count * G * inputs.panel),
        bias(folded ? G * p.H + U : 0),
        x(folded ? division.teams * division.team_threads * strips * inputs.strip : 0),
        projections(p.directions * outputs.count * outputs.panel),
        h(division.teams * 2 * strips * units.strip),
        m(division.teams * strips * outputs.strip),
        h_rows(in_place ? division.teams * 2 * most_rows * units.row : 0),
        m_rows(in_place && projected ? division.teams * most_rows * outputs.row : 0),
        team_columns(in_place && !few
                         ? round_up(most_rows, kPanel<A>) * (units.row > outputs.row ? units.row : outputs.row)
                         : 0),
        columns(division.teams * team_columns),
        c(kHasCells<kFamily> ? division.teams * most_rows * units.count * U : 0),
        products(normalised ? division.teams * strips * strip_rows * units.count * G * U : 0),
        seen(normalised && kHasCells<kFamily> ? division.teams * most_rows * units.count * 2 * U : 0),
        norms(normalised ? division.teams * most_rows * 2 : 0),
        meetings(division.teams) {
    __builtin_memset(meetings.get(), 0, division.teams * sizeof(Meeting));
  }

  int G;
  bool in_place, few, normalised, projected, folded;
  int64_t most_rows;
  int strip_rows;
  int64_t strips;
  int columns_of_unit;       // products of a unit: where x W_ih^T is among them, that of a GRU's n stands alone
  Blocks<T> units;           // of W_hh: columns of m
  Blocks<T> outputs;         // of W_hr: columns of h
  Blocks<T> inputs;          // of W_ih
  Scratch<E> weights;        // [directions, units.count, G, units.panel]
  Scratch<E> input_weights;  // [inputs.count, G, inputs.panel]
  Scratch<A> bias;           // [G, H] of gx, and what a whole vector reads behind it
  Scratch<E> x;              // [threads, strips, inputs.strip] of a step
  Scratch<E> projections;    // [directions, outputs.count, outputs.panel]
  Scratch<E> h;              // [teams, 2, strips, units.strip] h' of even and of odd steps
  Scratch<E> m;              // [teams, strips, outputs.strip] m on its way into W_hr
  Scratch<A> h_rows;         // [teams, 2, most_rows, units.row] the same, for weights as they lie
  Scratch<A> m_rows;         // [teams, most_rows, outputs.row]
  int64_t team_columns;
  Scratch<A> columns;   // [teams, team_columns]: panels of sequences, of units.row or outputs.row steps
  Scratch<A> c;         // [teams, most_rows, units.count U]
  Scratch<A> products;  // [teams, rows, units.count, G, U] W_hh h', where a whole row must be seen
  Scratch<A> seen;      // [teams, most_rows, units.count, 2, U] c' and o, where all of c' must be seen
  Scratch<A> norms;     // [teams, most_rows, 2] mean and rstd of what was normalised last
  Scratch<Meeting> meetings;
};

// Packs block i of all: of W_hh, of W_ih where it is wanted, then of W_hr.
template <typename T, RecurrentCell kFamily>
void pack_weights(const RecurrentFwdParams<T>& p, ForwardMemory<T, kFamily>& m, int64_t i) {
  const int G = m.G;
  if (i < p.directions * m.units.count) {
    const RecurrentDirection<T>& w = p.direction[i / m.units.count];
    const int64_t u0 = i % m.units.count * kUnits<T>;
    for (int g = 0; g < G; ++g) {
      pack_block<T>(w.w_hh + g * p.H * w.w_hh_row, w.w_hh_row, u0, p.H, p.P,
                    m.weights.get() + (i * G + g) * m.units.panel, m.units.panel);
    }
  } else if (i -= p.directions* m.units.count; i < m.inputs.count) {
    const RecurrentInput<T>& in = *p.input;
    for (int g = 0; g < G; ++g) {
      pack_block<T>(in.w_ih + g * p.H * in.w_ih_row, in.w_ih_row, i * kUnits<T>, p.H, in.F,
                    m.input_weights.get() + (i * G + g) * m.inputs.panel, m.inputs.panel);
    }
  } else {
    i -= m.inputs.count;
    const RecurrentDirection<T>& w = p.direction[i / m.outputs.count];
    pack_block<T>(w.w_hr, w.w_hr_row, i % m.outputs.count * kUnits<T>, p.P, p.H,
                  m.projections.get() + i * m.outputs.panel, m.outputs.panel);
  }
}

template <typename T, RecurrentCell kFamily>
class ForwardTeam {
  using A = acc_t<T>;
  using E = Element<T>;
  static constexpr int kMost = kGates<kFamily>, U = kUnits<T>;
  static constexpr int kMostColumns = kFamily == RecurrentCell::gru ? kMost + 1 : kMost;

  // A sequence at a step.
  struct Place {
    int64_t b, n;
    const T* h;  // that the step begins with; null: 0
    bool reset, last;
    bool cleared;  // before the next step
    A mean = 0, rstd = 0;
  };

 public:
  ForwardTeam(const RecurrentFwdParams<T>& p, ForwardMemory<T, kFamily>& memory, const Team& team)
      : p_(p),
        w_(p.direction[team.d]),
        G(memory.G),
        S(saved_of<kFamily>(p.cell)),
        m_(memory),
        team_(team),
        walk_(p, team_),
        units_(share(m_.units.count, team.index, team.threads)),
        outputs_(m_.projected ? share(m_.outputs.count, team.index, team.threads) : units_) {}

  void run() {
    begin();
    team_.wait();
    for (int64_t s = 0; s < p_.T_; ++s) {
      const int64_t t = walk_.step(s);
      const int active = walk_.active(t), parity = s % 2;
      if (m_.folded) pack_input(t, active);
      pack_as_columns(h_row(parity, 0), m_.units.row, p_.P);
      for_each_tile(units_, active, [&](int64_t k, int r, int count) { tile(t, parity, k, r, count); });
      if (m_.normalised) {
        team_.wait();
        find_norms(active, [&](int r) { return products_of(0, r); }, G, G);
        for_each_tile(units_, active, [&](int64_t k, int r, int count) { normalised_tile(t, parity, k, r, count); });
        if constexpr (kHasCells<kFamily>) {
          team_.wait();
          find_norms(active, [&](int r) { return seen_of(0, r); }, 2, 1);
          for_each_tile(units_, active, [&](int64_t k, int r, int count) { cell_tile(t, parity, k, r, count); });
        }
      }
      if (m_.projected) {
        team_.wait();
        pack_as_columns(m_row(0), m_.outputs.row, p_.H);
        for_each_tile(outputs_, active, [&](int64_t k, int r, int count) { projected_tile(t, parity, k, r, count); });
      }
      team_.wait();
    }
  }

 private:
  template <typename F>
  PYOPS_INLINE void for_each_tile(Range blocks, int rows, F&& f) {
    const int group = m_.in_place ? kPanel<A> : kGroup * m_.strip_rows;
    for (int64_t k = blocks.begin; k < blocks.end; ++k) {
      for (int r = 0; r < rows; r += group) f(k, r, rows - r < group ? rows - r : group);
    }
  }
  template <typename F>
  PYOPS_INLINE void for_each_strip(int rows, F&& f) {
    in_strips(rows, m_.strip_rows, f);
  }
  void multiply_in_place(const T* matrix, int64_t row, int matrices, int64_t H, int64_t inner, int64_t k, const A* x,
                         int64_t x_row, int r, int count, A* products, int64_t products_row) {
    if (m_.few) {
      multiply_few<T>(matrix, row, matrices, H, inner, k * U, x, x_row, count, products, products_row);
    } else {
      multiply_columns<T>(matrix, row, matrices, H, inner, k * U, columns_at(r, x_row), count, products, products_row);
    }
  }
  A* columns_at(int r, int64_t x_row) { return m_.columns.get() + team_.slot * m_.team_columns + r * x_row; }
  // The rows that the next product meets as columns.
  void pack_as_columns(const A* x, int64_t x_row, int64_t inner) {
    if (!m_.in_place || m_.few) return;
    for (int r = team_.index * kPanel<A>; r < team_.rows; r += team_.threads * kPanel<A>) {
      const int count = team_.rows - r < kPanel<A> ? team_.rows - r : kPanel<A>;
      pack_columns<T>(x + r * x_row, x_row, count, inner, columns_at(r, x_row));
    }
    team_.wait();
  }
  // x of step t, as strips of this thread.
  void pack_input(int64_t t, int active) {
    const RecurrentInput<T>& in = *p_.input;
    const int64_t row = walk_.row(t, team_.sequence(1)) - walk_.row(t, team_.sequence(0));
    for_each_strip(active, [&](int r, int of) {
      const T* x = in.x + walk_.row(t, team_.sequence(r)) * in.x_row;
      for (int64_t u0 = 0; u0 < in.F; u0 += U) {
        pack_strip<T>(x + u0, row * in.x_row, u0, in.F, of, x_strip(r));
      }
    });
  }
  // The means of every row of which all is known, once for all blocks.
  template <typename RowOf>
  void find_norms(int rows, RowOf&& row_of, int of, int used) {
    for (int r = team_.index; r < rows; r += team_.threads) {
      find_norm<T>(row_of(r), m_.units.count, of, used, p_.H, p_.eps, norm_of(r)[0], norm_of(r)[1]);
    }
    team_.wait();
  }
  A* norm_of(int r) { return m_.norms.get() + (team_.slot * m_.most_rows + r) * 2; }
  E* h_strip(int parity, int r) {
    return m_.h.get() + ((team_.slot * 2 + parity) * m_.strips + r / m_.strip_rows) * m_.units.strip;
  }
  A* h_row(int parity, int r) {
    return m_.h_rows.get() + ((team_.slot * 2 + parity) * m_.most_rows + r) * m_.units.row;
  }
  E* x_strip(int r) {
    const int64_t thread = team_.slot * team_.threads + team_.index;
    return m_.x.get() + (thread * m_.strips + r / m_.strip_rows) * m_.inputs.strip;
  }
  E* m_strip(int r) { return m_.m.get() + (team_.slot * m_.strips + r / m_.strip_rows) * m_.outputs.strip; }
  A* m_row(int r) { return m_.m_rows.get() + (team_.slot * m_.most_rows + r) * m_.outputs.row; }
  A* c_of(int r) { return m_.c.get() + (team_.slot * m_.most_rows + r) * m_.units.count * U; }
  int64_t products_row() const { return m_.units.count * G * U; }
  A* seen_of(int64_t k, int r) {
    return m_.seen.get() + ((team_.slot * m_.most_rows + r) * m_.units.count + k) * 2 * U;
  }
  A* products_of(int64_t k, int r) {
    return m_.products.get() + (team_.slot * m_.strips * m_.strip_rows + r) * products_row() + k * G * U;
  }

  // Both copies of h' and c before the first step of each sequence: one that begins later finds its own untouched.
  void begin() {
    alignas(kVectorBytes) T rows[kGroupRows * U];
    for_each_tile(outputs_, team_.rows, [&](int64_t k, int r, int count) {
      for (int i = 0; i < count; ++i) send_initial(rows + i * U, team_.sequence(r + i), k * U);
      send_strips(rows, 0, k, r, count);
      send_strips(rows, 1, k, r, count);
    });
    if constexpr (kHasCells<kFamily>) {
      for_each_tile(units_, team_.rows, [&](int64_t k, int r, int count) {
        for (int i = r; i < r + count; ++i) {
          const T* c0 = w_.c0 == nullptr ? nullptr : w_.c0 + team_.sequence(i) * p_.H;
          for_each_vector<T>(p_.H, k * U, [&](int c, auto lanes) PYOPS_ALWAYS_INLINE {
            store(c_of(i) + k * U + c, load_or_zero(c0, k * U + c, lanes), Full{});
          });
        }
      });
    }
  }

  // h on its way into the next product.
  template <typename Lanes>
  PYOPS_INLINE void send(T* row, int column, int64_t b, int64_t u0, Vec<A> h, Lanes lanes) {
    if (w_.keep != nullptr) h *= load(w_.keep + b * p_.P + u0 + column, lanes);
    store(row + column, h, Full{});
  }
  PYOPS_INLINE void send_initial(T* row, int64_t b, int64_t u0) {
    const bool zero = w_.h0 == nullptr || walk_.resets(walk_.row(walk_.first_step(b), b));
    for_each_vector<T>(p_.P, u0, [&](int c, auto lanes) PYOPS_ALWAYS_INLINE {
      send(row, c, b, u0, zero ? Vec<A>{} : load(w_.h0 + b * p_.P + u0 + c, lanes), lanes);
    });
  }
  // Block k of `count` sequences from r on, to a copy of h'.
  __attribute__((noinline)) void send_strips(T* rows, int parity, int64_t k, int r, int count) {
    if (m_.in_place) {
      for (int i = 0; i < count; ++i) pack_row<T>(rows + i * U, k * U, p_.P, h_row(parity, r + i));
      return;
    }
    if (walk_.reverse && p_.offsets != nullptr) {
      // A strip is packed as a whole, with the sequences that have not begun.
      const int all = static_cast<int>(round_up(count, m_.strip_rows)), left = team_.rows - r;
      for (; count < all && count < left; ++count) send_initial(rows + count * U, team_.sequence(r + count), k * U);
    }
    for_each_strip(count,
                   [&](int i, int of) { pack_strip<T>(rows + i * U, U, k * U, p_.P, of, h_strip(parity, r + i)); });
  }

  Place place(int64_t t, int r) const {
    Place at;
    at.b = team_.sequence(r);
    at.n = walk_.row(t, at.b);
    const int64_t before = walk_.reverse ? t + 1 : t - 1, after = walk_.reverse ? t - 1 : t + 1;
    at.reset = walk_.resets(at.n);
    at.last = !walk_.has(after, at.b);
    at.cleared = !at.last && walk_.resets(walk_.row(after, at.b));
    at.h = at.reset                  ? nullptr
           : walk_.has(before, at.b) ? w_.y + walk_.row(before, at.b) * p_.y_row
           : w_.h0 != nullptr        ? w_.h0 + at.b * p_.P
                                     : nullptr;
    return at;
  }

  // Step t of `count` sequences from r on, for the units of block k.
  __attribute__((noinline)) void tile(int64_t t, int parity, int64_t k, int r, int count) {
    alignas(kVectorBytes) A own[kGroupRows * kMostColumns * U];
    A* const products = m_.normalised ? products_of(k, r) : own;
    const int64_t row = m_.normalised ? products_row() : m_.columns_of_unit * U;
    if (m_.in_place) {
      multiply_in_place(w_.w_hh, w_.w_hh_row, G, p_.H, p_.P, k, h_row(parity, r), m_.units.row, r, count, products,
                        row);
    } else {
      const E* weights = m_.weights.get() + (team_.d * m_.units.count + k) * G * m_.units.panel;
      const auto h_of = [&](int i) PYOPS_ALWAYS_INLINE { return h_strip(parity, r + i); };
      const auto x_of = [&](int i) PYOPS_ALWAYS_INLINE { return x_strip(r + i); };
      for (int g = 0; g < G; ++g) {
        multiply_panel<T>(m_.units, weights + g * m_.units.panel, count, m_.strip_rows, h_of, products + g * U, row);
      }
      for (int g = 0; m_.folded && g < G; ++g) {
        const bool alone = kFamily == RecurrentCell::gru && g == 2;
        multiply_panel<T>(m_.inputs, m_.input_weights.get() + (k * G + g) * m_.inputs.panel, count, m_.strip_rows, x_of,
                          products + (alone ? g + 1 : g) * U, row, !alone);
      }
    }
    if (m_.normalised) return;
    alignas(kVectorBytes) T next[kGroupRows * U];
    for (int i = 0; i < count; ++i) units(place(t, r + i), r + i, k, products + i * row, next + i * U);
    deliver(next, parity, k, r, count);
  }

  __attribute__((noinline)) void normalised_tile(int64_t t, int parity, int64_t k, int r, int count) {
    alignas(kVectorBytes) T next[kGroupRows * U];
    for (int i = 0; i < count; ++i) {
      Place at = place(t, r + i);
      at.mean = norm_of(r + i)[0], at.rstd = norm_of(r + i)[1];
      units(at, r + i, k, products_of(k, r + i), next + i * U);
    }
    if (!kHasCells<kFamily>) deliver(next, parity, k, r, count);
  }

  __attribute__((noinline)) void cell_tile(int64_t t, int parity, int64_t k, int r, int count) {
    alignas(kVectorBytes) T next[kGroupRows * U];
    for (int i = 0; i < count; ++i) {
      const Place at = place(t, r + i);
      const A mean = norm_of(r + i)[0], rstd = norm_of(r + i)[1];
      const Zoneout<T> zoneout = zoneout_of_h(at, k);
      const A* held = seen_of(k, r + i);
      for_each_vector<T>(p_.H, k * U, [&](int c, auto lanes) PYOPS_ALWAYS_INLINE {
        const int64_t u = k * U + c;
        const Vec<A> seen =
            (load(held + c, Full{}) - mean) * rstd * load(w_.ln_cell + u, lanes) + load(w_.ln_cell + p_.H + u, lanes);
        finish(at, zoneout, k, c, load(held + U + c, Full{}) * tanh<A>(seen), next + i * U, lanes);
      });
    }
    deliver(next, parity, k, r, count);
  }

  __attribute__((noinline)) void projected_tile(int64_t t, int parity, int64_t k, int r, int count) {
    alignas(kVectorBytes) A products[kGroupRows * U];
    alignas(kVectorBytes) T next[kGroupRows * U];
    if (m_.in_place) {
      multiply_in_place(w_.w_hr, w_.w_hr_row, 1, p_.P, p_.H, k, m_row(r), m_.outputs.row, r, count, products, U);
    } else {
      const auto m_of = [&](int i) PYOPS_ALWAYS_INLINE { return m_strip(r + i); };
      multiply_panel<T>(m_.outputs, m_.projections.get() + (team_.d * m_.outputs.count + k) * m_.outputs.panel, count,
                        m_.strip_rows, m_of, products, U);
    }
    for (int i = 0; i < count; ++i) {
      const Place at = place(t, r + i);
      const Zoneout<T> zoneout = zoneout_of_h(at, k);
      for_each_vector<T>(p_.P, k * U, [&](int c, auto lanes) PYOPS_ALWAYS_INLINE {
        put(at, zoneout, k, c, load(products + i * U + c, Full{}), next + i * U, lanes);
      });
    }
    send_strips(next, 1 - parity, k, r, count);
  }

  PYOPS_INLINE Zoneout<T> zoneout_of_h(const Place& at, int64_t k) const {
    return {p_, p_.zoneout_h, 2 * (team_.d * p_.rows + at.n), k * U};
  }

  // The units of block k of a row, from its products.
  __attribute__((noinline)) void units(const Place& at, int r, int64_t k, const A* products, T* next) {
    const int64_t H = p_.H;
    const T* gx = m_.folded ? nullptr : w_.gx + at.n * w_.gx_row;
    const Zoneout<T> of_h = zoneout_of_h(at, k);
    const Zoneout<T> of_c(p_, kHasCells<kFamily> ? p_.zoneout_c : A(0), 2 * (team_.d * p_.rows + at.n) + 1, k * U);
    for_each_vector<T>(H, k * U, [&](int c, auto lanes) PYOPS_ALWAYS_INLINE {
      const int64_t u = k * U + c;
      const auto input = [&](int g) PYOPS_ALWAYS_INLINE {
        return gx == nullptr ? load(m_.bias.get() + g * H + u, Full{}) : load(gx + g * H + u, lanes);
      };
      const auto product = [&](int g) PYOPS_ALWAYS_INLINE {
        const Vec<A> p = load(products + g * U + c, Full{});
        return m_.normalised ? (p - at.mean) * at.rstd * load(w_.ln_gates + g * H + u, lanes) : p;
      };
      const auto save = [&](int g, Vec<A> v) PYOPS_ALWAYS_INLINE {
        if (w_.gates != nullptr) store(w_.gates + (at.n * S + g) * H + u, v, lanes);
      };
      if constexpr (kFamily == RecurrentCell::rnn_tanh) {
        const Vec<A> x = input(0) + product(0);
        // NaN stays NaN.
        const Vec<A> m = p_.cell == RecurrentCell::rnn_tanh ? tanh<A>(x) : x < A(0) ? Vec<A>{} : x;
        save(0, m);
        finish(at, of_h, k, c, m, next, lanes);
      } else if constexpr (kFamily == RecurrentCell::gru) {
        const Vec<A> r = sigmoid<A>(input(0) + product(0)), z = sigmoid<A>(input(1) + product(1));
        const Vec<A> q = product(2) + load_or_zero(w_.b_n, u, lanes);
        Vec<A> n = input(2) + r * q;
        if (m_.folded) n += load(products + 3 * U + c, Full{});
        n = tanh<A>(n);
        save(0, r);
        save(1, z);
        save(2, n);
        save(3, q);
        finish(at, of_h, k, c, n + z * (load_or_zero(at.h, u, lanes) - n), next, lanes);
      } else {
        // Which product belongs to the new content of the cell, and to the output gate.
        const int of_g = G - 2, of_o = G - 1;
        const bool coupled = p_.cell == RecurrentCell::coupled;
        A* const held = c_of(r) + u;
        const Vec<A> old = at.reset ? Vec<A>{} : load(held, Full{});
        const auto peephole = [&](int g, Vec<A> cell) PYOPS_ALWAYS_INLINE {
          return w_.peephole == nullptr ? Vec<A>{} : load(w_.peephole + g * H + u, lanes) * cell;
        };
        const Vec<A> i = sigmoid<A>(input(0) + product(0) + peephole(0, old));
        const Vec<A> f = coupled ? A(1) - i : sigmoid<A>(input(1) + product(1) + peephole(1, old));
        const Vec<A> g = tanh<A>(input(of_g) + product(of_g));
        const Vec<A> now = f * old + i * g;
        const Vec<A> o = sigmoid<A>(input(of_o) + product(of_o) + peephole(coupled ? 1 : 2, now));
        const Vec<A> kept = of_c.idle() ? now : old + of_c(c) * (now - old);
        store(held, kept, Full{});
        save(0, i);
        if (!coupled) save(1, f);
        save(of_g, g);
        save(of_o, o);
        if (w_.cells != nullptr) store(w_.cells + at.n * H + u, kept, lanes);
        if (at.last && p_.c_n != nullptr) store(p_.c_n + (team_.d * p_.B + at.b) * H + u, kept, lanes);
        if (m_.normalised) {
          store(seen_of(k, r) + c, now, Full{});
          store(seen_of(k, r) + U + c, o, Full{});
        } else {
          finish(at, of_h, k, c, o * tanh<A>(now), next, lanes);
        }
      }
    });
  }

  // m of a unit: h, or what W_hr makes h of.
  template <typename Lanes>
  PYOPS_INLINE void finish(const Place& at, const Zoneout<T>& zoneout, int64_t k, int c, Vec<A> m, T* next,
                           Lanes lanes) {
    if (m_.projected) {
      store(next + c, m, Full{});
    } else {
      put(at, zoneout, k, c, m, next, lanes);
    }
  }
  template <typename Lanes>
  PYOPS_INLINE void put(const Place& at, const Zoneout<T>& zoneout, int64_t k, int c, Vec<A> m, T* next, Lanes lanes) {
    const int64_t u = k * U + c;
    if (!zoneout.idle()) {
      const Vec<A> old = load_or_zero(at.h, u, lanes);
      m = old + zoneout(c) * (m - old);
    }
    store(w_.y + at.n * p_.y_row + u, m, lanes);
    if (at.last && p_.h_n != nullptr) store(p_.h_n + (team_.d * p_.B + at.b) * p_.P + u, m, lanes);
    send(next, c, at.b, k * U, at.cleared ? Vec<A>{} : rounded<T>(m), lanes);
  }
  PYOPS_INLINE void deliver(T* next, int parity, int64_t k, int r, int count) {
    if (!m_.projected) {
      send_strips(next, 1 - parity, k, r, count);
    } else if (m_.in_place) {
      for (int i = 0; i < count; ++i) pack_row<T>(next + i * U, k * U, p_.H, m_row(r + i));
    } else {
      for_each_strip(count, [&](int i, int of) { pack_strip<T>(next + i * U, U, k * U, p_.H, of, m_strip(r + i)); });
    }
  }

  const RecurrentFwdParams<T>& p_;
  const RecurrentDirection<T>& w_;
  const int G, S;  // products, and saved numbers of a unit
  ForwardMemory<T, kFamily>& m_;
  Team team_;
  Walk<T> walk_;
  Range units_, outputs_;  // blocks of this thread
};

// Of gx, from column u on.
template <typename T, typename Lanes>
PYOPS_INLINE Vec<acc_t<T>> input_bias(const RecurrentInput<T>& p, int64_t u, Lanes lanes) {
  const int64_t left = p.b_hh == nullptr ? 0 : p.added - u;
  Vec<acc_t<T>> bias = load_or_zero(p.b_ih, u, lanes);
  if (left >= kLanes<acc_t<T>>) {
    bias += load(p.b_hh + u, lanes);
  } else if (left > 0) {
    bias += load(p.b_hh + u, Partial{static_cast<int>(left)});
  }
  return bias;
}

// gx, within the kernel.
template <typename T>
class Projection {
  using A = acc_t<T>;
  static constexpr int U = kUnits<T>;

 public:
  explicit Projection(const RecurrentInput<T>& p)
      : p_(p),
        few_(p.rows <= kFewRows),
        group_(few_ ? static_cast<int>(kFewRows) : kPanel<A>),
        row_(round_up(p.F, kLanes<A>)),
        x_(round_up(p.rows, group_) * row_) {}

  void run(int index, int threads) {
    const Range own = share((p_.rows + group_ - 1) / group_, index, threads);
    for (int64_t s = own.begin; s < own.end; ++s) prepare(s * group_);
    wait_for_all(threads);
    const Range blocks = share((p_.columns + U - 1) / U, index, threads);
    for (int64_t k = blocks.begin; k < blocks.end; ++k) multiply_block(k);
    wait_for_all(threads);
  }

 private:
  int rows_from(int64_t r) const { return p_.rows - r < group_ ? static_cast<int>(p_.rows - r) : group_; }
  A* group_at(int64_t r) { return x_.get() + r * row_; }

  void prepare(int64_t r) {
    const T* x = p_.x + r * p_.x_row;
    if (!few_) return pack_columns<T>(x, p_.x_row, rows_from(r), p_.F, group_at(r));
    for (int i = 0; i < rows_from(r); ++i) {
      for (int64_t u0 = 0; u0 < p_.F; u0 += U) {
        for_each_vector<T>(p_.F, u0, [&](int c, auto lanes) PYOPS_ALWAYS_INLINE {
          store(group_at(r + i) + u0 + c, load(x + i * p_.x_row + u0 + c, lanes), Full{});
        });
      }
    }
  }

  void multiply_block(int64_t k) {
    alignas(kVectorBytes) A products[kGroupRows * U];
    for (int64_t r = 0; r < p_.rows; r += group_) {
      const int rows = rows_from(r);
      if (few_) {
        multiply_few<T>(p_.w_ih, p_.w_ih_row, 1, p_.columns, p_.F, k * U, group_at(r), row_, rows, products, U);
      } else {
        multiply_columns<T>(p_.w_ih, p_.w_ih_row, 1, p_.columns, p_.F, k * U, group_at(r), rows, products, U);
      }
      for_each_vector<T>(p_.columns, k * U, [&](int c, auto lanes) PYOPS_ALWAYS_INLINE {
        const int64_t u = k * U + c;
        const Vec<A> bias = input_bias(p_, u, lanes);
        for (int i = 0; i < rows; ++i) {
          store(p_.gx + (r + i) * p_.columns + u, load(products + i * U + c, Full{}) + bias, lanes);
        }
      });
    }
  }

  const RecurrentInput<T>& p_;
  const bool few_;
  const int group_;    // rows of x that lie together: as they are, or as columns
  const int64_t row_;  // numbers of a row, up to whole vectors
  Scratch<A> x_;       // [rows, row_]
};

template <typename T, RecurrentCell kFamily>
void forward(const RecurrentFwdParams<T>& p) {
  const Division division(p, gates_of<kFamily>(p.cell));
  ForwardMemory<T, kFamily> memory(p, division);
  const bool projects = p.input != nullptr && !memory.folded;
  const RecurrentInput<T> none{};
  Projection<T> projection(projects ? *p.input : none);
  for (int64_t u0 = 0; memory.folded && u0 < p.input->columns; u0 += kUnits<T>) {
    for_each_vector<T>(p.input->columns, u0, [&](int c, auto lanes) PYOPS_ALWAYS_INLINE {
      store(memory.bias.get() + u0 + c, input_bias(*p.input, u0 + c, lanes), Full{});
    });
  }
  in_parallel(division.threads, [&](int index, int count) {
    if (!memory.in_place) {
      const int64_t blocks = p.directions * (memory.units.count + memory.outputs.count) + memory.inputs.count;
      for (int64_t i = index; i < blocks; i += count) pack_weights(p, memory, i);
    }
    if (projects) {
      projection.run(index, count);
    } else if (!memory.in_place) {
      wait_for_all(count);
    }
    division.for_each_team(p, index, count, memory.meetings.get(),
                           [&](const Team& team) { ForwardTeam<T, kFamily>(p, memory, team).run(); });
  });
}

}  // namespace pyops::PYOPS_ISA
