// What the tiles' maxima say without a look at the tokens: bounds of the cutoff and of the mass.
#pragma once

namespace ptk {
namespace PTK_ISA {

constexpr float kLowest = -FLT_MAX;  // masked tokens are below it

// A prefix of the order: x > this x, or x equal and id <= this id.
struct Prefix {
  float x;
  uint32_t id;
  uint32_t count;
  uint64_t mass;
};

// A prefix is long enough when it has this many tokens or this much mass.
struct Need {
  uint32_t count;
  uint64_t mass;
  bool met(uint32_t c, uint64_t m) const { return c >= count || m >= mass; }
};

inline uint32_t key_of(float x) { return order_key(std::bit_cast<uint32_t>(x)); }
inline float value_of(uint32_t key) {
  return std::bit_cast<float>(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

// The tiles' maxima, which are tokens themselves, in bins of an eighth of a factor 2 in mass.
struct TileBins {
  uint32_t counts[kBoundBins] = {};
  uint64_t mass[kBoundBins] = {};
};

// Bins the tiles with a maximum of at least `low`; their bins are left in s.bins.
inline void bin_tiles(const Row& row, float low, Exponent e, Scratch& s, TileBins& out) {
  alignas(64) uint64_t q[kTile];
  const float scale = 8.0f * e.hi;
  for (int t0 = 0; t0 < row.tiles; t0 += kTile) {
    const int n = std::min(kTile, row.tiles - t0);
    masses(row.tile_max + t0, (n + kWidth - 1) / kWidth * kWidth, row.max, e, q);
    for (int i = 0; i < n; ++i) {
      if (!(row.tile_max[t0 + i] >= low)) continue;
      const float steps = (row.max - row.tile_max[t0 + i]) * scale;
      const int bin = steps < float(kBoundBins - 1) ? int(steps) : kBoundBins - 1;
      s.bins[t0 + i] = uint8_t(bin);
      ++out.counts[bin];
      out.mass[bin] += q[i];
    }
  }
}

// A value that the last token of the shortest prefix meeting `need` is not below: the tiles' maxima
// above a value bound the count and the mass above it from below.
inline float tile_bound(const Row& row, float low, const Need& need, Exponent e, Scratch& s) {
  TileBins bins;
  bin_tiles(row, low, e, s, bins);
  uint32_t count = 0;
  uint64_t sum = 0;
  for (int b = 0; b < kBoundBins; ++b) {
    if (!need.met(count += bins.counts[b], sum += bins.mass[b])) continue;
    float bound = row.max;
    for (int t = 0; t < row.tiles; ++t) {
      const float m = row.tile_max[t];
      if (m >= low && s.bins[t] <= b && m < bound) bound = m;
    }
    return bound;
  }
  return low;
}

// Bounds of the whole row's mass: the likeliest tiles are summed, the others bounded by the maxima
// of their lanes.
struct MassBounds {
  uint64_t low, high;
};

// Sums the masses of vectors that come one by one.
class VectorSum {
 public:
  void add(F p) {
    sum_.add(p);
    if (++vectors_ == kTile / kWidth) flush();
  }
  uint64_t total() {
    while (vectors_ > 0) add(set(0.0f));
    return total_;
  }

 private:
  void flush() {
    total_ += sum_.total();
    sum_ = Mass();
    vectors_ = 0;
  }
  Mass sum_;
  int vectors_ = 0;
  uint64_t total_ = 0;
};

inline MassBounds mass_bounds(const Row& row, Exponent e, Scratch& s) {
  TileBins bins;
  bin_tiles(row, kLowest, e, s, bins);
  uint64_t rest = 0, seen = 0;
  for (uint64_t m : bins.mass) rest += m;
  int last = 0;  // the last bin that is summed; by the tiles' maxima 1 part in 64 is left to the others
  for (; last < kBoundBins - 1; ++last) {
    seen += bins.mass[last];
    rest -= bins.mass[last];
    if (rest * kTile <= seen >> 6) break;
  }
  uint64_t lows[kMaxChunks], others[kMaxChunks];
  const int chunks = over_tiles(row.parallel, row.tiles, [&](int chunk, int begin, int end) {
    uint64_t low = 0;
    VectorSum lanes;
    for (int t = begin; t < end; ++t) {
      if (!(row.tile_max[t] >= kLowest)) continue;
      if (s.bins[t] <= last) {
        low += tile_mass(row.tile(t), row.max, e);
      } else {
        const F top = load(row.lane_max + int64_t(t) * kWidth);
        lanes.add(exponential(sub(top, set(row.max)), e));
      }
    }
    lows[chunk] = low;
    others[chunk] = lanes.total();
  });
  MassBounds bounds{0, 0};
  for (int c = 0; c < chunks; ++c) {
    bounds.low += lows[c];
    bounds.high += others[c];
  }
  // Masses are not quite monotone: a token's may pass its lane's maximum's by rounding, of the value
  // (2^-23 of it) and to the integer (1).
  bounds.high = bounds.low + kTile / kWidth * (bounds.high + (bounds.high >> 16)) + row.count;
  return bounds;
}

}  // namespace PTK_ISA
}  // namespace ptk
