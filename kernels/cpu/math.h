// Vector functions. Errors are in units in the last place of the result, over all finite arguments.
#pragma once
#include "simd.h"

namespace pyops::PYOPS_ISA {

// 2^f = 1 + f P(f) on [-1/2, 1/2]: P by Remez, for double by Taylor.
constexpr float kExp2Float[] = {0.69314720286f,  0.24022647914f,   0.055503324712f,
                                0.009618437357f, 0.0013398874394f, 0.00015353362069f};
constexpr double kExp2Double[] = {0.693147180559945309417,    0.240226506959100712333,    0.0555041086648215799531,
                                  0.00961812910762847716198,  0.00133335581464284434234,  0.000154035303933816099544,
                                  1.52527338040598402800e-05, 1.32154867901443094884e-06, 1.01780860092396997275e-07,
                                  7.05491162080112332987e-09, 4.44553827187081149760e-10, 2.56784359934882051420e-11,
                                  1.36914888539041288881e-12};

template <typename A, int N>
PYOPS_INLINE Vec<A> polynomial(Vec<A> x, const A (&c)[N]) {
  Vec<A> p = splat(c[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) p = p * x + c[i];
  return p;
}

template <typename A>
struct Float;
template <>
struct Float<float> {
  using bits = LaneIndex<float>::type;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLeast = -126.0f;      // of the exponents of normal numbers
  static constexpr int kMantissa = 23;
};
template <>
struct Float<double> {
  using bits = LaneIndex<double>::type;
  static constexpr double kRound = 6755399441055744.0;
  static constexpr double kLeast = -1022.0;
  static constexpr int kMantissa = 52;
};

// 2^x for x <= 128 (1024). 1 ulp. Results below the least normal number are 0; 2^0 is exactly 1, 2^-inf 0, 2^NaN NaN.
template <typename A>
PYOPS_INLINE Vec<A> exp2(Vec<A> x) {
  using F = Float<A>;
  const Vec<A> shifted = x + F::kRound, f = x - (shifted - F::kRound);
  Vec<A> p;
  if constexpr (sizeof(A) == 8) {
    p = polynomial<A>(f, kExp2Double);
  } else {
    p = polynomial<A>(f, kExp2Float);
  }
  p = p * f + A(1);
  const auto scaled = bit_cast<typename F::bits>(p) + (bit_cast<typename F::bits>(shifted) << F::kMantissa);
  // The sum of bits would make a number of a NaN.
  return x < F::kLeast ? Vec<A>{} : x == x ? bit_cast<Vec<A>>(scaled) : x;
}

// b^x = (1 + p) power with |p| <= 0.42, for b^x within the exponents of normal numbers. log2(b) is given as a number
// and what it lacks, so that p has a small relative error however large x is.
template <typename A>
struct Power {
  Vec<A> p, power;
};
template <typename A>
PYOPS_INLINE Power<A> power_parts(Vec<A> x, A log, A rest) {
  using F = Float<A>;
  const Vec<A> shifted = x * log + F::kRound, n = shifted - F::kRound;
  const Vec<A> f = x * rest + (x * log - n);
  Vec<A> p;
  if constexpr (sizeof(A) == 8) {
    p = polynomial<A>(f, kExp2Double);
  } else {
    p = polynomial<A>(f, kExp2Float);
  }
  const auto one = bit_cast<typename F::bits>(splat(A(1)));
  return {p * f, bit_cast<Vec<A>>((bit_cast<typename F::bits>(shifted) << F::kMantissa) + one)};
}

// log2(e), rounded, and the rest of it.
template <typename A>
constexpr A kLog2E = A(1.44269504088896340736);
template <typename A>
constexpr A kLog2ERest = A(sizeof(A) == 8 ? 2.0355273740931033e-17 : 1.925962991126617e-8);

// 1 / x for 1 <= x <= 2^126 + 1; 1 ulp.
template <typename A>
PYOPS_INLINE Vec<A> reciprocal(Vec<A> x) {
#if PYOPS_VECTOR_BYTES == 64
  if constexpr (sizeof(A) == 4) {
    const Vec<float> near = bit_cast<Vec<float>>(_mm512_rcp14_ps(bit_cast<__m512>(x)));
    return near + near * (A(1) - x * near);
  }
#endif
  return A(1) / x;
}

template <typename A>
PYOPS_INLINE Vec<A> within(Vec<A> x, A bound) {
  return minimum(splat(bound), maximum(splat(-bound), x));
}

// 1 / (1 + e^-x), 2 ulp; not below the least normal number.
template <typename A>
PYOPS_INLINE Vec<A> sigmoid(Vec<A> x) {
  const Power<A> e = power_parts<A>(within<A>(x, A(sizeof(A) == 8 ? 708 : 87)), -kLog2E<A>, -kLog2ERest<A>);
  return reciprocal<A>(A(1) + (e.power + e.p * e.power));
}

// tanh x = x + x^3 P(x^2) on [-5/8, 5/8], by Remez.
constexpr float kTanhFloat[] = {-0.33333283925284f, 0.13331491286994f, -0.05374349808185f, 0.0206505872999530f,
                                -0.0057170450593452f};
constexpr double kTanhDouble[] = {-0.33333333333333332505,    0.13333333333333163951,      -0.053968253968132780139,
                                  0.021869488531783602364,    -0.0088632354367481895645,   0.0035921267583116353872,
                                  -0.0014558225018663791373,  0.00058995030964622516656,   -0.00023877465937067847041,
                                  0.000095760218063274870312, -0.000036639554066360099996, 0.000011807117546518870153,
                                  -2.2767174226595065295e-6};

// 2 ulp; 1 - 2 / (e^2|x| + 1) beyond 5/8.
template <typename A>
PYOPS_INLINE Vec<A> tanh(Vec<A> x) {
  const Vec<A> magnitude = x < A(0) ? -x : x, z = x * x;
  Vec<A> small;
  if constexpr (sizeof(A) == 8) {
    small = polynomial<A>(z, kTanhDouble);
  } else {
    small = polynomial<A>(z, kTanhFloat);
  }
  small = x + x * z * small;
  const Vec<A> held = minimum(splat(A(sizeof(A) == 8 ? 20 : 10)), magnitude);
  const Power<A> e = power_parts<A>(held, 2 * kLog2E<A>, 2 * kLog2ERest<A>);
  const Vec<A> large = A(1) - A(2) * reciprocal<A>(A(1) + (e.power + e.p * e.power));
  return magnitude < A(0.625) ? small : x < A(0) ? -large : large;
}

}  // namespace pyops::PYOPS_ISA
