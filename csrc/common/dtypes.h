// The logits' dtypes, and their exact conversion to fp32.
#pragma once

#include <cstdint>

#include "philox.h"

namespace ptk {

// Kept apart from integers so that a load picks its conversion by type.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

enum Dtype : int32_t { kDtypeF32 = 0, kDtypeF16 = 1, kDtypeBf16 = 2 };

PTK_HOST_DEVICE float float_of_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }
PTK_HOST_DEVICE uint32_t bits_of_float(float value) { return __builtin_bit_cast(uint32_t, value); }

PTK_HOST_DEVICE float bf16_to_float(uint16_t bits) { return float_of_bits(uint32_t(bits) << 16); }

PTK_HOST_DEVICE float half_to_float(uint16_t half) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
#else
  const uint32_t sign = uint32_t(half & 0x8000u) << 16, magnitude = half & 0x7FFFu;
  if (magnitude >= 0x7C00u) return float_of_bits(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  // Subnormals through an integer: a flush-to-zero mode of the processor must not reach them.
  const float value = magnitude < 0x400u ? float(magnitude) * 0x1p-24f
                                         : float_of_bits((magnitude << 13) + (112u << 23));
  return float_of_bits(sign | bits_of_float(value));
#endif
}

PTK_HOST_DEVICE float number(float value) { return value; }
PTK_HOST_DEVICE float number(Bf16 value) { return bf16_to_float(value.bits); }
PTK_HOST_DEVICE float number(F16 value) { return half_to_float(value.bits); }

// One logit of a row of any dtype.
PTK_HOST_DEVICE float logit_at(const void* row, int32_t dtype, int64_t i) {
  switch (dtype) {
    case kDtypeBf16: return number(static_cast<const Bf16*>(row)[i]);
    case kDtypeF16: return number(static_cast<const F16*>(row)[i]);
    default: return static_cast<const float*>(row)[i];
  }
}

}  // namespace ptk
