// A thread-block cluster on one CPU core. Every thread is a fiber; it runs until it waits at a barrier
// or asks for something that other threads' order could show in, and then any that can run goes on,
// chosen by a seed. What would be undefined on a device is an error here: a barrier that only some
// threads reach, or that they reach from different places; another block's shared memory before all
// blocks have started, or when that block may be gone.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

#include "fibers.h"

namespace ptk {
namespace model {

// splitmix64 (Steele et al. 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t word() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  uint32_t below(uint32_t n) { return uint32_t((word() >> 32) * n >> 32); }

 private:
  uint64_t state_;
};

constexpr int kLanes = 32;

struct Fiber {
  Context context;
  int block = 0, thread = 0;
  uint32_t exchanges = 0;  // of its warp, so far
  int arrived = 0, waited = 0;  // at and for the cluster's barrier: how often
  int reached = -1;  // `arrived` when it last asked for another block's memory
};

// Where some number of threads wait for each other.
struct Barrier {
  std::string name;
  size_t size = 0;
  std::vector<Fiber*> waiting;
  const char* what = "";  // and the place from which the first of those waiting came
  std::source_location from;
  int64_t passed = 0;     // when it was last passed
};

struct Warp {
  Barrier barrier;
  uint64_t values[2][kLanes];  // of one exchange and of the next: one barrier is enough for both
};

// Accesses to a byte that no barrier parts: when the last one was, by whom, after how many arrivals at
// the cluster's barrier, and whether others of its warp (1), block (2) or cluster (3) made some.
struct Touch {
  int64_t time = -1;
  int arrived = 0;
  uint16_t thread = 0;
  uint8_t level = 0;
};
struct Trace {
  Touch written, read, updated;  // updated: by an atomic operation
};

class Cluster {
 public:
  using Body = std::function<void(int block, int thread)>;
  static constexpr size_t kGuard = 64;  // bytes before and after each block's shared memory

  Cluster(int blocks, int threads, size_t shared_bytes);

  // Runs body in every thread of every block, in the order that the seed makes. False where it did
  // what is undefined on a device: error() says what.
  bool run(const Body& body, uint64_t seed);
  const std::string& error() const { return error_; }

  // What follows is for the threads. All of a group wait.
  void sync_warp(int block, int thread, std::source_location from);
  void sync_block(int block, std::source_location from);
  // The cluster's barrier has two steps: who waits has arrived, and goes on when all have.
  void arrive_cluster(const char* what, std::source_location from);
  void wait_cluster(const char* what, std::source_location from);
  // All lanes of a warp give a value, and see everyone's.
  const uint64_t* exchange(int block, int thread, uint64_t value, const char* what,
                           std::source_location from);
  // Now and then lets others run first.
  void give_way();
  // Bytes that lie `own` into this block's shared memory, in that of another block.
  std::byte* at(const void* own, size_t bytes, int block);
  std::byte* shared(int block) const { return arena_.get() + size_t(block) * step_ + kGuard; }
  // Ends the run.
  [[noreturn, gnu::format(printf, 2, 3)]] void fail(const char* format, ...);

  int blocks() const { return blocks_; }
  int threads() const { return threads_; }
  size_t shared_bytes() const { return shared_bytes_; }

  // For races.cpp. Times count barriers passed, anywhere in the cluster.
  int64_t started() const { return started_; }
  int64_t now() const { return clock_; }
  int64_t passed(int block) const { return block_barriers_[size_t(block)].passed; }
  int64_t passed(int block, int thread) { return warp_of(block, thread).barrier.passed; }
  const Fiber& running() const { return *running_; }
  bool gone(int block) const { return left_in_block_[size_t(block)] == 0; }
  size_t step() const { return step_; }  // bytes from one block's shared memory to the next one's
  std::vector<Trace>& traces() { return traces_; }

