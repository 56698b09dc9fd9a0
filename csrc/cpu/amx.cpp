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

#define PTK_AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vbmi,avx512bf16")))

namespace ptk::amx {
namespace {

constexpr int kWide = 32;  // inputs of a tile
constexpr int kPairs = kWide / 2;
constexpr int kTileWords = kPairs * int(kRows);
constexpr int kFetched = 8;  // chunks, each kInputs of a panel, from a weight's prefetch to its use
static_assert(kWide == kGroup && kInputs == 2 * kWide && kInt8Group == 2 * kInputs);

bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = d >> 24 & 1, bf16 = d >> 22 & 1;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // Linux, arch_prctl(2)
  return tiles && bf16 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512bf16") &&
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

struct Panel {
  const int8_t* weight;
  const uint16_t* scales;
  int64_t outputs;
};
using Wide = uint16_t[2][Int8::kPanel][kWide];
using Sums = float[Int8::kPanel][kRows];  // of a tile of rows

// Add a group's products of kTiles tiles of rows, times its scales, to sums; the products start again at zero.
template <int kTiles>
PTK_AMX inline void fold(const Panel& own, int64_t group, int64_t groups, Sums* sums) {
  alignas(64) Sums products[kTiles];
  _tile_stored(0, products[0], 64);
  _tile_stored(1, products[0][kRows], 64);
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTiles > 1) {
    _tile_stored(2, products[1], 64);
    _tile_stored(3, products[1][kRows], 64);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < own.outputs; ++i) {
    const __m512 scale = _mm512_set1_ps(bf16_to_float(own.scales[i * groups + group]));
    for (int tile = 0; tile < kTiles; ++tile) {
      float* const sum = sums[tile][i];
      _mm512_store_ps(sum, _mm512_fmadd_ps(scale, _mm512_load_ps(products[tile][i]), _mm512_load_ps(sum)));
    }
  }
}

// A panel's sums for kTiles tiles of rows; x are the first one's tiles. While a chunk is multiplied, the next is
// widened, of the panel `next` behind the last: wide[turn] is this one's.
template <int kTiles>
PTK_AMX void panel(const Panel& own, const Panel& next, int64_t inputs, const uint32_t* x, Wide (&wide)[2], int& turn,
                   Sums* sums) {
  const int64_t chunks = inputs / kInputs, groups = int8_groups(inputs);
  const uint32_t* const second = x + chunks * 2 * kTileWords;
  for (int tile = 0; tile < kTiles; ++tile) std::memset(sums[tile], 0, sizeof sums[tile]);
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTiles > 1) {
    _tile_zero(2);
    _tile_zero(3);
  }
  const auto weight_of = [&](int64_t chunk) {
    return chunk < chunks ? own.weight + chunk * kInputs : next.weight + (chunk - chunks) % chunks * kInputs;
  };
  for (int64_t chunk = 0; chunk < chunks; ++chunk, turn ^= 1) {
    const int64_t outputs = chunk + 1 < chunks ? own.outputs : next.outputs;
    // Of 32 streams the processor's own prefetcher fetches too late.
    const int8_t *const weight = weight_of(chunk + 1), *const fetched = weight_of(chunk + kFetched);
    for (int i = 0; i < 2; ++i) {
      for (int64_t r = i * kRows; r < std::min((i + 1) * kRows, outputs); ++r) {
        _mm_prefetch(fetched + r * inputs, _MM_HINT_T0);
        widen(weight + r * inputs, wide[turn ^ 1][0][r], wide[turn ^ 1][1][r]);
      }
      const int64_t at = (2 * chunk + i) * kTileWords;
      _tile_loadd(4, wide[turn][i], 64);
      _tile_loadd(5, wide[turn][i][16], 64);
      _tile_loadd(6, x + at, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if constexpr (kTiles > 1) {
        _tile_loadd(7, second + at, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    if (chunk % 2 == 1 || chunk + 1 == chunks) fold<kTiles>(own, chunk / 2, groups, sums);
  }
}

// The bf16 numbers -8 to 7, twice: bit 4 of an index is another weight's.
struct Steps {
  alignas(64) uint16_t bits[32];
  constexpr Steps() {
    for (int i = 0; i < 32; ++i) bits[i] = uint16_t(std::bit_cast<uint32_t>(float(i % 16 - 8)) >> 16);
  }
};
constexpr Steps kSteps;

// Of the bytes of two inputs, which ones make the words of 16 outputs from `first`: in turn the one's, the other's.
struct Order {
  alignas(64) uint8_t from[64];
  constexpr explicit Order(int first) {
    for (int i = 0; i < 64; ++i) from[i] = uint8_t(i / 2 % 2 * 32 + first + i / 4);
  }
};
constexpr Order kOrders[2] = {Order(0), Order(16)};

constexpr int kColumns = 4;  // tiles of a panel's outputs
constexpr int kGroupBytes = int(Int4::kPanel * kGroup / 2);
constexpr int kGroupWords = kTileWords + int(kRows);
constexpr int kMost = 8;  // tiles of rows for which a weight is widened once
using Columns = uint16_t[kColumns][kPairs][kWide];

// A quarter of a panel's weights of a group, as rows of its tiles: two inputs of 16 outputs.
PTK_AMX inline void widen(const uint8_t* weights, int quarter, Columns& tiles) {
  const __m512i steps = _mm512_load_si512(kSteps.bits);
  for (int pair = quarter * 4; pair < quarter * 4 + 4; ++pair) {
    const __m512i both = _mm512_loadu_si512(weights + pair * 64);
    for (int i = 0; i < 2; ++i) {
      const __m512i words = _mm512_permutexvar_epi8(_mm512_load_si512(kOrders[i].from), both);
      _mm512_store_si512(tiles[i][pair], _mm512_permutexvar_epi16(words, steps));
      _mm512_store_si512(tiles[2 + i][pair], _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), steps));
    }
  }
}

using Products = float[2][kRows][16];

// Add two groups' products, times their scales, and their zeros times the sums of inputs: sums [rows][16].
PTK_AMX inline void fold(const Products& products, const uint16_t* scales, int64_t outputs, const uint32_t* x,
                         int64_t rows, float (*sums)[16]) {
  __m512 scale[2], zero[2];
  for (int i = 0; i < 2; ++i) {
    const __m512i both = _mm512_loadu_si512(scales + i * outputs * 2);
    scale[i] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    zero[i] = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xFFFF0000))));
  }
  for (int64_t r = 0; r < rows; ++r) {
    __m512 sum = _mm512_load_ps(sums[r]);
    for (int i = 0; i < 2; ++i) {
      const int of_inputs = int(x[i * kGroupWords + kTileWords + r]);
      sum = _mm512_fmadd_ps(scale[i], _mm512_load_ps(products[i][r]), sum);
      sum = _mm512_fmadd_ps(zero[i], _mm512_castsi512_ps(_mm512_set1_epi32(of_inputs)), sum);
    }
    _mm512_store_ps(sums[r], sum);
  }
}

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

