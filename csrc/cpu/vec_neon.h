// The vector type on NEON of aarch64, which all its processors have: 4 lanes. See vec_avx512.h for what each
// function promises.
#pragma once

#include <arm_neon.h>

#include <bit>
#include <cstdint>

namespace ptk {
namespace PTK_ISA {

constexpr int kWidth = 4;

using F = float32x4_t;
using U = uint32x4_t;

inline F set(float v) { return vdupq_n_f32(v); }
inline U set_u(uint32_t v) { return vdupq_n_u32(v); }
inline U iota() { return U{0, 1, 2, 3}; }
inline F load(const float* p) { return vld1q_f32(p); }
inline F load(const Bf16* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16)); }
inline F load(const F16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
inline F load(const int8_t* p) {
  uint32_t four;
  __builtin_memcpy(&four, p, 4);
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four)));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}
inline void store(float* p, F v) { vst1q_f32(p, v); }
inline U load_u(const uint32_t* p) { return vld1q_u32(p); }
inline void store_u(uint32_t* p, U v) { vst1q_u32(p, v); }

inline F add(F a, F b) { return vaddq_f32(a, b); }
inline F sub(F a, F b) { return vsubq_f32(a, b); }
inline F mul(F a, F b) { return vmulq_f32(a, b); }
inline F div(F a, F b) { return vdivq_f32(a, b); }
inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
// Not vmaxq and vminq, which give NaN for a NaN in a.
inline F max(F a, F b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline F min(F a, F b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline uint32_t reduce_add(U a) { return vaddvq_u32(a); }
inline float reduce_max(F a) { return vmaxvq_f32(a); }
inline float reduce_halves(F a) { return vaddv_f32(vadd_f32(vget_low_f32(a), vget_high_f32(a))); }

inline uint32_t mask_bits(U m) { return vaddvq_u32(vandq_u32(m, U{1, 2, 4, 8})); }
inline uint32_t gt(F a, F b) { return mask_bits(vcgtq_f32(a, b)); }
inline uint32_t ge(F a, F b) { return mask_bits(vcgeq_f32(a, b)); }
inline uint32_t eq(F a, F b) { return mask_bits(vceqq_f32(a, b)); }
inline uint32_t is_nan(F a) { return mask_bits(vmvnq_u32(vceqq_f32(a, a))); }
inline F select(uint32_t mask, F a, F b) { return vbslq_f32(vtstq_u32(set_u(mask), U{1, 2, 4, 8}), a, b); }
inline uint32_t le_u(U a, U b) { return mask_bits(vcleq_u32(a, b)); }

inline U add_u(U a, U b) { return vaddq_u32(a, b); }
inline U sub_u(U a, U b) { return vsubq_u32(a, b); }
template <int kBits> inline U shift_left(U a) { return vshlq_n_u32(a, kBits); }
template <int kBits> inline U shift_right_signed(U a) {
  return vreinterpretq_u32_s32(vshrq_n_s32(vreinterpretq_s32_u32(a), kBits));
}
inline U bits(F a) { return vreinterpretq_u32_f32(a); }
inline F from_bits(U a) { return vreinterpretq_f32_u32(a); }
inline F int_to_float(U a) { return vcvtq_f32_s32(vreinterpretq_s32_u32(a)); }
inline F uint_to_float(U a) { return vcvtq_f32_u32(a); }

inline F clamped(F t) { return min(max(t, set(-126.0f)), set(126.0f)); }
inline F fraction(F t) { return sub(clamped(t), vrndmq_f32(clamped(t))); }
inline F times_exp2(F p, F t) {
  return from_bits(add_u(bits(p), shift_left<23>(vreinterpretq_u32_s32(vcvtmq_s32_f32(clamped(t))))));
}

constexpr int kWide = kWidth / 2;
inline uint64x2_t set_wide(uint32_t v) { return vdupq_n_u64(v); }
inline uint64x2_t load_wide(const uint32_t* p) { return vmovl_u32(vld1_u32(p)); }
inline uint64x2_t mul_wide(uint64x2_t a, uint64x2_t b) { return vmull_u32(vmovn_u64(a), vmovn_u64(b)); }
inline uint64x2_t upper_half(uint64x2_t a) { return vshrq_n_u64(a, 32); }
inline uint64x2_t xor3(uint64x2_t a, uint64x2_t b, uint64x2_t c) { return veorq_u64(veorq_u64(a, b), c); }
inline void store_interleaved(uint32_t* out, const uint64x2_t w[4]) {
  vst4_u32(out, {{vmovn_u64(w[0]), vmovn_u64(w[1]), vmovn_u64(w[2]), vmovn_u64(w[3])}});
}

inline int compress(F x, U id, uint32_t mask, float* x_out, uint32_t* id_out) {
  float xs[kWidth];
  uint32_t ids[kWidth];
  store(xs, x);
  store_u(ids, id);
  int n = 0;
  for (; mask; mask &= mask - 1, ++n) {
    const int lane = std::countr_zero(mask);
    x_out[n] = xs[lane];
    id_out[n] = ids[lane];
  }
  return n;
}

inline uint64x2_t mass_of(float32x2_t p) {
  return vcvtnq_u64_f64(vmulq_f64(vcvt_f64_f32(p), vdupq_n_f64(0x1p44)));
}
inline void store_mass(uint64_t* out, F p) {
  vst1q_u64(out, mass_of(vget_low_f32(p)));
  vst1q_u64(out + 2, mass_of(vget_high_f32(p)));
}

}  // namespace PTK_ISA
}  // namespace ptk
