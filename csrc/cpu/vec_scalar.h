// The vector type of width 1: any processor. See vec_avx512.h for what each function promises.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace ptk {
namespace PTK_ISA {

constexpr int kWidth = 1;

using F = float;
using U = uint32_t;

inline F set(float v) { return v; }
inline U set_u(uint32_t v) { return v; }
inline U iota() { return 0; }
inline F load(const float* p) { return *p; }
inline F load(const Bf16* p) { return bf16_to_float(p->bits); }
inline F load(const F16* p) { return half_to_float(p->bits); }
inline void store(float* p, F v) { *p = v; }
inline U load_u(const uint32_t* p) { return *p; }
inline void store_u(uint32_t* p, U v) { *p = v; }

inline F add(F a, F b) { return a + b; }
inline F sub(F a, F b) { return a - b; }
inline F mul(F a, F b) { return a * b; }
inline F div(F a, F b) { return a / b; }
inline F fma(F a, F b, F c) { return std::fma(a, b, c); }
inline F max(F a, F b) { return a > b ? a : b; }
inline F min(F a, F b) { return a < b ? a : b; }
inline uint32_t reduce_add(U a) { return a; }
inline float reduce_max(F a) { return a; }

inline uint32_t gt(F a, F b) { return a > b; }
inline uint32_t ge(F a, F b) { return a >= b; }
inline uint32_t eq(F a, F b) { return a == b; }
inline uint32_t is_nan(F a) { return a != a; }
inline F select(uint32_t mask, F a, F b) { return mask ? a : b; }
inline uint32_t le_u(U a, U b) { return a <= b; }
inline U select_u(uint32_t mask, U a, U b) { return mask ? a : b; }

inline U add_u(U a, U b) { return a + b; }
inline U sub_u(U a, U b) { return a - b; }
inline U xor_u(U a, U b) { return a ^ b; }
template <int kBits> inline U shift_left(U a) { return a << kBits; }
template <int kBits> inline U shift_right_signed(U a) { return uint32_t(int32_t(a) >> kBits); }
inline U bits(F a) { return std::bit_cast<uint32_t>(a); }
inline F from_bits(U a) { return std::bit_cast<float>(a); }
inline U to_int_down(F a) { return uint32_t(int32_t(a)); }
inline F int_to_float(U a) { return float(int32_t(a)); }
inline F uint_to_float(U a) { return float(a); }

inline void multiply(U a, uint32_t b, U& high, U& low) {
  const uint64_t product = uint64_t(a) * b;
  high = uint32_t(product >> 32);
  low = uint32_t(product);
}
inline void interleave4(const U w[4], U out[4]) {
  for (int i = 0; i < 4; ++i) out[i] = w[i];
}

inline int compress(F x, U id, uint32_t mask, float* x_out, uint32_t* id_out) {
  *x_out = x;
  *id_out = id;
  return int(mask);
}

inline void store_mass(uint64_t* out, F p) { *out = uint64_t(std::nearbyint(double(p) * 0x1p44)); }

}  // namespace PTK_ISA
}  // namespace ptk
