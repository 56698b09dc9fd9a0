// The vector type of width 1: any processor, and one lane of a GPU. See cpu/vec_avx512.h for what each
// function promises.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtypes.h"

namespace ptk {
namespace PTK_ISA {

constexpr int kWidth = 1;

using F = float;
using U = uint32_t;

PTK_HOST_DEVICE F set(float v) { return v; }
PTK_HOST_DEVICE U set_u(uint32_t v) { return v; }
PTK_HOST_DEVICE U iota() { return 0; }
PTK_HOST_DEVICE F load(const float* p) { return *p; }
PTK_HOST_DEVICE F load(const Bf16* p) { return bf16_to_float(p->bits); }
PTK_HOST_DEVICE F load(const F16* p) { return half_to_float(p->bits); }
PTK_HOST_DEVICE F load(const int8_t* p) { return float(*p); }
PTK_HOST_DEVICE void store(float* p, F v) { *p = v; }
PTK_HOST_DEVICE U load_u(const uint32_t* p) { return *p; }
PTK_HOST_DEVICE void store_u(uint32_t* p, U v) { *p = v; }

PTK_HOST_DEVICE F add(F a, F b) { return a + b; }
PTK_HOST_DEVICE F sub(F a, F b) { return a - b; }
PTK_HOST_DEVICE F mul(F a, F b) { return a * b; }
PTK_HOST_DEVICE F div(F a, F b) { return a / b; }
PTK_HOST_DEVICE F fma(F a, F b, F c) { return std::fma(a, b, c); }
// Neither is called with NaN, and both zeros are +0: a GPU's own instruction gives the same.
#if defined(__CUDA_ARCH__)
PTK_HOST_DEVICE F max(F a, F b) { return fmaxf(a, b); }
PTK_HOST_DEVICE F min(F a, F b) { return fminf(a, b); }
#else
PTK_HOST_DEVICE F max(F a, F b) { return a > b ? a : b; }
PTK_HOST_DEVICE F min(F a, F b) { return a < b ? a : b; }
#endif
PTK_HOST_DEVICE uint32_t reduce_add(U a) { return a; }
PTK_HOST_DEVICE float reduce_max(F a) { return a; }
PTK_HOST_DEVICE float reduce_halves(F a) { return a; }

PTK_HOST_DEVICE uint32_t gt(F a, F b) { return a > b; }
PTK_HOST_DEVICE uint32_t ge(F a, F b) { return a >= b; }
PTK_HOST_DEVICE uint32_t eq(F a, F b) { return a == b; }
PTK_HOST_DEVICE uint32_t is_nan(F a) { return a != a; }
PTK_HOST_DEVICE F select(uint32_t mask, F a, F b) { return mask ? a : b; }
PTK_HOST_DEVICE uint32_t le_u(U a, U b) { return a <= b; }

PTK_HOST_DEVICE U add_u(U a, U b) { return a + b; }
PTK_HOST_DEVICE U sub_u(U a, U b) { return a - b; }
template <int kBits> PTK_HOST_DEVICE U shift_left(U a) { return a << kBits; }
template <int kBits> PTK_HOST_DEVICE U shift_right_signed(U a) { return uint32_t(int32_t(a) >> kBits); }
PTK_HOST_DEVICE U bits(F a) { return bits_of_float(a); }
PTK_HOST_DEVICE F from_bits(U a) { return float_of_bits(a); }
PTK_HOST_DEVICE F int_to_float(U a) { return float(int32_t(a)); }
PTK_HOST_DEVICE F uint_to_float(U a) { return float(a); }

PTK_HOST_DEVICE F clamped(F t) { return t > -126.0f ? (t < 126.0f ? t : 126.0f) : -126.0f; }
PTK_HOST_DEVICE F fraction(F t) { return clamped(t) - std::floor(clamped(t)); }
PTK_HOST_DEVICE F times_exp2(F p, F t) {
  return from_bits(bits(p) + shift_left<23>(uint32_t(int32_t(std::floor(clamped(t))))));
}

constexpr int kWide = 1;
PTK_HOST_DEVICE uint64_t set_wide(uint32_t v) { return v; }
PTK_HOST_DEVICE uint64_t load_wide(const uint32_t* p) { return *p; }
PTK_HOST_DEVICE uint64_t mul_wide(uint64_t a, uint64_t b) { return (a & UINT32_MAX) * (b & UINT32_MAX); }
PTK_HOST_DEVICE uint64_t upper_half(uint64_t a) { return a >> 32; }
PTK_HOST_DEVICE uint64_t xor3(uint64_t a, uint64_t b, uint64_t c) { return a ^ b ^ c; }
PTK_HOST_DEVICE void store_interleaved(uint32_t* out, const uint64_t w[4]) {
  for (int i = 0; i < 4; ++i) out[i] = uint32_t(w[i]);
}

PTK_HOST_DEVICE int compress(F x, U id, uint32_t mask, float* x_out, uint32_t* id_out) {
  *x_out = x;
  *id_out = id;
  return int(mask);
}

PTK_HOST_DEVICE void store_mass(uint64_t* out, F p) { *out = uint64_t(std::nearbyint(double(p) * 0x1p44)); }

}  // namespace PTK_ISA
}  // namespace ptk
