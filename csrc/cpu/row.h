// One row: combination into fp32 scratch, with a maximum per tile.
// Moves 3 logits in and 4 bytes of scratch out per token; the scratch stays in the core's cache.
#pragma once

namespace ptk {
namespace PTK_ISA {

// Combined logits of one row in scratch, padded with -inf to whole tiles.
struct Row {
  float* x;         // [tiles * kTile]; masked tokens are -inf, all others finite
  float* tile_max;  // [tiles], -inf where the tile is masked
  int64_t vocab_size;
  int tiles;
  const proxytune_parallel* parallel;
  float max = -INFINITY;  // -inf: nothing left
  uint32_t count = 0;     // tokens that are not masked
  int32_t status = 0;

  const float* tile(int t) const { return x + int64_t(t) * kTile; }

  // The first tile that holds the maximum; there must be a token left.
  int likeliest_tile() const {
    int t = 0;
    while (tile_max[t] != max) ++t;
    return t;
  }
};

// Takes a tile's combined logits: masks NaN, counts, keeps the maximum.
struct ScanSink {
  static constexpr bool kRoles = false;  // whether it takes the roles' logits, too
  float* out;
  uint32_t count = 0, nan = 0;
  F top;
  explicit ScanSink(float* out) : out(out), top(set(-INFINITY)) {}
  void operator()(int i, F x) { take(i, x); }
  // Returns which of them are not masked.
  uint32_t take(int i, F x) {
    const F masked = set(-INFINITY);
    const uint32_t live = gt(x, masked);  // false for NaN
    count += uint32_t(std::popcount(live));
    nan |= is_nan(x);
    const F clean = select(live, x, masked);
    store(out + i, clean);
    top = max(top, clean);
    return live;
  }
};

// Takes them as they are.
struct PlainSink {
  static constexpr bool kRoles = false;
  float* out;
  void operator()(int i, F x) { store(out + i, x); }
};

template <bool kSteered, bool kConstrained, typename T, typename Sink>
void combine_loop(const T* base, const T* expert, const T* anti, float alpha, const float* bias,
                  const uint32_t* allowed, Sink& result) {
  const F a = set(alpha), masked = set(-INFINITY);
  Sink sink = result;  // a local copy stays in registers
  constexpr uint32_t kLanes = (1u << kWidth) - 1;
  for (int i = 0; i < kTile; i += kWidth) {
    const F b = load(base + i);
    F x = b, tuned = b, untuned = b;
    if constexpr (kSteered) {
      tuned = load(expert + i);
      untuned = load(anti + i);
      x = fma(a, sub(tuned, untuned), b);
    }
    if constexpr (Sink::kRoles) sink.roles(b, tuned, untuned);
    if (kConstrained && bias) x = add(x, load(bias + i));
    // -inf in base masks the token whatever the others hold (an inf there would make NaN).
    x = select(eq(b, masked), masked, x);
    if (kConstrained && allowed) x = select((allowed[i >> 5] >> (i & 31)) & kLanes, x, masked);
    // -0 + 0 = +0: equal logits must have equal bits for the order by id.
    sink(i, add(x, set(0.0f)));
  }
  result = sink;
}

// Combines one whole tile; T is the logits' type. expert is null for the base alone.
template <typename T, typename Sink>
void combine_tile(const T* base, const T* expert, const T* anti, float alpha, const float* bias,
                  const uint32_t* allowed, Sink& sink) {
  const bool constrained = bias || allowed;
  const auto loop = expert ? (constrained ? combine_loop<true, true, T, Sink> : combine_loop<true, false, T, Sink>)
                           : (constrained ? combine_loop<false, true, T, Sink> : combine_loop<false, false, T, Sink>);
  loop(base, expert, anti, alpha, bias, allowed, sink);
}

// A copy of the last tile's tokens, so that nothing past the row is read.
struct TailTile {
  alignas(64) float base[kTile], expert[kTile], anti[kTile], bias[kTile];
  uint32_t allowed[kTile / 32];
};

template <typename T>
void widen(const void* logits, int64_t start, float* out) {
  const T* from = static_cast<const T*>(logits) + start;
  for (int i = 0; i < kTile; i += kWidth) store(out + i, load(from + i));
}

// kTile logits of any dtype as fp32; `n` of them exist, the rest become `pad`.
inline void widen_tile(const void* logits, int32_t dtype, int64_t start, int n, float pad, float* out) {
  if (n == kTile && dtype == kDtypeBf16) return widen<Bf16>(logits, start, out);
  if (n == kTile && dtype == kDtypeF16) return widen<F16>(logits, start, out);
  for (int i = 0; i < kTile; ++i) out[i] = i < n ? logit_at(logits, dtype, start + i) : pad;
}

// The row's last, partial tile, and a tile whose roles differ in dtype: by way of fp32 copies.
template <typename Sink>
void combine_copied(const Source& in, int64_t start, Sink& sink) {
  TailTile copy;
  const int n = int(std::min<int64_t>(kTile, in.vocab_size - start));
  widen_tile(in.base, in.base_dtype, start, n, -INFINITY, copy.base);
  if (in.expert) {
    widen_tile(in.expert, in.expert_dtype, start, n, -INFINITY, copy.expert);
    widen_tile(in.anti, in.anti_dtype, start, n, -INFINITY, copy.anti);
  }
  if (in.bias) {
    for (int i = 0; i < kTile; ++i) copy.bias[i] = i < n ? in.bias[start + i] : 0.0f;
  }
  if (in.allowed) {
    const int words = (n + 31) / 32;
    for (int i = 0; i < kTile / 32; ++i) copy.allowed[i] = i < words ? in.allowed[start / 32 + i] : 0;
  }
  combine_tile<float>(copy.base, in.expert ? copy.expert : nullptr, copy.anti, in.alpha,
                      in.bias ? copy.bias : nullptr, in.allowed ? copy.allowed : nullptr, sink);
}

template <typename T, typename Sink>
void combine_whole(const Source& in, int64_t start, Sink& sink) {
  const auto at = [start](const void* logits) {
    return logits ? static_cast<const T*>(logits) + start : nullptr;
  };
  combine_tile<T>(at(in.base), at(in.expert), at(in.anti), in.alpha, in.bias ? in.bias + start : nullptr,
                  in.allowed ? in.allowed + start / 32 : nullptr, sink);
}

template <typename Sink>
void combine_at(const Source& in, int64_t start, Sink&& sink) {
  const bool one_dtype =
      !in.expert || (in.expert_dtype == in.base_dtype && in.anti_dtype == in.base_dtype);
  if (!one_dtype || in.vocab_size - start < kTile) return combine_copied(in, start, sink);
  switch (in.base_dtype) {
    case kDtypeBf16: return combine_whole<Bf16>(in, start, sink);
    case kDtypeF16: return combine_whole<F16>(in, start, sink);
    default: return combine_whole<float>(in, start, sink);
  }
}

// +inf somewhere: only those tokens stay, all equal.
inline void keep_positive_inf(Row& row) {
  row.status |= kStatusPositiveInf;
  row.max = 0.0f;
  row.count = 0;
  for (int t = 0; t < row.tiles; ++t) {
    float* x = row.x + int64_t(t) * kTile;
    uint32_t kept = 0;
    for (int i = 0; i < kTile; i += kWidth) {
      const uint32_t infinite = eq(load(x + i), set(INFINITY));
      kept += uint32_t(std::popcount(infinite));
      store(x + i, select(infinite, set(0.0f), set(-INFINITY)));
    }
    row.count += kept;
    row.tile_max[t] = kept ? 0.0f : -INFINITY;
  }
}

// Calls body(chunk, first tile, last tile + 1) for each chunk of the tiles; returns the number of chunks.
// Only maxima and integer sums may come of it: they do not depend on where a chunk ends.
template <typename Body>
int over_tiles(const proxytune_parallel* parallel, int tiles, Body body) {
  const int chunks = parallel ? std::min({parallel->chunks, kMaxChunks, tiles}) : 1;
  if (chunks <= 1) {
    body(0, 0, tiles);
    return 1;
  }
  struct Context {
    Body& body;
    int tiles, chunks;
    static void call(void* self, int64_t chunk) {
      const Context& c = *static_cast<Context*>(self);
      c.body(int(chunk), int(chunk * c.tiles / c.chunks), int((chunk + 1) * c.tiles / c.chunks));
    }
  } context{body, tiles, chunks};
  parallel->run(parallel->pool, chunks, &Context::call, &context);
  return chunks;
}

// x of a token that is not masked, after what an entry does to it (contract, Edits).
inline float edited(float x, const proxytune_edit& edit, const float* penalties) {
  float y = x + edit.bias;
  if (penalties) {
    const float count = float(edit.count);
    if (edit.count > 0 || edit.in_prompt) y = y > 0.0f ? y / penalties[0] : y * penalties[0];
    if (edit.count > 0) y = y - penalties[2] * count - penalties[1];
  }
  return y + 0.0f;  // -0 becomes +0
}

// Calls change(id, x after the edit) for the row's entries whose token is not masked; x is the row so far.
template <typename Change>
void each_edit(const Source& in, const float* x, Change change) {
  for (int64_t i = 0; i < in.num_edits; ++i) {
    const int64_t id = in.edits[i].id;
    if (id < 0 || id >= in.vocab_size || !(x[id] > -INFINITY)) continue;
    change(id, edited(x[id], in.edits[i], in.penalties));
  }
}

// The tile maxima and the count follow.
inline void apply_edits(const Source& in, Row& row) {
  each_edit(in, row.x, [&](int64_t id, float y) {
    if (y != y) row.status |= kStatusNan;
    if (!(y > -INFINITY)) {
      y = -INFINITY;
      --row.count;
    }
    const float before = row.x[id];
    row.x[id] = y;
    float& top = row.tile_max[id / kTile];
    if (y >= top) {
      top = y;
    } else if (before == top) {
      const float* tile = row.tile(int(id / kTile));
      F found = load(tile);
      for (int i = kWidth; i < kTile; i += kWidth) found = max(found, load(tile + i));
      top = reduce_max(found);
    }
  });
}

// What is found in a chunk of tiles.
struct Scanned {
  uint32_t count = 0, nan = 0;
};

template <typename Sink>
void scan_tile(const Source& in, const Row& row, int t, Sink& sink, Scanned& found) {
  sink.out = row.x + int64_t(t) * kTile;
  sink.top = set(-INFINITY);
  combine_at(in, int64_t(t) * kTile, sink);
  row.tile_max[t] = reduce_max(sink.top);
  found.count += sink.count;
  found.nan |= sink.nan;
  sink.count = 0;
}

inline Row empty_row(const Source& in, const RowBuffer& buffer, const proxytune_parallel* parallel) {
  return {buffer.x, buffer.tile_max, in.vocab_size, int(tiles_of(in.vocab_size)), parallel};
}

inline void finish_row(const Source& in, Row& row, const Scanned* found, int chunks) {
  // Read in whole vectors.
  std::fill(row.tile_max + row.tiles, row.tile_max + padded(row.tiles), -INFINITY);
  for (int c = 0; c < chunks; ++c) {
    row.count += found[c].count;
    row.status |= found[c].nan ? kStatusNan : 0;
  }
  apply_edits(in, row);
  for (int t = 0; t < row.tiles; ++t) row.max = row.max > row.tile_max[t] ? row.max : row.tile_max[t];
  if (row.max == INFINITY) keep_positive_inf(row);
  if (row.count == 0) row.status |= kStatusEmpty;
}

inline Row prepare_row(const Source& in, const RowBuffer& buffer, const proxytune_parallel* parallel) {
  Row row = empty_row(in, buffer, parallel);
  Scanned found[kMaxChunks];
  const int chunks = over_tiles(parallel, row.tiles, [&](int chunk, int begin, int end) {
    Scanned own;
    for (int t = begin; t < end; ++t) {
      ScanSink sink(nullptr);
      scan_tile(in, row, t, sink, own);
    }
    found[chunk] = own;
  });
  finish_row(in, row, found, chunks);
  return row;
}

using Target = ptk::Target<Row>;

// The first of the likeliest tokens.
inline Prefix likeliest(const Row& row) {
  uint32_t id = uint32_t(row.likeliest_tile()) * kTile;
  while (row.x[id] != row.max) ++id;
  return {row.max, id, 1, uint64_t(kMassOne)};
}

// The operator `combine`: values as they are, straight to the caller's fp32 row.
inline void combine_row(const proxytune_combine_args& args, int64_t row) {
  const Source in = source_at(args.inputs, value_at(args.inputs.alpha, row, 1.0f), row, 0);
  float* const out = args.x + row * args.x_row_stride;
  int64_t start = 0;
  for (; start + kTile <= in.vocab_size; start += kTile) combine_at(in, start, PlainSink{out + start});
  if (start < in.vocab_size) {
    float last[kTile];
    combine_at(in, start, PlainSink{last});
    std::memcpy(out + start, last, size_t(in.vocab_size - start) * sizeof(float));
  }
  each_edit(in, out, [&](int64_t id, float x) { out[id] = x; });
}

}  // namespace PTK_ISA
}  // namespace ptk
