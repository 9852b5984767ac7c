// What the forward and the backward kernel of a recurrent layer share: how the work is divided, where a row lies, and
// what a unit's gates are.
#pragma once
#include "../params/recurrent.h"
#include "gemm.h"
#include "math.h"
#include "parallel.h"
#include "philox.h"

#include <sched.h>

namespace pyops::PYOPS_ISA {

// The kernels are compiled for rnn_tanh, gru and lstm, which stand for their kin: these are the most gates (products of
// a unit) and saved numbers that one of the family has.
template <RecurrentCell kFamily>
constexpr int kGates = kFamily == RecurrentCell::lstm  ? 4
                       : kFamily == RecurrentCell::gru ? 3
                                                       : 1;
template <RecurrentCell kFamily>
constexpr int kSaved = kFamily == RecurrentCell::gru ? 4 : kGates<kFamily>;
template <RecurrentCell kFamily>
constexpr bool kHasCells = kFamily == RecurrentCell::lstm;

// And what the cell has.
template <RecurrentCell kFamily>
inline int gates_of(RecurrentCell cell) {
  return cell == RecurrentCell::coupled ? 3 : kGates<kFamily>;
}
template <RecurrentCell kFamily>
inline int saved_of(RecurrentCell cell) {
  return cell == RecurrentCell::coupled ? 3 : kSaved<kFamily>;
}

// Weights that are read once are read as they lie, and met by rows of x as they lie up to this many, else by columns of
// x: sums of lanes cost as much as 60 numbers of a row, and vectors of columns may be half empty.
constexpr int64_t kFewRows = 12;

// Strips that a part of a panel serves, of kNearSteps steps: 12 KB that stay in the nearest cache beside the strips.
constexpr int kGroup = 4, kGroupRows = kGroup * kTileRows, kNearSteps = 96;

// Units of one block: its products are [rows, G, kUnits].
template <typename T>
constexpr int kUnits = kTileVectors * kLanes<acc_t<T>>;

// Where the threads of a team wait for each other, some hundred nanoseconds instead of a parallel region's
// microseconds.
struct alignas(64) Meeting {
  int64_t arrived;
};

inline void meet(Meeting& meeting, int threads, int64_t& times) {
  if (threads == 1) return;
  const int64_t all = ++times * threads;
  if (__atomic_add_fetch(&meeting.arrived, 1, __ATOMIC_ACQ_REL) == all) return;
  for (int spins = 0; __atomic_load_n(&meeting.arrived, __ATOMIC_ACQUIRE) < all; ++spins) {
#if defined(__x86_64__)
    _mm_pause();
#endif
    if (spins > 1000) sched_yield();  // the one that is missing may wait for this processor
  }
}

// Sequences of one direction, and the threads that step through them together, each with its share of the units. Where
// there are several teams, sequences are dealt in turn: packed ones are sorted by length.
struct Team {
  int d;
  int64_t first, stride;  // of the sequences
  int rows;               // how many
  int index, threads;
  int slot;  // of the teams' memory
  Meeting* meeting;
  int64_t times = 0;

  int64_t sequence(int r) const { return first + r * stride; }
  void wait() { meet(*meeting, threads, times); }
};

// Either many teams of one thread, which never wait, or one of several threads for each direction.
struct Division {
  int threads, team_threads, chunks, teams;
  int64_t most_rows;
  int strips, strip_rows;  // of a team's sequences: as even as the heights of tiles allow

  template <typename T>
  Division(const RecurrentParams<T>& p, int products) {
    constexpr int64_t kLeastProducts = 1 << 17;  // of a thread
    constexpr int64_t kLeastTeam = 8;            // sequences
    constexpr int64_t kNearBytes = 2 << 20;
    const int64_t work = p.rows * p.directions * p.H * p.P * products;
    threads = work / kLeastProducts < p.num_threads ? static_cast<int>(work / kLeastProducts) : p.num_threads;
    threads = threads < 1 ? 1 : threads;
    const int wanted = (threads + p.directions - 1) / p.directions;
    // Beyond a core's own cache, the threads share the weights rather than the sequences.
    const bool near = p.H * p.P * products * static_cast<int64_t>(sizeof(acc_t<T>)) <= kNearBytes;
    const bool by_rows = near && p.T_ > 1 && p.B >= wanted * kLeastTeam;
    chunks = by_rows ? wanted : 1;
    teams = p.directions * chunks;
    team_threads = teams >= threads ? 1 : threads / teams;
    if (team_threads > 1) threads = teams * team_threads;
    most_rows = (p.B + chunks - 1) / chunks;
    strips = static_cast<int>((most_rows + kTileRows - 1) / kTileRows);
    strip_rows = static_cast<int>(round_up((most_rows + strips - 1) / strips, kLeastRows));
  }