 private:
  static void enter();
  void meet(Barrier& barrier, bool first, const char* what, std::source_location from);
  void wait(Barrier& barrier, const char* what, std::source_location from);
  void next(Fiber& me);
  void leave(Fiber& me);
  void end();
  void scramble(int block, uint64_t word);
  void check_guards();
  Warp& warp_of(int block, int thread) { return warps_[size_t((block * threads_ + thread) / kLanes)]; }

  int blocks_, threads_;
  size_t shared_bytes_, step_;
  std::unique_ptr<std::byte[]> arena_;
  std::unique_ptr<Fiber[]> fibers_;
  Stacks stacks_;
  std::vector<Warp> warps_;
  std::vector<Barrier> block_barriers_;
  Barrier barrier_;          // of the cluster: its place is that of the first to arrive
  size_t arrived_ = 0;       // since all last had
  int phases_ = 0;           // how often all have arrived
  std::vector<int> left_in_block_;
  std::vector<Fiber*> runnable_;
  Fiber* running_ = nullptr;
  int left_ = 0;
  int64_t clock_ = 0;
  int64_t started_ = 0;  // the clock when the run began
  Random random_{0};
  const Body* body_ = nullptr;
  Context outside_;
  std::string error_;
  std::vector<Trace> traces_;  // of each byte of shared memory, where races are looked for
};

// The cluster that runs, for what is called without one: new fibers, races.cpp. Volatile, as the
// compiler knows nothing of the calls that -fsanitize=thread adds.
inline thread_local Cluster* volatile running_cluster = nullptr;

inline Cluster::Cluster(int blocks, int threads, size_t shared_bytes)
    : blocks_(blocks), threads_(threads), shared_bytes_(shared_bytes),
      step_((shared_bytes + 2 * kGuard + 15) / 16 * 16),
      // operator new aligns to 16 bytes; a device promises no more.
      arena_(new std::byte[size_t(blocks) * step_]),
      fibers_(new Fiber[size_t(blocks) * size_t(threads)]), stacks_(blocks * threads),
      warps_(size_t(blocks * threads / kLanes)), block_barriers_(size_t(blocks)),
      left_in_block_(size_t(blocks)) {
  for (size_t w = 0; w < warps_.size(); ++w) {
    const int first = int(w) * kLanes;
    warps_[w].barrier.name = "warp " + std::to_string(first % threads / kLanes) + " of block " +
                             std::to_string(first / threads);
    warps_[w].barrier.size = kLanes;
  }
  for (int b = 0; b < blocks; ++b) {
    block_barriers_[size_t(b)].name = "block " + std::to_string(b);
    block_barriers_[size_t(b)].size = size_t(threads);
  }
  barrier_.name = "the cluster";
  barrier_.size = size_t(blocks) * size_t(threads);
}

inline bool Cluster::run(const Body& body, uint64_t seed) {
  random_ = Random(seed);
  body_ = &body;
  error_.clear();
  runnable_.clear();
  left_ = blocks_ * threads_;
  started_ = ++clock_;
  barrier_.waiting.clear();
  arrived_ = 0;
  phases_ = 0;
  for (Barrier& barrier : block_barriers_) barrier.waiting.clear();
  for (Warp& warp : warps_) warp.barrier.waiting.clear();
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(arena_.get(), size_t(blocks_) * step_);
#endif
  std::memset(arena_.get(), 0x5A, size_t(blocks_) * step_);
  for (int b = 0; b < blocks_; ++b) {
    left_in_block_[size_t(b)] = threads_;
    scramble(b, random_.word());
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(shared(b) - kGuard, kGuard);
    ASAN_POISON_MEMORY_REGION(shared(b) + shared_bytes_, step_ - kGuard - shared_bytes_);
#endif
    for (int t = 0; t < threads_; ++t) {
      const int i = b * threads_ + t;
      Fiber& fiber = fibers_[size_t(i)];
      fiber.block = b;
      fiber.thread = t;
      fiber.exchanges = 0;
      fiber.arrived = fiber.waited = 0;
      fiber.reached = -1;
      fiber.context.prepare(stacks_.at(i), Stacks::bytes(i), &Cluster::enter);
      runnable_.push_back(&fiber);
    }
  }
  running_cluster = this;
  running_ = runnable_.back();
  runnable_.pop_back();
  outside_.switch_to(running_->context);
  running_cluster = nullptr;
  if (error_.empty()) check_guards();
  return error_.empty();
}

inline void Cluster::enter() {
  Cluster& cluster = *running_cluster;
  Context::arrived(cluster.outside_);
  Fiber& me = *cluster.running_;
  (*cluster.body_)(me.block, me.thread);
  cluster.leave(me);
}

// What a block leaves behind, and what it finds, is no use to anyone.
inline void Cluster::scramble(int block, uint64_t word) {
  for (size_t i = 0; i + 8 <= shared_bytes_; i += 8) std::memcpy(shared(block) + i, &word, 8);
  std::memset(shared(block) + shared_bytes_ / 8 * 8, int(word & 0xFF), shared_bytes_ % 8);
}

inline void Cluster::leave(Fiber& me) {
  if (me.reached == me.arrived) {
    fail("thread %d of block %d returns, but since it last arrived at the cluster's barrier it asked "
         "for another block's shared memory: that block may be gone", me.thread, me.block);
  }
  if (me.arrived != me.waited) {
    fail("thread %d of block %d returns without waiting at the cluster's barrier", me.thread, me.block);
  }
  --left_;
  if (--left_in_block_[size_t(me.block)] == 0) {
    running_cluster = nullptr;  // not an access of this thread's
    scramble(me.block, random_.word());
    running_cluster = this;
  }
  next(me);
}

inline void Cluster::next(Fiber& me) {
  if (runnable_.empty()) end();
  const size_t i = random_.below(uint32_t(runnable_.size()));
  Fiber* chosen = runnable_[i];
  runnable_[i] = runnable_.back();
  runnable_.pop_back();
  if (chosen == &me) return;
  running_ = chosen;
  me.context.switch_to(chosen->context);
}

// Nothing can run: all is done, or some wait for ever.
inline void Cluster::end() {
  if (left_ > 0) {
    std::string all = "deadlock:";
    const auto say = [&](const Barrier& barrier) {
      if (barrier.waiting.empty()) return;
      const char* file = std::strrchr(barrier.from.file_name(), '/');
      all += " " + std::to_string(barrier.waiting.size()) + " of the " +
             std::to_string(barrier.size) + " threads of " + barrier.name + " wait at " +
             barrier.what + " (" + (file ? file + 1 : barrier.from.file_name()) + ":" +
             std::to_string(barrier.from.line()) + ");";
    };
    say(barrier_);
    for (const Barrier& barrier : block_barriers_) say(barrier);
    for (const Warp& warp : warps_) say(warp.barrier);
    fail("%s %d threads have returned", all.c_str(), blocks_ * threads_ - left_);
  }
  running_->context.switch_to(outside_);
  std::abort();
}

inline void Cluster::fail(const char* format, ...) {
  char text[2000];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  error_ = text;
  running_->context.switch_to(outside_);
  std::abort();
}

// All who meet at a barrier must have come from one place.
inline void Cluster::meet(Barrier& barrier, bool first, const char* what, std::source_location from) {
  if (first) {
    barrier.what = what;
    barrier.from = from;
  } else if (std::strcmp(barrier.what, what) != 0 || barrier.from.line() != from.line() ||
             barrier.from.column() != from.column()) {
    fail("threads of %s are at different barriers: %s (%s:%u) and %s (%s:%u)", barrier.name.c_str(),
         barrier.what, barrier.from.file_name(), barrier.from.line(), what, from.file_name(),
         from.line());
  }
}

inline void Cluster::wait(Barrier& barrier, const char* what, std::source_location from) {
  Fiber& me = *running_;
  meet(barrier, barrier.waiting.empty(), what, from);
  barrier.waiting.push_back(&me);
  if (barrier.waiting.size() == barrier.size) {
    barrier.passed = ++clock_;
    runnable_.insert(runnable_.end(), barrier.waiting.begin(), barrier.waiting.end());
    barrier.waiting.clear();
  }
  next(me);
}

inline void Cluster::sync_warp(int block, int thread, std::source_location from) {
  wait(warp_of(block, thread).barrier, "sync_warp", from);
}
inline void Cluster::sync_block(int block, std::source_location from) {
  wait(block_barriers_[size_t(block)], "sync", from);
}

inline void Cluster::arrive_cluster(const char* what, std::source_location from) {
  Fiber& me = *running_;
  if (me.arrived != me.waited) {
    fail("%s (%s:%u): thread %d of block %d has arrived at the cluster's barrier already, and not waited",
         what, from.file_name(), from.line(), me.thread, me.block);
  }
  meet(barrier_, arrived_ == 0, what, from);
  ++me.arrived;
  if (++arrived_ < barrier_.size) return;
  arrived_ = 0;
  ++phases_;
  ++clock_;
  runnable_.insert(runnable_.end(), barrier_.waiting.begin(), barrier_.waiting.end());
  barrier_.waiting.clear();
}

inline void Cluster::wait_cluster(const char* what, std::source_location from) {
  Fiber& me = *running_;
  if (me.arrived == me.waited) {
    fail("%s (%s:%u): thread %d of block %d has not arrived at the cluster's barrier", what,
         from.file_name(), from.line(), me.thread, me.block);
  }
  (phases_ < me.arrived ? barrier_.waiting : runnable_).push_back(&me);
  next(me);
  ++me.waited;
}

inline const uint64_t* Cluster::exchange(int block, int thread, uint64_t value, const char* what,
                                         std::source_location from) {
  Warp& warp = warp_of(block, thread);
  uint64_t* values = warp.values[running_->exchanges++ & 1];
  values[thread % kLanes] = value;
  wait(warp.barrier, what, from);
  return values;
}

inline void Cluster::give_way() {
  if (random_.below(4) != 0) return;
  runnable_.push_back(running_);
  next(*running_);
}

inline std::byte* Cluster::at(const void* own, size_t bytes, int block) {
  Fiber& me = *running_;
  const auto offset = static_cast<const std::byte*>(own) - shared(me.block);
  if (offset < 0 || size_t(offset) + bytes > shared_bytes_) {
    fail("at: byte %td is outside the %zu bytes of block %d's shared memory", offset, shared_bytes_,
         me.block);
  }
  if (block < 0 || block >= blocks_) fail("at: block %d of a cluster of %d", block, blocks_);
  if (block != me.block) {
    if (me.waited == 0) {
      fail("at: block %d asks for block %d's shared memory, but has not waited at the cluster's "
           "barrier: it may not have started", me.block, block);
    }
    me.reached = me.arrived;
  }
  return shared(block) + offset;
}

inline void Cluster::check_guards() {
#if !defined(__SANITIZE_ADDRESS__)
  for (int b = 0; b < blocks_ && error_.empty(); ++b) {
    for (size_t i = 0; i < step_; ++i) {
      const bool inside = i >= kGuard && i < kGuard + shared_bytes_;
      if (!inside && arena_[size_t(b) * step_ + i] != std::byte{0x5A}) {
        error_ = "byte " + std::to_string(std::ptrdiff_t(i) - std::ptrdiff_t(kGuard)) +
                 " of block " + std::to_string(b) + "'s shared memory of " +
                 std::to_string(shared_bytes_) + " bytes was written to";
        return;
      }
    }
  }
#endif
}

}  // namespace model
}  // namespace ptk
