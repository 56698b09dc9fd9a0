// A linear layer with int8 weights by AMX tiles: y[t, n] = bf16(s[n] * sum over k of w[n, k] x[t, k]).
// Reads a weight once for 32 rows, and a row's bits do not depend on the other rows.
#pragma once

#include <cstdint>

namespace ptk::amx {

constexpr int64_t kInputs = 64;  // inputs of a layer are a multiple
constexpr int64_t kOutputs = 32;  // that one turn computes, a panel
constexpr int64_t kRows = 16;     // of a tile

// Whether the processor has AMX (tiles, bf16) and AVX512 (VBMI), the system lets this process use tiles, and the
// kernels in use are those of AVX512.
bool available();

// Words that pack writes: of rows in whole tiles, a word for two inputs.
constexpr int64_t packed_words(int64_t rows, int64_t inputs) { return (rows + kRows - 1) / kRows * kRows * inputs / 2; }

// Rows bf16 [rows, inputs] in the order in which linear takes them; out is zero where rows fill no tile.
void pack(const uint16_t* x, int64_t rows, int64_t inputs, uint32_t* out);

// The outputs of the panels from `begin` to `end`: weight [outputs, inputs], scales bf16 [outputs], y bf16
// [rows, outputs], all contiguous; x is packed.
void linear(const int8_t* weight, const uint16_t* scales, int64_t outputs, int64_t inputs, const uint32_t* x,
            int64_t rows, uint16_t* y, int64_t begin, int64_t end);

}  // namespace ptk::amx
