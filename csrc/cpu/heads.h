// fp32 products of rows of hidden states and of weights: a role's logits, and linear layers with int8 weights.
//
// A product is summed in 16 lanes: lane l adds the elements l, l + 16, ... in order, each by one fused
// multiply-add; then the upper half of the lanes is added to the lower, down to one. So a logit has the
// same bits whatever the instruction set, the batch, and the tokens beside it.
#pragma once

namespace ptk {
namespace PTK_ISA {

constexpr int kLanes = 16;
constexpr int kParts = kLanes / kWidth;
// A block has at most kMostRows rows, and so many tokens that its sums take most of the registers (32 of
// AVX-512, 16 of AVX2). Its rows share the conversion of a weight, its tokens the load of a row.
constexpr int kMostRows = kWidth == 16 ? 8 : 2;
constexpr int tokens_beside(int rows) {
  return kWidth == 16 ? (rows == 8 ? 3 : rows == 4 ? 4 : 8) : 4 / rows;
}
// All rows go through the weights of so many tokens before the next: these stay in the second-level cache.
constexpr int64_t kPanel = 96;
// So many elements of the products are taken at once: a block's rows stay in the first-level cache.
constexpr int64_t kDepth = 1024;

// The unfinished sums of a block of rows and a panel of tokens.
struct HeadSums {
  alignas(64) float lanes[kPanel * kMostRows * kLanes];
};

// A token's weights.
template <typename T>
struct PlainWeights {
  using Args = proxytune_head_logits_args;
  using Element = T;
  const T* data;
  static PlainWeights of(const Args& in, int64_t token) {
    return {static_cast<const T*>(in.weight.data) + token * in.weight.row_stride};
  }
  F numbers(int64_t k) const { return load(data + k); }
  void move(const T* copy, int64_t) { data = copy; }
};

// A token's int8 weights, with a scale of type S for each kInt8Group of them.
template <typename S>
struct ScaledWeights {
  using Args = Int8LinearArgs;
  using Element = int8_t;
  const int8_t* data;
  const S* scales;
  static ScaledWeights of(const Args& in, int64_t token) {
    return {static_cast<const int8_t*>(in.weight.data) + token * in.weight.row_stride,
            static_cast<const S*>(in.scales) + token * int8_groups(in.size)};
  }
  F numbers(int64_t k) const { return mul(load(data + k), set(number(scales[k / kInt8Group]))); }
  // Reads a copy of the elements from k on, at 0, in their place.
  void move(const int8_t* copy, int64_t k) { data = copy, scales += k / kInt8Group; }
};

inline float lane_sum(F sum[kParts]) {
  for (int half = kParts / 2; half > 0; half /= 2) {
    for (int p = 0; p < half; ++p) sum[p] = add(sum[p], sum[p + half]);
  }
  return reduce_halves(sum[0]);
}

// Adds kLanes elements of each product. Prefetches the weights of the next block of tokens, which lie `ahead`
// bytes further: a processor's own prefetching ends at a page, and a page holds few rows of weights. A
// prefetch past the last row reads nothing.
template <int kRows, int kTokens, typename W>
inline void add_products(const float* const hidden[kRows], const W* weight, int64_t k,
                         F sum[kRows][kTokens][kParts], uintptr_t ahead) {
  for (int t = 0; t < kTokens; ++t) {
    const uintptr_t next = reinterpret_cast<uintptr_t>(weight[t].data + k) + ahead;
    __builtin_prefetch(reinterpret_cast<const void*>(next));
  }
  for (int p = 0; p < kParts; ++p) {
    F w[kTokens];
    for (int t = 0; t < kTokens; ++t) w[t] = weight[t].numbers(k + p * kWidth);
    for (int r = 0; r < kRows; ++r) {
      const F h = load(hidden[r] + k + p * kWidth);
      for (int t = 0; t < kTokens; ++t) sum[r][t][p] = fma(h, w[t], sum[r][t][p]);
    }
  }
}

// Adds elements [begin, end) of a block's products to the sums so far.
template <int kRows, int kTokens, typename W>
void head_block(const typename W::Args& in, int64_t row, int64_t token, int64_t begin, int64_t end,
                float* sums, float* out) {
  using Element = typename W::Element;
  const float* hidden[kRows];
  W weight[kTokens];
  F sum[kRows][kTokens][kParts];
  for (int r = 0; r < kRows; ++r) hidden[r] = in.hidden + (row + r) * in.hidden_row_stride;
  for (int t = 0; t < kTokens; ++t) weight[t] = W::of(in, token + t);
  const auto each_sum = [&](auto use) {
    for (int r = 0; r < kRows; ++r) {
      for (int t = 0; t < kTokens; ++t) {
        for (int p = 0; p < kParts; ++p) use(sum[r][t][p], ((t * kRows + r) * kParts + p) * kWidth);
      }
    }
  };
  each_sum([&](F& part, int at) { part = begin == 0 ? set(0.0f) : load(sums + at); });
  const uintptr_t ahead = kTokens * in.weight.row_stride * sizeof(Element);
  const int64_t whole = std::min(end, in.size / kLanes * kLanes);
  for (int64_t k = begin; k < whole; k += kLanes) add_products<kRows, kTokens, W>(hidden, weight, k, sum, ahead);
  if (end < in.size) return each_sum([&](F& part, int at) { store(sums + at, part); });
  if (const int64_t left = in.size - whole) {  // the end in a copy, zeros after it
    float last_hidden[kRows][kLanes] = {};
    Element last_weight[kTokens][kLanes] = {};
    for (int r = 0; r < kRows; ++r) {
      std::copy_n(hidden[r] + whole, left, last_hidden[r]);
      hidden[r] = last_hidden[r];
    }
    for (int t = 0; t < kTokens; ++t) {
      std::copy_n(weight[t].data + whole, left, last_weight[t]);
      weight[t].move(last_weight[t], whole);
    }
    add_products<kRows, kTokens, W>(hidden, weight, 0, sum, 0);
  }
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) out[r * in.logits_row_stride + t] = lane_sum(sum[r][t]);
  }
}

