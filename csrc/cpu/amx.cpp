#include "amx.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "../include/proxytune.h"

#if defined(__x86_64__) && defined(__linux__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // as isa_avx512.cpp
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PTK_AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vbmi")))

namespace ptk::amx {
namespace {

constexpr int kWide = 32;   // inputs of a tile
constexpr int kAhead = 8;   // tiles that are widened before they are multiplied, and fetched before that
constexpr int kPairs = kWide / 2;
constexpr int kTileWords = kPairs * int(kRows);

bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = d >> 24 & 1, bf16 = d >> 22 & 1;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // Linux, arch_prctl(2)
  return tiles && bf16 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vbmi") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, zero[14] = {};
  uint16_t row_bytes[16];
  uint8_t rows[16];
  TileConfig() {
    for (int t = 0; t < 16; ++t) {
      row_bytes[t] = t < 8 ? 64 : 0;
      rows[t] = t < 8 ? 16 : 0;
    }
  }
};

// The bytes of 0 to 127 in bf16, which holds them exactly.
struct Bytes {
  alignas(64) uint8_t low[128], high[128];
  constexpr Bytes() {
    for (int q = 0; q < 128; ++q) {
      const uint32_t bits = std::bit_cast<uint32_t>(float(q));
      low[q] = uint8_t(bits >> 16);
      high[q] = uint8_t(bits >> 24);
    }
  }
};
constexpr Bytes kBytes;

// 64 weights, none -128, as two tiles' rows of bf16: of each 16 weights the first eight go to `first`.
PTK_AMX inline void widen(const int8_t* weights, uint16_t* first, uint16_t* second) {
  const __m512i q = _mm512_loadu_si512(weights), size = _mm512_abs_epi8(q);
  const auto look_up = [&](const uint8_t* bytes) PTK_AMX {
    return _mm512_permutex2var_epi8(_mm512_load_si512(bytes), size, _mm512_load_si512(bytes + 64));
  };
  const __m512i low = look_up(kBytes.low);
  const __m512i sign = _mm512_and_si512(q, _mm512_set1_epi8(char(0x80)));
  const __m512i high = _mm512_or_si512(look_up(kBytes.high), sign);
  _mm512_store_si512(first, _mm512_unpacklo_epi8(low, high));
  _mm512_store_si512(second, _mm512_unpackhi_epi8(low, high));
}

// sums [1 or, with kTwo, 2][kOutputs][kRows] of a panel, for as many tiles of rows; x are the first one's tiles.
template <bool kTwo>
PTK_AMX void panel(const int8_t* weight, int64_t outputs, int64_t inputs, const uint32_t* x, float* sums) {
  alignas(64) uint16_t wide[kAhead][kOutputs][kWide];
  if (outputs < kOutputs) std::memset(wide, 0, sizeof wide);
  const int tiles = int(inputs / kWide);
  const uint32_t* const second = x + int64_t(tiles) * kTileWords;
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTwo) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int start = 0; start < tiles; start += kAhead) {
    const int n = std::min(kAhead, tiles - start);
    for (int64_t r = 0; r < outputs; ++r) {
      const int8_t* const row = weight + r * inputs + start * kWide;
      for (int i = 0; i < n; i += 2) widen(row + i * kWide, wide[i][r], wide[i + 1][r]);
    }
    // Of 32 streams the processor's own prefetcher fetches too late.
    const int8_t* const next = weight + (start + kAhead < tiles ? (start + kAhead) * kWide : kOutputs * inputs);
    for (int i = 0; i < n; ++i) {
      for (int64_t r = i * kOutputs / kAhead; r < (i + 1) * kOutputs / kAhead; ++r) {
        for (int byte = 0; byte < kAhead * kWide; byte += 64) _mm_prefetch(next + r * inputs + byte, _MM_HINT_T0);
      }
      const int64_t at = int64_t(start + i) * kTileWords;
      _tile_loadd(4, wide[i], 64);
      _tile_loadd(5, wide[i][16], 64);
      _tile_loadd(6, x + at, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if constexpr (kTwo) {
        _tile_loadd(7, second + at, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  if constexpr (kTwo) {
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
  }
}

float widened(uint16_t bf16) { return std::bit_cast<float>(uint32_t(bf16) << 16); }

uint16_t rounded(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t nan = bits >> 16 | 0x40;  // which rounding could make an inf
  return uint16_t(x != x ? nan : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

}  // namespace

bool available() {
  static const bool has = has_amx();
  const char* isa = proxytune_cpu_isa();
  return has && isa && std::strcmp(isa, "avx512") == 0;
}

void pack(const uint16_t* x, int64_t rows, int64_t inputs, uint32_t* out) {
  std::memset(out, 0, size_t(packed_words(rows, inputs)) * sizeof(uint32_t));
  for (int64_t row = 0; row < rows; ++row) {
    const uint16_t* const from = x + row * inputs;
    uint32_t* const to = out + row / kRows * kRows * inputs / 2 + row % kRows;
    for (int64_t start = 0; start < inputs / 2; start += 2 * kPairs) {  // two tiles, in the order of widen
      for (int i = 0; i < 2 * kPairs; ++i) {
        const int tile = i / 4 % 2, pair = i / 8 * 4 + i % 4;
        std::memcpy(to + start * kRows + tile * kTileWords + pair * kRows, from + 2 * (start + i), 4);
      }
    }
  }
}

PTK_AMX void linear(const int8_t* weight, const uint16_t* scales, int64_t outputs, int64_t inputs,
                    const uint32_t* x, int64_t rows, uint16_t* y, int64_t begin, int64_t end) {
  const TileConfig config;
  _tile_loadconfig(&config);
  alignas(64) float sums[2][kOutputs][kRows];
  for (int64_t p = begin; p < end; ++p) {
    const int64_t first = p * kOutputs, count = std::min(kOutputs, outputs - first);
    for (int64_t row = 0; row < rows; row += 2 * kRows) {
      const int64_t n = std::min(2 * kRows, rows - row);
      const auto run = n > kRows ? panel<true> : panel<false>;
      run(weight + first * inputs, count, inputs, x + row * inputs / 2, &sums[0][0][0]);
      for (int64_t tile = 0; tile * kRows < n; ++tile) {
        uint16_t* const out = y + (row + tile * kRows) * outputs + first;
        const int64_t live = std::min(kRows, n - tile * kRows);
        for (int64_t i = 0; i < count; ++i) {
          uint16_t column[kRows];
          const float scale = widened(scales[first + i]);
          for (int64_t t = 0; t < kRows; ++t) column[t] = rounded(sums[tile][i][t] * scale);
          for (int64_t t = 0; t < live; ++t) out[t * outputs + i] = column[t];
        }
      }
    }
  }
  _tile_release();
}

}  // namespace ptk::amx

#else
namespace ptk::amx {
bool available() { return false; }
void pack(const uint16_t*, int64_t, int64_t, uint32_t*) {}
void linear(const int8_t*, const uint16_t*, int64_t, int64_t, const uint32_t*, int64_t, uint16_t*, int64_t, int64_t) {}
}  // namespace ptk::amx
#endif
