// Linear layers with int8 and int4 weights by AMX tiles. A weight is read once for 32 rows of int8, for 128 of
// int4, and a row's bits do not depend on the other rows.
#pragma once

#include "types.h"

namespace ptk::amx {

constexpr int64_t kInputs = 64;  // inputs of a layer are a multiple
constexpr int64_t kRows = 16;    // of a tile
constexpr int64_t kGroup = 32;   // int4 weights of a row that share a scale and a zero

// Whether the processor has AMX (tiles, bf16) and AVX512 (VBMI, BF16), the system lets this process use tiles, and
// the kernels in use are those of AVX512.
bool available();

constexpr int64_t whole_tiles(int64_t rows) { return (rows + kRows - 1) / kRows * kRows; }

// y[t, n] = bf16(sum over groups g of s[n, g] * (sum over k in g of q[n, k] x[t, k])), none of q -128. Groups are of
// kInt8Group, the last may be of kInputs.
struct Int8 {
  static constexpr int64_t kPanel = 32;  // outputs that one turn computes
  // Words that pack writes: of rows in whole tiles, a word for two inputs.
  static constexpr int64_t words(int64_t rows, int64_t inputs) { return whole_tiles(rows) * inputs / 2; }
  // Rows bf16 [rows, inputs] in the order in which linear takes them; out is zero where rows fill no tile.
  static void pack(const uint16_t* x, int64_t rows, int64_t inputs, uint32_t* out);
  // The outputs of the panels from `begin` to `end`: weight int8 [outputs, inputs], scales bf16 [outputs, groups], y
  // bf16 [rows, outputs], all contiguous; x is packed.
  static void linear(const void* weight, const uint16_t* scales, int64_t outputs, int64_t inputs, const uint32_t* x,
                     int64_t rows, uint16_t* y, int64_t begin, int64_t end);
};

// y[t, n] = bf16(sum over groups g of s[g, n] * (sum over k in g of q[n, k] x[t, k]) + z[g, n] * (sum of x[t, k])).
struct Int4 {
  static constexpr int64_t kPanel = 64;  // of which the outputs are a multiple
  // With each group the sum of its inputs.
  static constexpr int64_t words(int64_t rows, int64_t inputs) {
    return whole_tiles(rows) * (inputs / 2 + inputs / kGroup);
  }
  // Out keeps what it was where rows fill no tile: linear looks at no result of it.
  static void pack(const uint16_t* x, int64_t rows, int64_t inputs, uint32_t* out);
  // As above: weight as torch packs it, for 64 outputs and each input in turn 32 bytes, q + 8 of output i low and
  // of i + 32 high; scales bf16 [inputs / kGroup, outputs, 2], a scale and a zero.
  static void linear(const void* weight, const uint16_t* scales, int64_t outputs, int64_t inputs, const uint32_t* x,
                     int64_t rows, uint16_t* y, int64_t begin, int64_t end);
};

}  // namespace ptk::amx