  // Calls f(team) for each team of thread `index`, of `count` threads.
  template <typename T, typename F>
  void for_each_team(const RecurrentParams<T>& p, int index, int count, Meeting* meetings, F&& f) const {
    const int together = count == threads ? team_threads : 1;  // OpenMP may give fewer threads than were asked for
    for (int i = index; i < teams * together; i += count) {
      const int slot = i / together;
      const int64_t first = slot % chunks;
      f(Team{slot / chunks, first, chunks, static_cast<int>((p.B - first + chunks - 1) / chunks), i % together,
             together, slot, &meetings[slot]});
    }
  }
};

// The order in which a direction visits the steps, and where its rows lie.
template <typename T>
struct Walk {
  const RecurrentParams<T>& p;
  const Team& team;
  bool reverse;

  Walk(const RecurrentParams<T>& p, const Team& team) : p(p), team(team), reverse(team.d == 1) {}

  int64_t step(int64_t s) const { return reverse ? p.T_ - 1 - s : s; }
  int64_t row(int64_t t, int64_t b) const {
    return p.offsets != nullptr ? p.offsets[t] + b : t * p.step_rows + b * p.batch_rows;
  }
  // Whether sequence b has a step t.
  bool has(int64_t t, int64_t b) const {
    return t >= 0 && t < p.T_ && (p.offsets == nullptr || b < p.offsets[t + 1] - p.offsets[t]);
  }
  // How many of the team's sequences have a step t: the first ones.
  int active(int64_t t) const {
    if (p.offsets == nullptr) return team.rows;
    const int64_t n = (p.offsets[t + 1] - p.offsets[t] - team.first + team.stride - 1) / team.stride;
    return n < 0 ? 0 : n < team.rows ? static_cast<int>(n) : team.rows;
  }
  // The step that sequence b begins with.
  int64_t first_step(int64_t b) const {
    int64_t t = step(0);
    while (!has(t, b)) --t;
    return t;
  }
  bool resets(int64_t row) const { return p.reset != nullptr && p.reset[row]; }
};

// Calls f(column, lanes) for the vectors of the units from u0 on that a tile holds.
template <typename T, typename F>
PYOPS_INLINE void for_each_vector(int64_t H, int64_t u0, F&& f) {
  constexpr int L = kLanes<acc_t<T>>;
#pragma GCC unroll 1
  for (int v = 0; v < kTileVectors; ++v) {
    const int64_t left = H - u0 - v * L;
    if (left >= L) {
      f(v * L, Full{});
    } else if (left > 0) {
      f(v * L, Partial{static_cast<int>(left)});
    }
  }
}

// A state row of the step before, or zeros.
template <typename T, typename Lanes>
PYOPS_INLINE Vec<acc_t<T>> load_or_zero(const T* row, int64_t at, Lanes lanes) {
  return row == nullptr ? Vec<acc_t<T>>{} : load(row + at, lanes);
}

// v as it reads back after a store to T.
template <typename T>
PYOPS_INLINE Vec<acc_t<T>> rounded(Vec<acc_t<T>> v) {
  return widen(narrow(v, T{}), T{});
}

// Zoneout's share of the new value: 0 or 1 drawn in training, else constant. Units from u0 on, of row 2 (d rows + n).
template <typename T>
class Zoneout {
  using A = acc_t<T>;

 public:
  PYOPS_INLINE Zoneout(const RecurrentParams<T>& p, A probability, int64_t row, int64_t u0)
      : drawn_(p.seed != nullptr && probability > 0), constant_(1 - probability) {
    if (drawn_) {
      dropout_row(keep_, p.seed, row, kUnits<T>,
                  static_cast<uint32_t>(__builtin_ceil(double(probability) * 16777216.0)), u0);
    }
  }
  PYOPS_INLINE Vec<A> operator()(int column) const {
    if (!drawn_) return splat(constant_);
    return load_mask(keep_ + column, A{}) != 0 ? splat(A(1)) : Vec<A>{};
  }
  PYOPS_INLINE bool idle() const { return !drawn_ && constant_ == 1; }

