// The class that the cluster kernels are written over, on a CPU: csrc/cuda/team.h says what each
// function means. Barriers, messages and shuffles are a model::Cluster's; loads are plain ones.
#pragma once

#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#include "cluster.h"

#define PTK_KERNEL inline

namespace ptk {
namespace cuda {

struct Words {
  uint32_t w[4];
};

template <int kThreadsOfBlock>
class Team {
  // A default argument is made where the function is called: so a barrier knows its place.
  using From = std::source_location;

 public:
  static constexpr int kThreads = kThreadsOfBlock;
  static constexpr int kWarps = kThreads / 32;
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);

  Team(model::Cluster& cluster, int block, int thread)
      : cluster_(cluster), block_(block), thread_(thread) {}

  int thread() const { return thread_; }
  int lane() const { return thread_ % 32; }
  int warp() const { return thread_ / 32; }
  int block() const { return block_; }
  int blocks() const { return cluster_.blocks(); }

  void sync(From from = From::current()) const { cluster_.sync_block(block_, from); }
  void arrive_cluster(From from = From::current()) const {
    cluster_.arrive_cluster("arrive_cluster", from);
    cluster_.give_way();
  }
  void wait_cluster(From from = From::current()) const { cluster_.wait_cluster("wait_cluster", from); }
  void sync_warp(From from = From::current()) const { cluster_.sync_warp(block_, thread_, from); }

  void open(uint64_t* box) const { cluster_.open(box); }
  void release() const { cluster_.release(); }
  void acquire() const { cluster_.acquire(); }
  void announce(uint64_t* box, uint32_t bytes, int block) const { cluster_.announce(box, bytes, block); }
  void send(uint64_t* place, uint64_t value, uint64_t* box, int block) const {
    cluster_.send(place, value, box, block);
  }
  void await(uint64_t* box, uint32_t parity) const { cluster_.await(box, parity); }

  template <typename T>
  T shuffle(T value, int lane, From from = From::current()) const {
    return exchange(value, "shuffle", from)[check(lane)];
  }
  template <typename T>
  T shuffle_up(T value, int lanes, From from = From::current()) const {
    const Values<T> values = exchange(value, "shuffle_up", from);
    return lane() < check(lanes) ? value : values[lane() - lanes];
  }
  template <typename T>
  T shuffle_xor(T value, int mask, From from = From::current()) const {
    return exchange(value, "shuffle_xor", from)[lane() ^ check(mask)];
  }
  uint32_t ballot(bool value, From from = From::current()) const {
    const auto values = exchange(uint32_t(value), "ballot", from);
    uint32_t all = 0;
    for (int i = 0; i < 32; ++i) all |= values[i] << i;
    return all;
  }
  uint32_t sum(uint32_t value, From from = From::current()) const {
    const auto values = exchange(value, "sum", from);
    uint32_t all = 0;
    for (int i = 0; i < 32; ++i) all += values[i];
    return all;
  }
  uint32_t max(uint32_t value, From from = From::current()) const {
    const auto values = exchange(value, "max", from);
    uint32_t all = 0;
    for (int i = 0; i < 32; ++i) all = values[i] > all ? values[i] : all;
    return all;
  }

  uint32_t add_shared(uint32_t* at, uint32_t value) const {
    cluster_.give_way();
    return std::atomic_ref(*at).fetch_add(value);
  }

  uint32_t max_shared(uint32_t* at, uint32_t value) const {
    cluster_.give_way();
    const std::atomic_ref shared(*at);
    const uint32_t before = shared.load();
    if (value > before) shared.store(value);  // no other fiber runs in between
    return before;
  }

  int32_t arrive(int32_t* counter) const {
    cluster_.give_way();
    return std::atomic_ref(*counter).fetch_add(1);
  }
  template <typename T>
  T load_fresh(const T* at) const {
    cluster_.give_way();
    return *at;
  }

  Words load_once(const void* at) const {
    if (reinterpret_cast<uintptr_t>(at) % sizeof(Words) != 0) {
      cluster_.fail("load_once: address %p is not a multiple of 16", at);
    }
    Words words;
    std::memcpy(&words, at, sizeof words);
    return words;
  }
  // As wrong as it may be: -2 to 2 units in the last place, by a hash of the argument; 2^0 is 1.
  float exp2_approx(float v) const {
    const float exact = std::exp2(v);
    if (v == 0.0f || exact < 0x1p-126f) return v == 0.0f ? 1.0f : 0.0f;
    const uint32_t hash = std::bit_cast<uint32_t>(v) * 0x9E3779B9u;
    const int32_t bits = std::bit_cast<int32_t>(exact) + int32_t((hash >> 16) % 5) - 2;
    return std::bit_cast<float>(bits < 0x00800000 ? 0x00800000 : bits);
  }

 private:
  template <typename T>
  struct Values {
    const uint64_t* all;
    T operator[](int lane) const {
      T value;
      std::memcpy(&value, all + lane, sizeof value);
      return value;
    }
  };

  template <typename T>
  Values<T> exchange(T value, const char* what, From from) const {
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
    uint64_t word = 0;
    std::memcpy(&word, &value, sizeof value);
    return {cluster_.exchange(block_, thread_, word, what, from)};
  }

  int check(int lane) const {
    if (lane < 0 || lane >= 32) cluster_.fail("shuffle: lane, or number of lanes, %d", lane);
    return lane;
  }

  model::Cluster& cluster_;
  const int block_, thread_;
};

}  // namespace cuda
}  // namespace ptk