template <int kRows, typename W>
void head_tokens(const typename W::Args& in, int64_t row, int64_t begin, int64_t end, HeadSums& sums,
                 float* out) {
  constexpr int kTokens = tokens_beside(kRows);
  for (int64_t k = 0; k < in.size; k += kDepth) {
    const int64_t stop = std::min(k + kDepth, in.size);
    float* kept = sums.lanes;
    int64_t token = begin;
    for (; token + kTokens <= end; token += kTokens, kept += kTokens * kRows * kLanes) {
      head_block<kRows, kTokens, W>(in, row, token, k, stop, kept, out + token - begin);
    }
    for (; token < end; ++token, kept += kRows * kLanes) {
      head_block<kRows, 1, W>(in, row, token, k, stop, kept, out + token - begin);
    }
  }
}

// All rows from `row` on: kRows at a time, the rest half as many at a time, and so on.
template <int kRows, typename W>
void head_rows(const typename W::Args& in, int64_t row, int64_t begin, int64_t end, HeadSums& sums,
               float* out) {
  for (; row + kRows <= in.rows; row += kRows) {
    head_tokens<kRows, W>(in, row, begin, end, sums, out + row * in.logits_row_stride);
  }
  if constexpr (kRows > 1) head_rows<kRows / 2, W>(in, row, begin, end, sums, out);
}

template <typename W>
void head_panels(const typename W::Args& in, int64_t begin, int64_t end) {
  HeadSums sums;
  for (int64_t first = begin; first < end; first += kPanel) {
    const int64_t last = std::min(first + kPanel, end);
    head_rows<kMostRows, W>(in, 0, first, last, sums, in.logits + first - begin);
  }
}

// Logits of tokens [begin, end) for all rows.
inline void head_logits(const proxytune_head_logits_args& in, int64_t begin, int64_t end) {
  switch (in.weight.dtype) {
    case kDtypeBf16: return head_panels<PlainWeights<Bf16>>(in, begin, end);
    case kDtypeF16: return head_panels<PlainWeights<F16>>(in, begin, end);
    default: return head_panels<PlainWeights<float>>(in, begin, end);
  }
}

// The same of a layer's outputs.
inline void int8_linear(const Int8LinearArgs& in, int64_t begin, int64_t end) {
  switch (in.scale_dtype) {
    case kDtypeBf16: return head_panels<ScaledWeights<Bf16>>(in, begin, end);
    case kDtypeF16: return head_panels<ScaledWeights<F16>>(in, begin, end);
    default: return head_panels<ScaledWeights<float>>(in, begin, end);
  }
}

}  // namespace PTK_ISA
}  // namespace ptk
