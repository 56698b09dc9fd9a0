// The vector type on AVX-512 (F, BW, DQ, VL): 16 lanes.
// Every function is one IEEE operation per lane, so all widths give the same bits.
// Masks are one bit per lane, lane 0 lowest.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cstdint>

namespace ptk {
namespace PTK_ISA {

constexpr int kWidth = 16;

using F = __m512;
using U = __m512i;

inline F set(float v) { return _mm512_set1_ps(v); }
inline U set_u(uint32_t v) { return _mm512_set1_epi32(int(v)); }
inline U iota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline F load(const Bf16* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
inline F load(const F16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline F load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline U load_u(const uint32_t* p) { return _mm512_loadu_si512(p); }
inline void store_u(uint32_t* p, U v) { _mm512_storeu_si512(p, v); }

inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
// a > b ? a : b, so NaN in a gives b.
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
// Modulo 2^32. Not _mm512_reduce_add_epi32: gcc writes it with signed additions, whose overflow is
// undefined without -fwrapv.
inline uint32_t reduce_add(U a) {
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
  return uint32_t(_mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1))));
}
inline float reduce_max(F a) { return _mm512_reduce_max_ps(a); }
// Halves added lane by lane, down to one.
inline float reduce_halves(F a) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

// Comparisons are false for NaN.
inline uint32_t gt(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline uint32_t ge(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline uint32_t eq(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline uint32_t is_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
inline F select(uint32_t mask, F a, F b) { return _mm512_mask_blend_ps(__mmask16(mask), b, a); }
inline uint32_t le_u(U a, U b) { return _mm512_cmple_epu32_mask(a, b); }

inline U add_u(U a, U b) { return _mm512_add_epi32(a, b); }
inline U sub_u(U a, U b) { return _mm512_sub_epi32(a, b); }
template <int kBits> inline U shift_left(U a) { return _mm512_slli_epi32(a, kBits); }
template <int kBits> inline U shift_right_signed(U a) { return _mm512_srai_epi32(a, kBits); }
inline U bits(F a) { return _mm512_castps_si512(a); }
inline F from_bits(U a) { return _mm512_castsi512_ps(a); }
inline F int_to_float(U a) { return _mm512_cvtepi32_ps(a); }
// Rounds to nearest.
inline F uint_to_float(U a) { return _mm512_cvtepu32_ps(a); }

// t - floor(t), and p 2^floor(t): where t is outside [-126, 126], at most 2^-125, or at least 2^126.
inline F fraction(F t) { return _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
inline F times_exp2(F p, F t) { return _mm512_scalef_ps(p, t); }

// kWide lanes of 64 bits, of which the upper half may hold anything. (A shuffle: shifts wait for the port that
// multiplies.)
constexpr int kWide = kWidth / 2;
inline U set_wide(uint32_t v) { return _mm512_set1_epi32(int(v)); }
inline U load_wide(const uint32_t* p) {
  return _mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline U mul_wide(U a, U b) { return _mm512_mul_epu32(a, b); }
inline U upper_half(U a) { return _mm512_shuffle_epi32(a, _MM_PERM_DDBB); }
inline U xor3(U a, U b, U c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
// The lower halves, in turn: w[0][0] w[1][0] w[2][0] w[3][0] w[0][1] ...
inline void store_interleaved(uint32_t* out, const U w[4]) {
  const U a = _mm512_mask_blend_epi32(0xAAAA, w[0], _mm512_slli_epi64(w[1], 32));
  const U b = _mm512_mask_blend_epi32(0xAAAA, w[2], _mm512_slli_epi64(w[3], 32));
  const U even = _mm512_unpacklo_epi64(a, b), odd = _mm512_unpackhi_epi64(a, b);
  const U low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi64(even, low, odd));
  _mm512_storeu_si512(out + kWidth, _mm512_permutex2var_epi64(even, high, odd));
}

// Writes the masked lanes in order, returns their number; may write kWidth entries.
inline int compress(F x, U id, uint32_t mask, float* x_out, uint32_t* id_out) {
  _mm512_storeu_ps(x_out, _mm512_maskz_compress_ps(__mmask16(mask), x));
  _mm512_storeu_si512(id_out, _mm512_maskz_compress_epi32(__mmask16(mask), id));
  return std::popcount(mask);
}

// round(2^44 p) per lane: 2^52 + q is exact in fp64, and its bit pattern is that of 2^52 plus q.
inline __m512i mass_of(__m256 p) {
  const __m512d sum = _mm512_fmadd_pd(_mm512_cvtps_pd(p), _mm512_set1_pd(0x1p44), _mm512_set1_pd(0x1p52));
  return _mm512_sub_epi64(_mm512_castpd_si512(sum), _mm512_set1_epi64(int64_t(0x433) << 52));
}
inline void store_mass(uint64_t* out, F p) {
  _mm512_storeu_si512(out, mass_of(_mm512_castps512_ps256(p)));
  _mm512_storeu_si512(out + 8, mass_of(_mm512_extractf32x8_ps(p, 1)));
}

}  // namespace PTK_ISA
}  // namespace ptk
