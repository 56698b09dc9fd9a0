// The vector type on AVX2 with FMA and F16C: 8 lanes. See vec_avx512.h for what each function promises.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cstdint>

namespace ptk {
namespace PTK_ISA {

constexpr int kWidth = 8;

using F = __m256;
using U = __m256i;

inline F set(float v) { return _mm256_set1_ps(v); }
inline U set_u(uint32_t v) { return _mm256_set1_epi32(int(v)); }
inline U iota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline F load(const Bf16* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
inline F load(const F16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline F load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline void store(float* p, F v) { _mm256_storeu_ps(p, v); }
inline U load_u(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store_u(uint32_t* p, U v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }

inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline float reduce_max(F a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}
inline float reduce_halves(F a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

inline uint32_t reduce_add(U a) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
  return uint32_t(_mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1))));
}
inline uint32_t mask_bits(__m256 m) { return uint32_t(_mm256_movemask_ps(m)); }
inline __m256i mask_lanes(uint32_t mask) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(set_u(mask), lane), lane);
}
inline uint32_t gt(F a, F b) { return mask_bits(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
inline uint32_t ge(F a, F b) { return mask_bits(_mm256_cmp_ps(a, b, _CMP_GE_OQ)); }
inline uint32_t eq(F a, F b) { return mask_bits(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
inline uint32_t is_nan(F a) { return mask_bits(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
inline F select(uint32_t mask, F a, F b) {
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(mask_lanes(mask)));
}
inline uint32_t le_u(U a, U b) {
  return mask_bits(_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_min_epu32(a, b), a)));
}

inline U add_u(U a, U b) { return _mm256_add_epi32(a, b); }
inline U sub_u(U a, U b) { return _mm256_sub_epi32(a, b); }
template <int kBits> inline U shift_left(U a) { return _mm256_slli_epi32(a, kBits); }
template <int kBits> inline U shift_right_signed(U a) { return _mm256_srai_epi32(a, kBits); }
inline U bits(F a) { return _mm256_castps_si256(a); }
inline F from_bits(U a) { return _mm256_castsi256_ps(a); }
inline F int_to_float(U a) { return _mm256_cvtepi32_ps(a); }
inline F uint_to_float(U a) {
  // Both halves convert exactly, and the product is exact: one rounding, in the sum.
  const F high = _mm256_cvtepi32_ps(_mm256_srli_epi32(a, 16));
  const F low = _mm256_cvtepi32_ps(_mm256_and_si256(a, set_u(0xFFFF)));
  return _mm256_fmadd_ps(high, set(65536.0f), low);
}

inline F clamped(F t) { return min(max(t, set(-126.0f)), set(126.0f)); }
inline F fraction(F t) { return sub(clamped(t), _mm256_floor_ps(clamped(t))); }
inline F times_exp2(F p, F t) {
  return from_bits(add_u(bits(p), shift_left<23>(_mm256_cvtps_epi32(_mm256_floor_ps(clamped(t))))));
}

constexpr int kWide = kWidth / 2;
inline U set_wide(uint32_t v) { return _mm256_set1_epi32(int(v)); }
inline U load_wide(const uint32_t* p) {
  return _mm256_cvtepu32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline U mul_wide(U a, U b) { return _mm256_mul_epu32(a, b); }
inline U upper_half(U a) { return _mm256_shuffle_epi32(a, 0xF5); }
inline U xor3(U a, U b, U c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline void store_interleaved(uint32_t* out, const U w[4]) {
  const U a = _mm256_blend_epi32(w[0], _mm256_slli_epi64(w[1], 32), 0xAA);
  const U b = _mm256_blend_epi32(w[2], _mm256_slli_epi64(w[3], 32), 0xAA);
  const U even = _mm256_unpacklo_epi64(a, b), odd = _mm256_unpackhi_epi64(a, b);
  store_u(out, _mm256_permute2x128_si256(even, odd, 0x20));
  store_u(out + kWidth, _mm256_permute2x128_si256(even, odd, 0x31));
}

inline int compress(F x, U id, uint32_t mask, float* x_out, uint32_t* id_out) {
  alignas(32) float xs[8];
  alignas(32) uint32_t ids[8];
  _mm256_store_ps(xs, x);
  _mm256_store_si256(reinterpret_cast<__m256i*>(ids), id);
  int n = 0;
  for (; mask; mask &= mask - 1, ++n) {
    const int lane = std::countr_zero(mask);
    x_out[n] = xs[lane];
    id_out[n] = ids[lane];
  }
  return n;
}

inline __m256i mass_of(__m128 p) {
  const __m256d sum = _mm256_fmadd_pd(_mm256_cvtps_pd(p), _mm256_set1_pd(0x1p44), _mm256_set1_pd(0x1p52));
  return _mm256_sub_epi64(_mm256_castpd_si256(sum), _mm256_set1_epi64x(int64_t(0x433) << 52));
}
inline void store_mass(uint64_t* out, F p) {
  auto* to = reinterpret_cast<__m256i*>(out);
  _mm256_storeu_si256(to, mass_of(_mm256_castps256_ps128(p)));
  _mm256_storeu_si256(to + 1, mass_of(_mm256_extractf128_ps(p, 1)));
}

}  // namespace PTK_ISA
}  // namespace ptk
