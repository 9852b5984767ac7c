// 16-bit floating-point conversions in integer arithmetic: to nearest even, infinities and NaN kept.
#pragma once

#include <bit>
#include <cstdint>

namespace pyops::simt {

inline float bf16_to_float(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }

inline uint16_t float_to_bf16(float v) {
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // rounding could carry a NaN into infinity
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// Three ways and a choice, without branches, so that the compiler makes vectors of a loop over it.
inline float f16_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7fff;
  const uint32_t special = 0x7f800000u | (rest & 0x3ff) << 13, normal = (rest << 13) + ((127 - 15) << 23);
  const float half = std::bit_cast<float>(0x3f000000u + rest);  // 0.5f, whose last bit is 2^-24
  const uint32_t subnormal = std::bit_cast<uint32_t>(half - 0.5f);
  const uint32_t finite = rest >= 0x0400 ? normal : subnormal;
  return std::bit_cast<float>(sign | (rest >= 0x7c00 ? special : finite));
}

inline uint16_t float_to_f16(float v) {
  const uint32_t bits = std::bit_cast<uint32_t>(v), rest = bits & 0x7fffffffu;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (rest > 0x7f800000u) return 0x7fff;
  if (rest >= 0x477ff000u) return sign | 0x7c00;  // 65520 and above round to infinity
  if (rest >= 0x38800000u) {                      // normal: 2^-14 and above
    const uint32_t shifted = rest - ((127 - 15) << 23);
    return uint16_t(sign | (shifted + 0xfff + ((shifted >> 13) & 1)) >> 13);
  }
  // Subnormal: in the sum the last bit of 0.5f is 2^-24, the spacing of f16 subnormals, so the addition rounds.
  const float sum = std::bit_cast<float>(rest) + 0.5f;
  return uint16_t(sign | (std::bit_cast<uint32_t>(sum) - std::bit_cast<uint32_t>(0.5f)));
}

}  // namespace pyops::simt
