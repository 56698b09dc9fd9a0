// Bins of x: counts and masses by bin, where the tokens are too many to sort.
#pragma once

#include "../common/order.h"

namespace ptk {

constexpr int kBinBits = 10;
constexpr uint32_t kBins = 1u << kBinBits;

// The range [low, high] of keys in bins, the highest first. The first binning of a row is linear in x,
// which spreads noise evenly; later ones go by the bits of the key, so that they come to an end.
struct Binning {
  uint32_t low, high;
  bool linear;
  float scale;  // linear: bins per unit of x
  int shift;    // else: bits of the key that a bin spans

  // The bin of x, kBins where x is outside the range.
  PTK_HOST_DEVICE uint32_t bin(float x) const {
    const uint32_t key = key_of(x);
    if (key < low || key > high) return kBins;
    if (!linear) return (high - key) >> shift;
    const float steps = (value_of(high) - x) * scale;
    return steps < float(kBins - 1) ? uint32_t(steps) : kBins - 1;
  }

  // Makes the range that of bin b: from the lowest key with bin <= b to the highest with bin >= b.
  PTK_HOST_DEVICE void zoom_into(uint32_t b) {
    uint32_t from = low, to = high;
    for (uint32_t below = high; from < below;) {
      const uint32_t middle = from + (below - from) / 2;
      if (bin(value_of(middle)) <= b) below = middle; else from = middle + 1;
    }
    for (uint32_t above = low; above < to;) {
      const uint32_t middle = to - (to - above) / 2;
      if (bin(value_of(middle)) >= b) above = middle; else to = middle - 1;
    }
    low = from;
    high = to;
  }
};

PTK_HOST_DEVICE Binning key_binning(uint32_t low, uint32_t high) {
  int shift = 0;
  while ((high - low) >> shift >= kBins) ++shift;
  return {low, high, false, 0.0f, shift};
}

// The bins reach `span` below the highest x; what is lower goes into the last one.
PTK_HOST_DEVICE Binning linear_binning(uint32_t low, uint32_t high, float span) {
  const float scale = float(kBins) / span;
  // There is no such scale for a span of 0, or one past fp32.
  if (!(scale > 0.0f && scale < FLT_MAX)) return key_binning(low, high);
  return {low, high, true, scale, 0};
}

}  // namespace ptk
