// The race that draws a token: the argmax of score + keyed Gumbel noise, lowest id on ties.
#pragma once

#include "order.h"
#include "philox.h"

namespace ptk {

// Uniform of one token, with its retries.
PTK_HOST_DEVICE float uniform_of(const NoiseKey& key, uint32_t token_id) {
  float scale = 0x1p-32f;
  for (int retry = 0;; ++retry, scale *= 0x1p-32f) {
    const uint32_t word = philox_word(key, token_id, retry);
    if (word != 0 || retry == kMaxRetries) {
      const float u = std::fma(float(word), scale, 0.5f * scale);
      return u < 1.0f - 0x1p-24f ? u : 1.0f - 0x1p-24f;
    }
  }
}

// An upper bound of the words that can win for a score of at most `top`: above it the noise is too
// small to pass `best`. g > r needs u < exp(-r); the power of 2 above exp(-r) leaves room for every
// rounding.
PTK_HOST_DEVICE uint32_t winning_word(float top, float best) {
  const float r = best - top;  // may be inf or NaN (nothing offered yet)
  const float slack = 1e-3f + 1e-5f * std::fabs(top) + 1e-5f * std::fabs(best);
  const float power = std::ceil((slack - r) * 1.4426951f) + 32.0f;
  if (!(power < 32.0f)) return UINT32_MAX;
  // Words of 0 are drawn again, finer: they may always win.
  return power <= 0.0f ? 0u : (1u << int(power));
}

}  // namespace ptk
