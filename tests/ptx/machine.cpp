// Executes PTX that program.py has decoded: warps of 32 lanes in lockstep, lanes that diverge
// wait at the lowest address, warps and programs in random order. Checks the bounds and the
// alignment of every access, and on request that no two are a race: of global memory by vector
// clocks (FastTrack: Flanagan, Freund 2009) that barriers and ordered atomics join, of shared memory
// by the barriers between.
//
// What it can't show is in docs/ptx.md.

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

constexpr uint32_t ALL = 0xFFFFFFFFu;
constexpr int LANES = 32;
constexpr float SMALLEST_NORMAL = 1.17549435e-38f;

#include "numbers.inc"

// program.py writes these, and Range and Launch below.
struct Instruction {
  int32_t op, predicate, negated;
  int32_t n;      // of registers or the like
  int32_t o[12];  // operands: offsets into a warp's frame; -1: none
  int32_t immediate, size, line, kind;
};

struct Range {
  uint64_t first, end;
  int64_t writable;
};

struct Launch {
  const Instruction* code;
  int64_t num_instructions;
  uint32_t grid[3];
  int32_t warps, shared_bytes, frame_bytes;
  const uint8_t* constants;
  int64_t constant_bytes;
  Range* ranges;
  int64_t num_ranges;
  uint64_t seed;        // 0: programs and warps in order
  uint64_t error_seed;  // of approximations
  int32_t in_flight, check_races, ulps;
  uint64_t most_steps;  // of all warps: more are a fault
  int64_t cut;          // steps of a warp at which its program is given up; 0: never
  // Results.
  int64_t* executed;              // by instruction; null: not counted
  int64_t *steps, *barriers;      // by program: of its longest warp
  int64_t* read;  // by program: bytes of what is not writable; lanes at one address count once
  int64_t wide;                   // of these, bytes that lanes load by 16
  int64_t instructions, atomics;  // of all warps
  int64_t divergences;
  char error[1000], races[20000];
};

template <class T>
T bits_as(auto value) {
  static_assert(sizeof(T) == sizeof(value));
  T result;
  memcpy(&result, &value, sizeof(T));
  return result;
}

uint32_t hashed(uint64_t x) {
  x ^= x >> 33, x *= 0xff51afd7ed558ccdULL, x ^= x >> 33, x *= 0xc4ceb9fe1a85ec53ULL;
  return (uint32_t)(x ^ (x >> 33));
}

inline float flushed(float a) { return fabsf(a) < SMALLEST_NORMAL ? copysignf(0.0f, a) : a; }
inline float canonical(float a) { return a != a ? bits_as<float>(0x7FFFFFFFu) : a; }
inline double canonical(double a) { return a; }

// Of a NaN and a number the number; -0 is smaller than 0.
template <class T>
inline T larger(T a, T b) {
  if (a != a) return canonical(b);
  if (b != b) return a;
  if (a == b) return signbit(a) ? b : a;
  return a > b ? a : b;
}
template <class T>
inline T smaller(T a, T b) {
  if (a != a) return canonical(b);
  if (b != b) return a;
  if (a == b) return signbit(a) ? a : b;
  return a < b ? a : b;
}

inline double upper_half(double a) {  // rounded to the upper 32 bits
  return bits_as<double>((bits_as<uint64_t>(a) + 0x80000000ULL) & 0xFFFFFFFF00000000ULL);
}

inline uint32_t reversed(uint32_t x) {
  uint32_t r = 0;
  for (int i = 0; i < 32; i++) r |= ((x >> i) & 1) << (31 - i);
  return r;
}

template <class T>
inline T bit_field(T a, uint32_t start, uint32_t length) {
  constexpr uint32_t width = 8 * sizeof(T);
  start &= 255, length &= 255;
  if (length == 0) return 0;
  const bool is_signed = (T)-1 < (T)0;
  if (start >= width) return is_signed ? a >> (width - 1) : 0;
  const T shifted = a >> start;
  if (length >= width) return shifted;
  const T up = (T)((uint64_t)shifted << (width - length));
  return up >> (width - length);
}

inline uint32_t permuted(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = ((uint64_t)b << 32) | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t s = (selector >> (4 * i)) & 15;
    uint32_t one = (bytes >> (8 * (s & 7))) & 255;
    if (s & 8) one = one & 128 ? 255 : 0;
    r |= one << (8 * i);
  }
  return r;
}

inline uint32_t any_logic(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t r = 0;
  for (int i = 0; i < 8; i++)
    if (table >> i & 1) r |= ((i & 4) ? a : ~a) & ((i & 2) ? b : ~b) & ((i & 1) ? c : ~c);
  return r;
}

inline float from_bf16(uint16_t a) { return bits_as<float>((uint32_t)a << 16); }