void Int8::pack(const uint16_t* x, int64_t rows, int64_t inputs, uint32_t* out) {
  std::memset(out, 0, size_t(words(rows, inputs)) * sizeof(uint32_t));
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

PTK_AMX void Int8::linear(const void* weight, const uint16_t* scales, int64_t outputs, int64_t inputs,
                          const uint32_t* x, int64_t rows, uint16_t* y, int64_t begin, int64_t end) {
  const TileConfig config;
  _tile_loadconfig(&config);
  alignas(64) Sums sums[2];
  alignas(64) Wide wide[2] = {};
  const auto at = [&](int64_t p) {
    return Panel{static_cast<const int8_t*>(weight) + p * kPanel * inputs, scales + p * kPanel * int8_groups(inputs),
                 std::min(kPanel, outputs - p * kPanel)};
  };
  Panel own = at(begin);
  for (int64_t r = 0; r < own.outputs; ++r) widen(own.weight + r * inputs, wide[0][0][r], wide[0][1][r]);
  int turn = 0;
  for (int64_t p = begin; p < end; ++p) {
    const int64_t first = p * kPanel, count = own.outputs;
    for (int64_t row = 0; row < rows; row += 2 * kRows) {
      const int64_t n = std::min(2 * kRows, rows - row);
      const Panel next = at(row + 2 * kRows < rows || p + 1 == end ? p : p + 1);
      const auto run = n > kRows ? panel<2> : panel<1>;
      run(own, next, inputs, x + row * inputs / 2, wide, turn, sums);
      own = next;
      for (int64_t tile = 0; tile * kRows < n; ++tile) {
        uint16_t* const out = y + (row + tile * kRows) * outputs + first;
        const int64_t live = std::min(kRows, n - tile * kRows);
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t t = 0; t < live; ++t) out[t * outputs + i] = rounded(sums[tile][i][t]);
        }
      }
    }
  }
  _tile_release();
}

