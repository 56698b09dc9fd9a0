// Keyed noise: Philox4x32-10 with the contract's counter layout, and the uniform numbers made of it
// (docs/contracts.md, Randomness).
// Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define PTK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PTK_HOST_DEVICE inline
#endif

#if defined(__CUDA_ARCH__)
#define PTK_PRAGMA(text) _Pragma(#text)
#define PTK_UNROLL(times) PTK_PRAGMA(unroll times)
#else
#define PTK_UNROLL(times)
#endif

namespace ptk {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// How often a word of 0 is drawn again at most: u stays above 2^-97, an fp32 normal.
constexpr int kMaxRetries = 2;

enum Stream : uint32_t { kStreamSample, kStreamDraft, kStreamAccept, kStreamResidual, kStreamBonus };

// What a row's noise depends on, apart from the token.
struct NoiseKey {
  uint32_t key0, key1;            // the request's seed
  uint32_t position_lo, position_hi;
  uint32_t stream;

  PTK_HOST_DEVICE uint32_t last(int retry) const { return stream | uint32_t(retry) << 8; }
};

PTK_HOST_DEVICE NoiseKey make_noise_key(int64_t seed, int64_t position, uint32_t stream) {
  return {uint32_t(seed), uint32_t(uint64_t(seed) >> 32), uint32_t(position),
          uint32_t(uint64_t(position) >> 32), stream};
}

// The words of the four tokens from 4 * counter.
PTK_HOST_DEVICE void philox_words(const NoiseKey& key, uint32_t counter, int retry, uint32_t words[4]) {
  uint32_t c0 = counter, c1 = key.position_lo, c2 = key.position_hi, c3 = key.last(retry);
  uint32_t k0 = key.key0, k1 = key.key1;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t(kPhiloxMultiplier0) * c0;
    const uint64_t p1 = uint64_t(kPhiloxMultiplier1) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// The word of one token.
PTK_HOST_DEVICE uint32_t philox_word(const NoiseKey& key, uint32_t token_id, int retry) {
  uint32_t w[4];
  philox_words(key, token_id >> 2, retry, w);
  return token_id & 2 ? (token_id & 1 ? w[3] : w[2]) : (token_id & 1 ? w[1] : w[0]);
}

// The uniform number of one token. A word of 0 is drawn again, finer.
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

// The largest word that can win: for any larger one, a score of at most `top` plus its noise stays below
// `best`. Noise g > r needs u < exp(-r); the next power of 2 above exp(-r) leaves room for every rounding.
PTK_HOST_DEVICE uint32_t winning_word(float top, float best) {
  const float r = best - top;  // inf or NaN while there is no score yet
  const float slack = 1e-3f + 1e-5f * std::fabs(top) + 1e-5f * std::fabs(best);
  const float power = std::ceil((slack - r) * 1.4426951f) + 32.0f;
  if (!(power < 32.0f)) return UINT32_MAX;
  // Words of 0 are drawn again, finer: they may always win.
  return power <= 0.0f ? 0u : (1u << int(power));
}

}  // namespace ptk