inline uint16_t to_bf16(float a) {
  if (a != a) return 0x7FFF;
  const uint32_t u = bits_as<uint32_t>(a);
  return (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
}

inline float from_f16(uint16_t a) {
  const uint32_t sign = (uint32_t)(a & 0x8000) << 16, rest = a & 0x7FFF;
  if (rest >= 0x7C00) return bits_as<float>(sign | 0x7F800000u | (rest << 13));
  // The exponents' biases differ by 112.
  const float value = bits_as<float>(rest << 13) * 0x1p112f;
  return bits_as<float>(sign | bits_as<uint32_t>(value));
}

inline uint16_t to_f16(float a) {
  if (a != a) return 0x7FFF;
  const uint16_t sign = bits_as<uint32_t>(a) >> 16 & 0x8000;
  const float size = fabsf(a);
  if (size >= 65520.0f) return sign | 0x7C00;
  if (size < 0x1p-14f) return sign | (uint16_t)lrintf(size * 0x1p24f);  // subnormal: to even
  const uint32_t u = bits_as<uint32_t>(size) - (112u << 23);
  return sign | (uint16_t)((u + 0xFFF + ((u >> 13) & 1)) >> 13);
}

template <class T>
inline T saturated(double a) {
  const bool is_signed = (T)-1 < (T)0;
  const T lowest = is_signed ? (T)((T)1 << (8 * sizeof(T) - 1)) : 0;
  if (a != a) return sizeof(T) == 8 ? (T)0x8000000000000000ULL : 0;
  const double t = trunc(a), bound = ldexp(1, 8 * sizeof(T) - is_signed);
  if (t < (is_signed ? -bound : 0.0)) return lowest;
  return t >= bound ? (T)~lowest : (T)t;
}

// Bit l of the result is flags[l], 0 or 1.
inline uint32_t packed(const uint32_t* flags) {
  uint32_t r = 0;
  for (int l = 0; l < LANES; l++) r |= flags[l] << l;
  return r;
}

template <class Function>
inline uint64_t pairs(Function function, uint64_t a, uint64_t b, uint64_t c = 0) {
  const auto half = [](uint64_t v, int i) { return bits_as<float>((uint32_t)(v >> (32 * i))); };
  uint64_t r = 0;
  for (int i = 0; i < 2; i++) {
    const float one = canonical(function(half(a, i), half(b, i), half(c, i)));
    r |= (uint64_t)bits_as<uint32_t>(one) << (32 * i);
  }
  return r;
}
inline uint64_t add_pairs(uint64_t a, uint64_t b) {
  return pairs([](float x, float y, float) { return x + y; }, a, b);
}
inline uint64_t sub_pairs(uint64_t a, uint64_t b) {
  return pairs([](float x, float y, float) { return x - y; }, a, b);
}
inline uint64_t mul_pairs(uint64_t a, uint64_t b) {
  return pairs([](float x, float y, float) { return x * y; }, a, b);
}
inline uint64_t fma_pairs(uint64_t a, uint64_t b, uint64_t c) {
  return pairs([](float x, float y, float z) { return __builtin_fmaf(x, y, z); }, a, b, c);
}

uint64_t load_bytes(const void* at, int size) {
  uint64_t v = 0;
  memcpy(&v, at, size);  // little-endian, as the device
  return v;
}

// Asynchronous work is done at once, or as late as a wait allows.
struct Copy {
  uint32_t to;
  uint64_t from;
  uint32_t size, taken;
  int lane;
  const Instruction* by;
};
struct Product {
  int64_t pc;
  uint64_t a, b;
  bool keep;
};

using Clock = std::vector<uint32_t>;  // by warp of the launch

struct Warp {
  uint8_t* frame;
  int64_t pc = 0;
  uint32_t mask = ALL;
  std::vector<std::pair<int64_t, uint32_t>> others;  // lanes elsewhere: address, lanes
  bool waits = false, done = false;
  int program, number;
  int64_t steps = 0, barriers = 0;
  uint32_t epoch = 1;  // since a barrier of the warp
  Clock clock;
  std::vector<Copy> copies;
  std::vector<std::vector<Copy>> copy_groups;
  std::vector<Product> products;
  std::vector<std::vector<Product>> product_groups;
};

// A byte of shared memory: by whom and since which barrier.
struct SharedByte {
  uint32_t written = 0, read = 0;  // epoch of the program + 1
  int16_t writer = -1, reader = -1;
  uint32_t writer_epoch = 0;  // of the writing warp
  int8_t writer_lane = -1;
};

// Two bytes of global memory: the last writer, the last reader, and of atomics that nothing orders
// one more.
struct GlobalUnit {
  int32_t writer = -1, other = -1;
  uint32_t written = 0, other_written = 0;
  int32_t reader = -1;
  uint32_t read = 0;
  bool by_atomic = false;
};

struct Program {
  int id;
  uint32_t x, y, z;
  int alive;
  uint32_t epoch = 0;
  bool cut = false;
  std::vector<Warp> warps;
  std::vector<uint8_t> shared;
  std::vector<SharedByte> touched;
};

struct Machine {
  Launch& L;
  uint64_t state;
  bool failed = false;
  std::vector<std::vector<GlobalUnit>> units;  // by range
  std::unordered_map<uint64_t, Clock> released;  // by address of an atomic
  std::map<std::string, int> races;

  explicit Machine(Launch& launch)
      : L(launch), state(launch.seed * 0x9E3779B97F4A7C15ULL + 0x1234567), units(launch.num_ranges) {}

  uint32_t random() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 11);
  }

  bool fail(const char* what, const Warp& W, const Instruction* I, uint64_t address = 0) {
    if (!failed)
      snprintf(L.error, sizeof L.error, "%s: program %d, warp %d, address %llx, line %d", what,
               W.program, W.number, (unsigned long long)address, I ? I->line : -1);
    failed = true;
    return false;
  }

  // An error of up to so many ulp that depends on the input alone; integers are left exact, as
  // ex2 of them is on the device.
  float approximate(float value, float of) const {
    value = canonical(value);
    if (!L.ulps || !(fabsf(value) < 3e38f) || value == 0 || of == floorf(of)) return value;
    const uint64_t key = bits_as<uint32_t>(of) ^ ((L.error_seed + 1) << 32);
    const int error = (int)(hashed(key) % (2 * L.ulps + 1)) - L.ulps;
    const float moved = bits_as<float>(bits_as<uint32_t>(value) + error);
    return fabsf(moved) < SMALLEST_NORMAL ? value : moved;
  }

  // Memory ---------------------------------------------------------------------------------------

  int find(uint64_t address, uint64_t size) const {
    for (int i = 0; i < L.num_ranges; i++)
      if (address >= L.ranges[i].first && address + size <= L.ranges[i].end) return i;
    return -1;
  }

  void race(const char* kind, const Instruction& I, uint64_t address = 0) {
    char text[200];
    snprintf(text, sizeof text, "%s, line %d, range %d", kind, I.line, find(address, 1));
    races[text]++;
  }

  void track_global(Warp& W, const Instruction& I, int range, uint64_t address, int size, bool write,
                    bool atomic) {
    const Range& r = L.ranges[range];
    auto& all = units[range];
    if (all.empty()) all.resize((r.end - r.first + 1) / 2);
    const int self = W.program * L.warps + W.number;
    for (int at = 0; at < size; at += 2) {
      GlobalUnit& u = all[(address - r.first + at) / 2];
      const auto after = [&](int writer, uint32_t written) {
        return writer >= 0 && writer != self && written > W.clock[writer];
      };
      const bool unordered = after(u.writer, u.written);
      if ((unordered && !(atomic && u.by_atomic)) || (!atomic && after(u.other, u.other_written)))
        race(!write ? "read after write" : atomic ? "atomic after write" : "write after write", I,
             address);
      if (write && u.reader >= 0 && u.reader != self && u.read > W.clock[u.reader] && !atomic)
        race("write after read", I, address);
      if (write) {
        if (!atomic) u.other = -1;
        if (atomic && unordered) u.other = u.writer, u.other_written = u.written;
        u.writer = self, u.written = W.clock[self], u.by_atomic = atomic;
        if (!atomic) u.reader = -1;
      } else {
        u.reader = self, u.read = W.clock[self];
      }
    }
  }

  // stored: what is written, or null; the same value again is harmless.
  void track_shared(Program& P, Warp& W, const Instruction& I, uint32_t address, int size, bool write,
                    int lane, const uint8_t* stored = nullptr) {
    const uint32_t now = P.epoch + 1;
    for (int at = 0; at < size; at++) {
      SharedByte& s = P.touched[address + at];
      const bool fresh = s.written == now;
      if (stored && fresh && stored[at] == P.shared[address + at]) continue;
      if (fresh && s.writer != W.number)
        race(write ? "shared: write after write" : "shared: read after write", I);
      if (fresh && s.writer == W.number && s.writer_epoch == W.epoch && s.writer_lane != lane)
        race(write ? "shared, in a warp: write after write" : "shared, in a warp: read after write", I);
      if (write && s.read == now && s.reader != W.number) race("shared: write after read", I);
      if (write) {
        s.written = now, s.writer = W.number, s.writer_epoch = W.epoch, s.writer_lane = lane;
      } else {
        s.reader = s.read == now && s.reader != W.number ? -2 : W.number;  // -2: several
        s.read = now;
      }
    }
  }

  // Registers are of I.kind & 255 bytes, memory of I.size; 256: loads extend the sign.
  static uint64_t from_register(const Instruction& I, const uint8_t* r, int l) {
    const int bytes = I.kind & 255;
    return load_bytes(r + l * bytes, bytes);
  }
  static void to_register(const Instruction& I, uint8_t* r, int l, uint64_t v) {
    const int bytes = I.kind & 255, spare = 64 - 8 * I.size;
    if (I.kind & 256) v = (uint64_t)((int64_t)(v << spare) >> spare);
    memcpy(r + l * bytes, &v, bytes);
  }
  void move(const Instruction& I, uint8_t* F, uint8_t* memory, int l, bool store) {
    for (int k = 0; k < I.n; k++) {
      uint8_t *r = F + I.o[1 + k], *at = memory + k * I.size;
      if (store) {
        const uint64_t v = from_register(I, r, l);
        memcpy(at, &v, I.size);
      } else {
        to_register(I, r, l, load_bytes(at, I.size));
      }
    }
  }

  bool access_global(Warp& W, const Instruction& I, uint32_t m, bool store) {
    const uint64_t* addresses = (const uint64_t*)(W.frame + I.o[0]);
    const int size = I.size * I.n;
    int range = -1;
    uint64_t before = 0;
    for (int l = 0; l < LANES; l++) {
      if (!(m >> l & 1)) continue;
      const uint64_t a = addresses[l] + (int64_t)I.immediate;
      if (range < 0 || a < L.ranges[range].first || a + size > L.ranges[range].end)
        if ((range = find(a, size)) < 0)
          return fail(store ? "store out of bounds" : "load out of bounds", W, &I, a);
      const Range& r = L.ranges[range];
      if (a % size) return fail("misaligned access", W, &I, a);
      if (store && !r.writable) return fail("store to an input", W, &I, a);
      if (a != before && !r.writable) {
        L.read[W.program] += size;
        if (size == 16) L.wide += size;
      }
      before = a;
      if (L.check_races && r.writable) track_global(W, I, range, a, size, store, false);
      move(I, W.frame, (uint8_t*)a, l, store);
    }
    return true;
  }

  bool access_shared(Program& P, Warp& W, const Instruction& I, uint32_t m, bool store) {
    const uint32_t* addresses = (const uint32_t*)(W.frame + I.o[0]);
    const int size = I.size * I.n;
    for (int l = 0; l < LANES; l++) {
      if (!(m >> l & 1)) continue;
      const uint32_t a = addresses[l] + I.immediate;
      if ((uint64_t)a + size > P.shared.size()) return fail("out of shared memory", W, &I, a);
      if (a % size) return fail("misaligned shared access", W, &I, a);
      if (L.check_races) {
        uint8_t stored[64];
        if (store) move(I, W.frame, stored, l, true);
        track_shared(P, W, I, a, size, store, l, store ? stored : nullptr);
      }
      move(I, W.frame, P.shared.data() + a, l, store);
    }
    return true;
  }

  // o: old value, address, operand; kind: what; n: 1 acquires, 2 releases, 3 both.
  bool atomic(Warp& W, const Instruction& I, uint32_t m) {
    enum { ADD, MAX_SIGNED, MAX, EXCHANGE, MIN_SIGNED, MIN, AND, OR };
    const uint64_t* addresses = (const uint64_t*)(W.frame + I.o[1]);
    const int self = W.program * L.warps + W.number, spare = 64 - 8 * I.size;
    for (int l = 0; l < LANES; l++) {
      if (!(m >> l & 1)) continue;
      const uint64_t a = addresses[l] + (int64_t)I.immediate;
      const int range = find(a, I.size);
      if (range < 0) return fail("atomic out of bounds", W, &I, a);
      if (a % I.size) return fail("misaligned atomic", W, &I, a);
      if (!L.ranges[range].writable) return fail("atomic on an input", W, &I, a);
      L.atomics++;
      if (L.check_races) {
        Clock& there = released[a];
        there.resize(W.clock.size());
        for (size_t i = 0; i < there.size(); i++) {
          if (I.n & 1) W.clock[i] = std::max(W.clock[i], there[i]);
          if (I.n & 2) there[i] = std::max(W.clock[i], there[i]);
        }
        track_global(W, I, range, a, I.size, true, true);
        if (I.n & 2) W.clock[self]++;
      }
      const auto extended = [spare](uint64_t v) { return (int64_t)(v << spare) >> spare; };
      const uint64_t old = load_bytes((void*)a, I.size);
      const uint64_t v = load_bytes(W.frame + I.o[2] + l * I.size, I.size);
      uint64_t next = v;
      switch (I.kind) {
        case ADD: next = old + v; break;
        case MAX_SIGNED: next = std::max(extended(old), extended(v)); break;
        case MAX: next = std::max(old, v); break;
        case EXCHANGE: break;
        case MIN_SIGNED: next = std::min(extended(old), extended(v)); break;
        case MIN: next = std::min(old, v); break;
        case AND: next = old & v; break;
        case OR: next = old | v; break;
      }
      memcpy((void*)a, &next, I.size);
      memcpy(W.frame + I.o[0] + l * I.size, &old, I.size);
    }
    return true;
  }

  void finish(Program& P, Warp& W, const Copy& c) {
    if (L.check_races) track_shared(P, W, *c.by, c.to, c.size, true, c.lane);
    memset(P.shared.data() + c.to, 0, c.size);
    memcpy(P.shared.data() + c.to, (const void*)c.from, c.taken);
  }

  bool copy_async(Program& P, Warp& W, const Instruction& I, uint32_t m) {
    const uint32_t* to = (const uint32_t*)(W.frame + I.o[0]);
    const uint64_t* from = (const uint64_t*)(W.frame + I.o[1]);
    const uint32_t* sizes = (const uint32_t*)(W.frame + I.o[2]);
    const bool late = random() & 1;
    for (int l = 0; l < LANES; l++) {
      if (!(m >> l & 1)) continue;
      const uint32_t a = to[l] + I.immediate, taken = std::min(sizes[l], (uint32_t)I.size);
      if ((uint64_t)a + I.size > P.shared.size() || a % I.size)
        return fail("bad shared address of cp.async", W, &I, a);
      if (taken) {
        const int range = find(from[l], taken);
        if (range < 0) return fail("cp.async out of bounds", W, &I, from[l]);
        if (from[l] % I.size) return fail("misaligned cp.async", W, &I, from[l]);
        if (!L.ranges[range].writable) L.read[W.program] += taken;
      }
      const Copy copy{a, from[l], (uint32_t)I.size, taken, l, &I};
      if (late) {
        memset(P.shared.data() + a, 0xEE, I.size);  // not there yet
        W.copies.push_back(copy);
      } else {
        finish(P, W, copy);
      }
    }
    return true;
  }

  // Matrices -------------------------------------------------------------------------------------

  static float half(bool is_fp16, uint16_t q) { return is_fp16 ? from_f16(q) : from_bf16(q); }

  bool move_matrices(Program& P, Warp& W, const Instruction& I, bool store, bool transposed) {
    const uint32_t* rows = (const uint32_t*)(W.frame + I.o[0]);
    std::vector<uint32_t> values(I.n * LANES);
    if (store)
      for (int k = 0; k < I.n; k++) memcpy(&values[k * LANES], W.frame + I.o[1 + k], 128);
    for (int k = 0; k < I.n; k++)
      for (int l = 0; l < LANES; l++)
        for (int h = 0; h < 2; h++) {
          int row = l / 4, column = (l % 4) * 2 + h;
          if (transposed) std::swap(row, column);
          const uint32_t a = rows[k * 8 + row] + I.immediate;
          if (a % 16 || (uint64_t)a + 16 > P.shared.size())
            return fail("bad address of a matrix", W, &I, a);
          uint16_t* at = (uint16_t*)(P.shared.data() + a) + column;
          uint32_t& v = values[k * LANES + l];
          const uint16_t given = v >> (16 * h);
          if (L.check_races)
            track_shared(P, W, I, a + column * 2, 2, store, l, store ? (const uint8_t*)&given : nullptr);
          if (store)
            *at = given;
          else
            v = (v & ~(0xFFFFu << (16 * h))) | ((uint32_t)*at << (16 * h));
        }
    if (!store)
      for (int k = 0; k < I.n; k++) memcpy(W.frame + I.o[1 + k], &values[k * LANES], 128);
    return true;
  }

  // A lane's registers of a 16 x 16 left side.
  static void left_side(const Warp& W, const int32_t* registers, bool is_fp16, float A[16][16]) {
    for (int l = 0; l < LANES; l++)
      for (int r = 0; r < 4; r++)
        for (int h = 0; h < 2; h++) {
          const uint16_t q = ((uint32_t*)(W.frame + registers[r]))[l] >> (16 * h);
          A[l / 4 + (r & 1) * 8][l % 4 * 2 + h + (r >> 1) * 8] = half(is_fp16, q);
        }
  }

  // m16n8k16, row.col. o: d[4], a[4], b[2], c[2]; c[2] and c[3] are in immediate and size.
  void multiply(Warp& W, const Instruction& I, bool is_fp16) {
    uint8_t* F = W.frame;
    float A[16][16], B[16][8], C[16][8];
    const int32_t c[4] = {I.o[10], I.o[11], I.immediate, I.size};
    left_side(W, I.o + 4, is_fp16, A);
    for (int l = 0; l < LANES; l++) {
      const int g = l / 4, t = l % 4;
      for (int h = 0; h < 2; h++) {
        for (int r = 0; r < 2; r++) {
          const uint16_t q = ((uint32_t*)(F + I.o[8 + r]))[l] >> (16 * h);
          B[t * 2 + h + r * 8][g] = half(is_fp16, q);
        }
      }
      for (int r = 0; r < 4; r++) C[g + (r >> 1) * 8][t * 2 + (r & 1)] = ((float*)(F + c[r]))[l];
    }
    for (int l = 0; l < LANES; l++)
      for (int r = 0; r < 4; r++) {
        const int row = l / 4 + (r >> 1) * 8, column = (l % 4) * 2 + (r & 1);
        double sum = C[row][column];
        for (int k = 0; k < 16; k++) sum += (double)A[row][k] * B[k][column];
        ((float*)(F + I.o[r]))[l] = (float)sum;
      }
  }

  // wgmma m64nNk16: the left side in registers or in shared memory, K-major; the right side in shared
  // memory, K-major, or N-major (I.kind); 128-byte swizzle; a warp has 16 rows. The registers of the
  // result stand in the instructions that follow, twelve in each.
  bool finish(Program& P, Warp& W, const Product& p) {
    const Instruction& I = L.code[p.pc];
    float A[16][16], B[256][16];
    const auto element = [&](uint64_t descriptor, int row, int k, bool across) -> float {
      const auto offset = [descriptor](int bit) { return (descriptor >> bit & 0x3FFF) << 4; };
      if (descriptor >> 62 != 1) return fail("wgmma without 128-byte swizzle", W, &I), 0.0f;
      uint32_t a = offset(0);
      if (across)
        a += row / 64 * offset(16) + k / 8 * offset(32) + k % 8 * 128 + row % 64 * 2;
      else
        a += row / 8 * offset(32) + row % 8 * 128 + k * 2;
      a ^= ((a >> 7) & 7) << 4;
      if (a + 2 > P.shared.size()) return fail("wgmma out of shared memory", W, &I, a), 0.0f;
      if (L.check_races) track_shared(P, W, I, a, 2, false, 0);
      return half(I.size, *(const uint16_t*)(P.shared.data() + a));
    };
    if (I.o[0] < 0)
      left_side(W, I.o + 3, I.size, A);
    else
      for (int r = 0; r < 16; r++)
        for (int k = 0; k < 16; k++) A[r][k] = element(p.a, 16 * (W.number % 4) + r, k, false);
    for (int n = 0; n < I.n; n++)
      for (int k = 0; k < 16; k++) B[n][k] = element(p.b, n, k, I.kind);
    for (int i = 0; i < I.n / 2; i++) {
      float* d = (float*)(W.frame + L.code[p.pc + 1 + i / 12].o[i % 12]);
      for (int l = 0; l < LANES; l++) {
        const int row = l / 4 + 8 * ((i >> 1) & 1), column = (i >> 2) * 8 + (l % 4) * 2 + (i & 1);
        double sum = p.keep ? d[l] : 0;
        for (int k = 0; k < 16; k++) sum += (double)A[row][k] * B[column][k];
        d[l] = (float)sum;
      }
    }
    return !failed;
  }

  // Lanes ----------------------------------------------------------------------------------------

  // o: result, source, lane or distance, clamp, predicate.
  bool shuffle(Warp& W, const Instruction& I, uint32_t m) {
    const auto at = [&](int k) { return (uint32_t*)(W.frame + I.o[k]); };
    const uint32_t *source = at(1), *by = at(2), *clamp = at(3);
    uint32_t values[LANES], within = 0;
    for (int l = 0; l < LANES; l++) {
      if (!(m >> l & 1)) continue;
      const int segment = (clamp[l] >> 8) & 31, end = clamp[l] & 31, b = by[l] & 31;
      const int last = (l & segment) | (end & ~segment), first = l & segment;
      int j = l;
      switch (I.op) {
        case SHFL_BFLY: j = l ^ b; break;
        case SHFL_UP: j = l - b; break;
        case SHFL_DOWN: j = l + b; break;
        case SHFL_IDX: j = first | (b & ~segment); break;
      }
      const bool inside = I.op == SHFL_UP ? j >= last : j <= last;
      if (!inside) j = l;
      if (!(m >> j & 1)) return fail("a shuffle from a lane that is not there", W, &I);
      values[l] = source[j];
      within |= (uint32_t)inside << l;
    }
    for (int l = 0; l < LANES; l++)
      if (m >> l & 1) at(0)[l] = values[l];
    if (I.o[4] >= 0) {
      uint32_t* p = at(4);
      *p = (*p & ~m) | (within & m);
    }
    return true;
  }

  bool reduce(Warp& W, const Instruction& I, uint32_t m) {
    enum { ADD, MAX_SIGNED, MIN_SIGNED, MAX, MIN, AND, OR, XOR, MAX_FLOAT = 10, MIN_FLOAT };
    if (!m) return true;
    const uint32_t* source = (const uint32_t*)(W.frame + I.o[1]);
    const int first = __builtin_ctz(m);
    if (((const uint32_t*)(W.frame + I.o[2]))[first] != m)
      return fail("redux of lanes that are not there", W, &I);
    uint32_t r = source[first];
    for (int l = first + 1; l < LANES; l++) {
      if (!(m >> l & 1)) continue;
      const uint32_t v = source[l];
      switch (I.kind) {
        case ADD: r += v; break;
        case MAX_SIGNED: r = std::max((int32_t)r, (int32_t)v); break;
        case MIN_SIGNED: r = std::min((int32_t)r, (int32_t)v); break;
        case MAX: r = std::max(r, v); break;
        case MIN: r = std::min(r, v); break;
        case AND: r &= v; break;
        case OR: r |= v; break;
        case XOR: r ^= v; break;
        case MAX_FLOAT: r = bits_as<uint32_t>(larger(bits_as<float>(r), bits_as<float>(v))); break;
        case MIN_FLOAT: r = bits_as<uint32_t>(smaller(bits_as<float>(r), bits_as<float>(v))); break;
      }
    }
    for (int l = 0; l < LANES; l++)
      if (m >> l & 1) ((uint32_t*)(W.frame + I.o[0]))[l] = r;
    return true;
  }

  // o[0] and n parts of I.size bytes in o[1..]
  void pack(Warp& W, const Instruction& I, uint32_t m, bool unpack) {
    const int whole_bytes = I.n * I.size;
    for (int l = 0; l < LANES; l++) {
      if (!(m >> l & 1)) continue;
      uint8_t* whole = W.frame + I.o[0] + l * whole_bytes;
      for (int k = 0; k < I.n; k++) {
        if (I.o[1 + k] < 0) continue;
        uint8_t* part = W.frame + I.o[1 + k] + l * I.size;
        unpack ? memcpy(part, whole + k * I.size, I.size) : memcpy(whole + k * I.size, part, I.size);
      }
    }
  }

  // Two predicates of two halves each: equal, or with the immediate not.
  void compare_halves(Warp& W, const Instruction& I, uint32_t m, bool is_fp16) {
    const uint32_t *a = (uint32_t*)(W.frame + I.o[2]), *b = (uint32_t*)(W.frame + I.o[3]);
    for (int h = 0; h < 2; h++) {
      uint32_t met = 0;
      for (int l = 0; l < LANES; l++)
        met |= (uint32_t)(half(is_fp16, a[l] >> (16 * h)) == half(is_fp16, b[l] >> (16 * h))) << l;
      if (I.immediate) met = ~met;
      uint32_t* p = (uint32_t*)(W.frame + I.o[h]);
      *p = (*p & ~m) | (met & m);
    }
  }

  uint32_t special_register(const Program& P, const Warp& W, int which, int l) const {
    enum { THREAD, X, Y, Z, GRID_X, GRID_Y, GRID_Z, LANE, THREADS, WARP };
    switch (which) {
      case THREAD: return W.number * LANES + l;
      case X: return P.x;
      case Y: return P.y;
      case Z: return P.z;
      case GRID_X: return L.grid[0];
      case GRID_Y: return L.grid[1];
      case GRID_Z: return L.grid[2];
      case LANE: return l;
      case THREADS: return L.warps * LANES;
      case WARP: return W.number;
      default: return 0;  // the second and third dimension of a block
    }
  }

  // The lanes at the lowest address go first; those that meet go on together.
  static void converge(Warp& W) {
    auto least = std::min_element(W.others.begin(), W.others.end());
    if (least->first < W.pc || !W.mask) {
      std::swap(W.pc, least->first);
      std::swap(W.mask, least->second);
    }
    for (size_t i = 0; i < W.others.size();) {
      if (W.others[i].first == W.pc || !W.others[i].second) {
        W.mask |= W.others[i].second;
        W.others.erase(W.others.begin() + i);
      } else {
        i++;
      }
    }
  }

  // Up to so many instructions of a warp, until it waits or ends.
  bool step(Program& P, Warp& W, int64_t budget) {
    uint8_t* F = W.frame;
    const auto bits_at = [F](int o) { return *(const uint32_t*)(F + o); };
    const auto set_bits = [F](int o, uint32_t bits, uint32_t m) {
      uint32_t* p = (uint32_t*)(F + o);
      *p = (*p & ~m) | (bits & m);
    };
    while (budget-- > 0) {
      if (!W.others.empty()) converge(W);
      if (W.pc >= L.num_instructions) return fail("ran past the end", W, nullptr);
      const Instruction& I = L.code[W.pc];
      uint32_t m = W.mask;
      if (I.predicate >= 0) m &= I.negated ? ~bits_at(I.predicate) : bits_at(I.predicate);
      W.steps++;
      if (L.cut && W.steps > L.cut) {
        P.cut = true;
        return true;
      }
      if (L.executed) L.executed[W.pc]++;
      if ((uint64_t)++L.instructions > L.most_steps) return fail("too many steps", W, &I);
      switch (I.op) {
#include "cases.inc"
        case NOP: break;
        case LD_GLOBAL:
        case ST_GLOBAL:
          if (!access_global(W, I, m, I.op == ST_GLOBAL)) return false;
          break;
        case LD_SHARED:
        case ST_SHARED:
          if (!access_shared(P, W, I, m, I.op == ST_SHARED)) return false;
          break;
        case ATOM:
          if (!atomic(W, I, m)) return false;
          if (m && budget > 0 && L.seed && random() & 1) budget = 0;
          break;
        case CP_ASYNC:
          if (!copy_async(P, W, I, m)) return false;
          break;
        case CP_COMMIT:
          W.copy_groups.push_back(std::move(W.copies));
          W.copies.clear();
          break;
        case CP_WAIT:
          while ((int)W.copy_groups.size() > I.immediate) {
            for (const Copy& copy : W.copy_groups.front()) finish(P, W, copy);
            W.copy_groups.erase(W.copy_groups.begin());
          }
          break;
        case LDMATRIX:
        case STMATRIX:
          if (m != ALL) return fail("a matrix moved by a part of a warp", W, &I);
          if (!move_matrices(P, W, I, I.op == STMATRIX, I.size)) return false;
          break;
        case MMA_BF16:
        case MMA_F16:
          if (m != ALL) return fail("mma in a part of a warp", W, &I);
          multiply(W, I, I.op == MMA_F16);
          break;
        case WGMMA:
          if (m != ALL) return fail("wgmma in a part of a warp", W, &I);
          W.products.push_back({W.pc, I.o[0] < 0 ? 0 : *(uint64_t*)(F + I.o[0]),
                                *(uint64_t*)(F + I.o[1]),
                                I.o[2] >= 0 && (bits_at(I.o[2]) & 1)});
          break;
        case WGMMA_COMMIT:
          W.product_groups.push_back(std::move(W.products));
          W.products.clear();
          if (random() & 1)
            for (auto& group : W.product_groups) {
              for (const Product& product : group)
                if (!finish(P, W, product)) return false;
              group.clear();
            }
          break;
        case WGMMA_WAIT:
          while ((int)W.product_groups.size() > I.immediate) {
            for (const Product& product : W.product_groups.front())
              if (!finish(P, W, product)) return false;
            W.product_groups.erase(W.product_groups.begin());
          }
          break;
        case BAR_SYNC:
          if (m != W.mask || !W.others.empty())
            return fail("a barrier in a part of a warp", W, &I);
          W.pc++;
          W.waits = true;
          W.barriers++;
          return true;
        case BAR_WARP_SYNC: W.epoch++; break;
        case BRA:
          if (m == W.mask) {
            W.pc = I.immediate;
            continue;
          }
          if (m == 0) break;
          L.divergences++;
          W.others.push_back({W.pc + 1, W.mask & ~m});
          W.mask = m;
          W.pc = I.immediate;
          continue;
        case RET:
          W.mask &= ~m;
          if (W.mask) break;
          if (W.others.empty()) {
            W.done = true;
            return true;
          }
          converge(W);
          continue;
        case SREG:
          for (int l = 0; l < LANES; l++)
            if (m >> l & 1)
              ((uint32_t*)(F + I.o[0]))[l] = special_register(P, W, I.immediate, l);
          break;
        case PACK:
        case UNPACK: pack(W, I, m, I.op == UNPACK); break;
        case SETP2_BF16X2:
        case SETP2_F16X2: compare_halves(W, I, m, I.op == SETP2_F16X2); break;
        case SHFL_BFLY:
        case SHFL_UP:
        case SHFL_DOWN:
        case SHFL_IDX:
          if (!shuffle(W, I, m)) return false;
          break;
        case REDUX:
          if (!reduce(W, I, m)) return false;
          break;
        case VOTE_BALLOT:
          for (int l = 0; l < LANES; l++)
            if (m >> l & 1) ((uint32_t*)(F + I.o[0]))[l] = bits_at(I.o[1]) & m;
          break;
        case VOTE_ANY: set_bits(I.o[0], bits_at(I.o[1]) & m ? ALL : 0, m); break;
        case VOTE_ALL: set_bits(I.o[0], (bits_at(I.o[1]) & m) == m ? ALL : 0, m); break;
        default: return fail("an unknown instruction", W, &I);
      }
      W.pc++;
    }
    return true;
  }

  // Programs -------------------------------------------------------------------------------------

  struct Free {
    void operator()(void* p) const { free(p); }
  };
  std::vector<std::unique_ptr<uint8_t, Free>> frames;
  std::vector<uint8_t*> spare;

  uint8_t* frame() {
    const size_t size = (L.frame_bytes + 63) & ~63;
    if (spare.empty()) {
      frames.emplace_back((uint8_t*)aligned_alloc(64, size));
      spare.push_back(frames.back().get());
    }
    uint8_t* F = spare.back();
    spare.pop_back();
    memcpy(F, L.constants, L.constant_bytes);
    memset(F + L.constant_bytes, 0xAB, size - L.constant_bytes);  // unwritten registers
    return F;
  }

  std::unique_ptr<Program> start(uint32_t id, uint64_t programs) {
    auto P = std::make_unique<Program>();
    P->id = id;
    P->x = id % L.grid[0], P->y = id / L.grid[0] % L.grid[1], P->z = id / L.grid[0] / L.grid[1];
    P->alive = L.warps;
    P->shared.assign(L.shared_bytes, 0xCD);
    if (L.check_races) P->touched.resize(L.shared_bytes);
    P->warps.resize(L.warps);
    for (int w = 0; w < L.warps; w++) {
      Warp& W = P->warps[w];
      W.frame = frame(), W.program = id, W.number = w;
      if (L.check_races) {
        W.clock.resize(programs * L.warps);
        W.clock[id * L.warps + w] = 1;
      }
    }
    return P;
  }

  void release(Program& P) {  // all of its warps are at the barrier
    P.epoch++;
    Clock joined;
    if (L.check_races) {
      joined = P.warps[0].clock;
      for (const Warp& W : P.warps)
        for (size_t i = 0; i < joined.size(); i++) joined[i] = std::max(joined[i], W.clock[i]);
    }
    for (Warp& W : P.warps) {
      W.waits = false;
      W.epoch++;
      if (L.check_races) {
        W.clock = joined;
        W.clock[P.id * L.warps + W.number]++;
      }
    }
  }

  void run() {
    const uint64_t programs = (uint64_t)L.grid[0] * L.grid[1] * L.grid[2];
    std::vector<uint32_t> order(programs);
    for (uint64_t i = 0; i < programs; i++) order[i] = i;
    if (L.seed)
      for (uint64_t i = programs; i > 1; i--) std::swap(order[i - 1], order[random() % i]);
    std::vector<std::unique_ptr<Program>> live;
    for (uint64_t next = 0; next < programs || !live.empty();) {
      while ((int)live.size() < L.in_flight && next < programs)
        live.push_back(start(order[next++], programs));
      const size_t chosen = L.seed ? random() % live.size() : 0;
      Program& P = *live[chosen];
      Warp* ready[64];
      int count = 0;
      for (Warp& W : P.warps)
        if (!W.done && !W.waits) ready[count++] = &W;
      if (count == 0) {
        release(P);
        continue;
      }
      Warp& W = *ready[L.seed ? random() % count : 0];
      const int64_t turn = L.in_flight > 1 ? 1LL << random() % 14 : 1LL << (4 + random() % 20);
      if (!step(P, W, L.seed ? turn : INT64_MAX)) return;
      if (!W.done && !P.cut) continue;
      L.steps[P.id] = std::max(L.steps[P.id], W.steps);
      L.barriers[P.id] = std::max(L.barriers[P.id], W.barriers);
      if (--P.alive == 0 || P.cut) {
        for (Warp& V : P.warps) spare.push_back(V.frame);
        live.erase(live.begin() + chosen);
      }
    }
  }
};

}  // namespace

// 0: done; 1: failed, as L.error says.
extern "C" int run_launch(Launch* L) {
  L->error[0] = L->races[0] = 0;
  Machine machine(*L);
  machine.run();
  std::string text;
  for (const auto& [what, times] : machine.races) text += what + "\n";
  snprintf(L->races, sizeof L->races, "%s", text.c_str());
  return machine.failed;
}