PTK_AMX void Int4::pack(const uint16_t* x, int64_t rows, int64_t inputs, uint32_t* out) {
  const int64_t groups = inputs / kGroup;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t g = 0; g < groups; ++g) {
      uint32_t* const to = out + (row / kRows * groups + g) * kGroupWords;
      const __m512i group = _mm512_loadu_si512(x + row * inputs + g * kGroup);
      const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(group, 16));
      const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(group, _mm512_set1_epi32(int(0xFFFF0000))));
      const float sum = _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
      _mm512_storeu_si512(to + row % kRows * kPairs, group);
      std::memcpy(to + kTileWords + row % kRows, &sum, sizeof sum);
    }
  }
}

PTK_AMX void Int4::linear(const void* weight, const uint16_t* scales, int64_t outputs, int64_t inputs,
                          const uint32_t* x, int64_t rows, uint16_t* y, int64_t begin, int64_t end) {
  TileConfig config;
  for (int t : {0, 1, 6, 7}) config.rows[t] = uint8_t(std::min(kRows, rows));
  _tile_loadconfig(&config);
  alignas(64) Columns wide[2][2];
  alignas(64) Products products;
  alignas(64) float sums[kMost][kColumns][kRows][16];
  const int64_t groups = inputs / kGroup;
  const auto at = [&](int64_t p) { return static_cast<const uint8_t*>(weight) + p * groups * kGroupBytes; };
  const uint8_t* from = at(begin);
  for (int part = 0; part < 2 * 4; ++part) widen(from + part / 4 * kGroupBytes, part % 4, wide[0][part / 4]);
  int turn = 0;
  for (int64_t p = begin; p < end; ++p) {
    for (int64_t row = 0; row < rows; row += kMost * kRows) {
      const int64_t n = std::min(kMost * kRows, rows - row);
      std::memset(sums, 0, sizeof sums[0] * size_t(whole_tiles(n) / kRows));
      for (int64_t g = 0; g < groups; g += 2, turn ^= 1) {
        // While two groups are multiplied, the next two are widened; behind the last ones any.
        from += 2 * kGroupBytes;
        if (g + 2 == groups) from = at(row + n < rows || p + 1 == end ? p : p + 1);
        for (int c = 0; c < kColumns; ++c) {
          const uint16_t* const own_scales = scales + (g * outputs + p * kPanel + c * 16) * 2;
          for (int i = 0; i < 2; ++i) {
            const uint8_t* const next = from + i * kGroupBytes;
            for (int byte = c * kGroupBytes / 4; byte < (c + 1) * kGroupBytes / 4; byte += 64) {
              _mm_prefetch(next + kFetched * kGroupBytes / 4 + byte, _MM_HINT_T0);
            }
            _mm_prefetch(own_scales + (kFetched + i) * outputs * 2, _MM_HINT_T0);
            widen(next, c, wide[turn ^ 1][i]);
          }
          _tile_loadd(4, wide[turn][0][c], 64);
          _tile_loadd(5, wide[turn][1][c], 64);
          for (int64_t tile = 0; tile * kRows < n; ++tile) {
            const uint32_t* const own = x + ((row / kRows + tile) * groups + g) * kGroupWords;
            _tile_loadd(6, own, 64);
            _tile_loadd(7, own + kGroupWords, 64);
            _tile_zero(0);
            _tile_zero(1);
            _tile_dpbf16ps(0, 6, 4);
            _tile_dpbf16ps(1, 7, 5);
            _tile_stored(0, products[0], 64);
            _tile_stored(1, products[1], 64);
            fold(products, own_scales, outputs, own, std::min(kRows, n - tile * kRows), sums[tile][c]);
          }
        }
      }
      for (int64_t r = 0; r < n; ++r) {
        for (int c = 0; c < kColumns; ++c) {
          const __m256bh out = _mm512_cvtneps_pbh(_mm512_load_ps(sums[r / kRows][c][r % kRows]));
          std::memcpy(y + (row + r) * outputs + p * kPanel + c * 16, &out, sizeof out);
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
#define PTK_NONE(Kind)                                                \
  void Kind::pack(const uint16_t*, int64_t, int64_t, uint32_t*) {}    \
  void Kind::linear(const void*, const uint16_t*, int64_t, int64_t, const uint32_t*, int64_t, uint16_t*, int64_t, \
                    int64_t) {}
PTK_NONE(Int8)
PTK_NONE(Int4)
}  // namespace ptk::amx
#endif