 private:
  bool drawn_;
  A constant_;
  uint32_t keep_[4 * kLanes<uint32_t>];
};

// Lane j: the sum of the lanes of v[j].
template <typename A, int L = kLanes<A>>
PYOPS_INLINE Vec<A> sums_of_lanes(Vec<A> (&v)[L]) {
  const auto lane = iota<A>();
#pragma GCC unroll 4
  for (int width = 1; width < L; width *= 2) {
    const auto upper = (lane & width) != 0;
    const auto low = upper ? lane - width + L : lane, high = upper ? lane + L : lane + width;
#pragma GCC unroll 16
    for (int i = 0; i < L; i += 2 * width) {
      v[i] = __builtin_shuffle(v[i], v[i + width], low) + __builtin_shuffle(v[i], v[i + width], high);
    }
  }
  return v[0];
}

// ---- matrices ----

// The columns of a product in blocks of U = kUnits: how its weights are packed, and the rows that meet them; unless the
// weights are read as they lie.
template <typename T>
struct Blocks {
  Blocks(int64_t count, int64_t inner, bool in_place)
      : count(count),
        steps(static_cast<int>(steps_of<Element<T>>(inner))),
        panel(in_place ? 0 : round_up(steps, kLanes<acc_t<T>>) * kPanel<Element<T>>),
        strip(in_place ? 0 : round_up(steps, kLanes<acc_t<T>>) * kStripStep<acc_t<T>>),
        row(round_up(inner, kLanes<acc_t<T>>)) {}

  int64_t count;
  int steps;
  int64_t panel;  // elements of a block's weights
  int64_t strip;  // elements of a strip of rows
  int64_t row;    // numbers of a row, up to whole vectors
};

// Rows u0, u0 + 1, .. of a matrix [rows, inner] as a panel.
template <typename T>
void pack_block(const T* matrix, int64_t row, int64_t u0, int64_t rows, int64_t inner, Element<T>* to, int64_t panel) {
  using E = Element<T>;
  const int count = rows - u0 < kUnits<T> ? static_cast<int>(rows - u0) : kUnits<T>;
  if (count < kUnits<T>) __builtin_memset(to, 0, panel * sizeof(E));
  pack_transposed<kPanel<E>, E, T>([&](int j) { return matrix + (u0 + j) * row; }, count, inner, acc_t<T>(1), to,
                                   panel);
}

// Numbers u0 to u0 + kUnits, of n, of `count` rows that lie `row` apart: into a strip.
template <typename T>
__attribute__((noinline)) void pack_strip(const T* rows, int64_t row, int64_t u0, int64_t n, int count,
                                          Element<T>* strip) {
  using E = Element<T>;
  constexpr int kStep = kStripStep<acc_t<T>>;
  pack_transposed<kStep, E, T>([&](int i) { return rows + i * row; }, count, n - u0 < kUnits<T> ? n - u0 : kUnits<T>,
                               acc_t<T>(1), strip + u0 / (is_pair<E> ? 2 : 1) * kStep, 0);
}
// And of a single row.
template <typename T>
PYOPS_INLINE void pack_row(const T* from, int64_t u0, int64_t n, acc_t<T>* row) {
  for (int c = 0; c < kUnits<T> && u0 + c < n; c += kLanes<acc_t<T>>)
    store(row + u0 + c, load(from + c, Full{}), Full{});
}

template <typename A>
constexpr bool kGroupsFit = kPanel<A> <= kGroupRows && kFewRows <= kGroupRows;
static_assert(kGroupsFit<float> && kGroupsFit<double>, "a group of rows holds those that meet weights as they lie");

template <typename F>
PYOPS_INLINE void in_strips(int rows, int strip_rows, F&& f) {
  for (int i = 0; i < rows; i += strip_rows) f(i, rows - i < strip_rows ? rows - i : strip_rows);
}

// A panel of weights with `count` sequences, added to what is there if told to. A part of the panel serves all of their
// strips while it lies in the nearest cache.
template <typename T, typename StripOf>
PYOPS_INLINE void multiply_panel(const Blocks<T>& blocks, const Element<T>* weights, int count, int strip_rows,
                                 StripOf&& strip_of, acc_t<T>* to, int64_t row, bool adds = false) {
  using E = Element<T>;
  constexpr int kStep = kStripStep<acc_t<T>>;
  const int part = count <= strip_rows ? blocks.steps : kNearSteps;
  for (int j = 0; j < blocks.steps; j += part) {
    const int steps = blocks.steps - j < part ? blocks.steps - j : part;
    in_strips(count, strip_rows, [&](int i, int of) PYOPS_ALWAYS_INLINE {
      const E *a = strip_of(i) + j * kStep, *b = weights + j * kPanel<E>;
      if (j == 0 && !adds) {
        multiply<Into::product, 1, kStep>(of, a, b, 0, steps, to + i * row, row, kUnits<T>);
      } else {
        multiply<Into::add, 1, kStep>(of, a, b, 0, steps, to + i * row, row, kUnits<T>);
      }
    });
  }
}

// The G products of the units from u0 on with `count` rows x, from matrices [H, inner] as they lie, one behind the
// other: kRows rows with as many of a matrix as there are lanes for their sums.
template <int kRows, typename T>
__attribute__((noinline)) void multiply_rows(const T* matrix, int64_t row, int G, int64_t H, int64_t inner, int64_t u0,
                                             const acc_t<T>* x, int64_t x_row, int count, acc_t<T>* products,
                                             int64_t products_row) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>, kOthers = L / kRows;
  const int64_t whole = round_up(H, L);  // the rest of a vector is computed with: chance denormals would be slow
  for (int g = 0; g < G; ++g) {
    for (int v = 0; v < kUnits<T> && u0 + v < whole; v += kOthers) {
      const T* w[kOthers];
#pragma GCC unroll 16
      for (int i = 0; i < kOthers; ++i) {
        const int64_t u = u0 + v + i < H ? u0 + v + i : H - 1;
        w[i] = matrix + (g * H + u) * row;
      }
      for (int r = 0; r < count; r += kRows) {
        const A* from[kRows];
        Vec<A> sum[L];
#pragma GCC unroll 4
        for (int j = 0; j < kRows; ++j) from[j] = x + (r + j < count ? r + j : count - 1) * x_row;
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) sum[i] = Vec<A>{};
        const auto step = [&](int64_t k, auto lanes) PYOPS_ALWAYS_INLINE {
          Vec<A> part[kRows];
#pragma GCC unroll 4
          for (int j = 0; j < kRows; ++j) part[j] = load(from[j] + k, lanes);
#pragma GCC unroll 16
          for (int i = 0; i < kOthers; ++i) {
            const Vec<A> weights = load(w[i] + k, lanes);
#pragma GCC unroll 4
            for (int j = 0; j < kRows; ++j) sum[j * kOthers + i] += weights * part[j];
          }
        };
        int64_t k = 0;
        for (; k + L <= inner; k += L) step(k, Full{});
        if (k < inner) step(k, Partial{static_cast<int>(inner - k)});
        alignas(kVectorBytes) A found[L];
        store(found, sums_of_lanes<A>(sum), Full{});
        for (int j = 0; j < kRows && r + j < count; ++j) {
          __builtin_memcpy(products + (r + j) * products_row + g * kUnits<T> + v, found + j * kOthers,
                           kOthers * sizeof(A));
        }
      }
    }
  }
}
template <typename T>
void multiply_few(const T* matrix, int64_t row, int G, int64_t H, int64_t inner, int64_t u0, const acc_t<T>* x,
                  int64_t x_row, int count, acc_t<T>* products, int64_t products_row) {
  constexpr int kMost = kLanes<acc_t<T>> >= 16 ? 4 : kLanes<acc_t<T>> >= 4 ? 2 : 1;
  auto *const with = count == 1 ? &multiply_rows<1, T> : count == 2 ? &multiply_rows < kMost / 2 ? 2 : 1,
              T > : &multiply_rows<kMost, T>;
  with(matrix, row, G, H, inner, u0, x, x_row, count, products, products_row);
}

// The same for a panel of columns: up to kPanel rows x, transposed (pack_columns).
template <int V, typename T>
PYOPS_INLINE void multiply_columns_tile(const T* const* w, int64_t inner, const acc_t<T>* panel, acc_t<T>* sums) {
  using A = acc_t<T>;
  constexpr int R = 2 * kLeastRows, L = kLanes<A>, kPart = 128;
  Vec<A> sum[R][V] = {};
  for (int64_t k0 = 0; k0 < inner; k0 += kPart) {
    const int64_t part = inner - k0 < kPart ? inner - k0 : kPart;
    const A* from[R];
    alignas(kVectorBytes) A wide[sizeof(T) == sizeof(A) ? 1 : R * kPart];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if constexpr (sizeof(T) == sizeof(A)) {
        from[r] = w[r] + k0;
      } else {
        for (int64_t k = 0; k < part; k += L) {
          const int64_t left = part - k;
          store(wide + r * kPart + k,
                left >= L ? load(w[r] + k0 + k, Full{}) : load(w[r] + k0 + k, Partial{static_cast<int>(left)}), Full{});
        }
        from[r] = wide + r * kPart;
      }
    }
    for (int64_t k = 0; k < part; ++k, panel += kPanel<A>) {
      Vec<A> x[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) x[v] = load(panel + v * L, Full{});
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[r][v] += splat(from[r][k]) * x[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(sums + r * kPanel<A> + v * L, sum[r][v], Full{});
  }
}
template <typename T>
__attribute__((noinline)) void multiply_columns(const T* matrix, int64_t row, int G, int64_t H, int64_t inner,
                                                int64_t u0, const acc_t<T>* panel, int count, acc_t<T>* products,
                                                int64_t products_row) {
  using A = acc_t<T>;
  constexpr int R = 2 * kLeastRows, L = kLanes<A>, U = kUnits<T>;
  alignas(kVectorBytes) A sums[U * kPanel<A>];
  for (int g = 0; g < G; ++g) {
    for (int i = 0; i < U && u0 + i < round_up(H, L); i += R) {
      const T* w[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) w[r] = matrix + (g * H + (u0 + i + r < H ? u0 + i + r : H - 1)) * row;
      if (count > L) {
        multiply_columns_tile<2, T>(w, inner, panel, sums + i * kPanel<A>);
      } else {
        multiply_columns_tile<1, T>(w, inner, panel, sums + i * kPanel<A>);
      }
    }
    for (int c = 0; c < U; c += L) {
      for (int j = 0; j < count; j += L) {
        Vec<A> block[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) block[i] = load(sums + (c + i) * kPanel<A> + j, Full{});
        transpose<A>(block);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) {
          if (j + i < count) store(products + (j + i) * products_row + g * U + c, block[i], Full{});
        }
      }
    }
  }
}
// Up to kPanel rows as the columns of a panel.
template <typename T, typename X>
__attribute__((noinline)) void pack_columns(const X* rows, int64_t row, int count, int64_t inner, acc_t<T>* panel) {
  using A = acc_t<T>;
  pack_transposed<kPanel<A>, A, X>([&](int j) { return rows + j * row; }, count, inner, A(1), panel, 0);
}

// ---- norms ----

// Calls f(unit, product, value) for the vectors of the first `used` products of a row of [blocks, G, kUnits].
template <typename T, typename F>
PYOPS_INLINE void for_each_product(const acc_t<T>* row, int64_t blocks, int G, int used, int64_t H, F&& f) {
  for (int64_t k = 0; k < blocks; ++k) {
    for (int g = 0; g < used; ++g) {
      for_each_vector<T>(H, k * kUnits<T>, [&](int c, auto lanes) PYOPS_ALWAYS_INLINE {
        f(k * kUnits<T> + c, g, inside<acc_t<T>>(load(row + (k * G + g) * kUnits<T> + c, Full{}), lanes), lanes);
      });
    }
  }
}

template <typename T>
__attribute__((noinline)) void find_norm(const acc_t<T>* row, int64_t blocks, int G, int used, int64_t H, acc_t<T> eps,
                                         acc_t<T>& mean, acc_t<T>& rstd) {
  using A = acc_t<T>;
  const A n = static_cast<A>(used * H);
  Vec<A> sum{}, squares{};
  for_each_product<T>(row, blocks, G, used, H, [&](int64_t, int, Vec<A> v, auto) PYOPS_ALWAYS_INLINE { sum += v; });
  mean = reduce_add<A>(sum) / n;
  for_each_product<T>(row, blocks, G, used, H, [&](int64_t, int, Vec<A> v, auto lanes) PYOPS_ALWAYS_INLINE {
    const Vec<A> centred = inside<A>(v - mean, lanes);
    squares += centred * centred;
  });
  rstd = A(1) / __builtin_sqrt(reduce_add<A>(squares) / n + eps);
}

}  // namespace pyops::PYOPS_ISA
