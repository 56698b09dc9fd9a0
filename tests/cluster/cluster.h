// A thread-block cluster on one CPU core. Every thread is a fiber; it runs until it waits at a barrier
// or asks for something that other threads' order could show in, and then any that can run goes on,
// chosen by a seed. Messages between blocks come in any order, some time after they were sent. What would
// be undefined on a device is an error here: a barrier that only some threads reach, or that they reach
// from different places; a message before all blocks have started, or to a block that may be gone.
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
  std::vector<int> awaited, acquired;  // phases of each box of its block
  int64_t released = -1;  // what its block's threads did before this time, it has released
  std::vector<int64_t> heard, known;  // the same of each block, by what was awaited; and acquired
};

// What counts messages to a block. A phase ends when all blocks have announced what they send, and it is there.
struct Box {
  const std::byte* place;
  int announced = 0;   // blocks, in this phase
  int64_t missing = 0;  // bytes that are announced and not there; below 0 where they came first
  int phases = 0;      // that have ended
  std::vector<int64_t> releases, released;  // of each block: of this phase, and of those that have ended
  std::vector<Fiber*> waiting;
};

// An announcement or 8 bytes, under way.
struct Message {
  bool announcement;
  int to;
  Fiber* from;
  size_t box;          // of the receiver's
  size_t offset;       // where the bytes go in its shared memory
  uint64_t value;      // those, or how many are announced
  int64_t time;        // announced: what was released. Else what the sender knows of the receiver
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

// Accesses to a byte that no barrier parts: when the last one was, by whom, and whether others of its warp
// (1) or block (2) made some. Or a message (3): in which phase of which box it came.
struct Touch {
  int64_t time = -1;
  int phase = 0;
  uint16_t thread = 0;
  uint8_t box = 0, level = 0;
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
  // Messages: csrc/cuda/team.h says what these do.
  void open(const void* box);
  void release() { running_->released = passed(running_->block); }
  void acquire();
  void announce(const void* box, uint32_t bytes, int block) { post(true, nullptr, bytes, box, block); }
  void send(const void* place, uint64_t value, const void* box, int block) { post(false, place, value, box, block); }
  void await(const void* box, uint32_t parity);
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
  size_t box_of(const void* box);
  void post(bool announcement, const void* place, uint64_t value, const void* box, int block);
  void deliver();
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
  std::vector<std::vector<Box>> boxes_;  // of each block
  std::vector<Message> messages_;
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

// races.cpp's, where it is linked: 8 bytes come to a block's shared memory, in a phase of a box.
[[gnu::weak]] void check_message(Cluster& cluster, const Message& message, int phase);

inline Cluster::Cluster(int blocks, int threads, size_t shared_bytes)
    : blocks_(blocks), threads_(threads), shared_bytes_(shared_bytes),
      step_((shared_bytes + 2 * kGuard + 15) / 16 * 16),
      // operator new aligns to 16 bytes; a device promises no more.
      arena_(new std::byte[size_t(blocks) * step_]),
      fibers_(new Fiber[size_t(blocks) * size_t(threads)]), stacks_(blocks * threads),
      warps_(size_t(blocks * threads / kLanes)), block_barriers_(size_t(blocks)),
      boxes_(size_t(blocks)), left_in_block_(size_t(blocks)) {
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
  messages_.clear();
  for (auto& boxes : boxes_) boxes.clear();
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
      fiber.awaited.clear();
      fiber.acquired.clear();
      fiber.released = -1;
      fiber.heard.assign(size_t(blocks_), -1);
      fiber.known = fiber.heard;
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
  while (!messages_.empty() && (runnable_.empty() || random_.below(4) == 0)) deliver();
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
    for (int b = 0; b < blocks_; ++b) {
      for (const Box& box : boxes_[size_t(b)]) {
        if (box.waiting.empty()) continue;
        all += " " + std::to_string(box.waiting.size()) + " threads of block " + std::to_string(b) +
               " wait at await: " + std::to_string(box.announced) + " blocks have announced messages, " +
               std::to_string(box.missing) + " bytes are missing;";
      }
    }
    fail("%s %d threads have returned", all.c_str(), blocks_ * threads_ - left_);
  }
  for (int i = 0; i < blocks_ * threads_; ++i) {
    const Fiber& fiber = fibers_[size_t(i)];
    const auto& boxes = boxes_[size_t(fiber.block)];
    for (size_t k = 0; k < boxes.size(); ++k) {
      if (boxes[k].phases > fiber.awaited[k] || boxes[k].announced > 0 || boxes[k].missing != 0) {
        fail("thread %d of block %d has returned, but not awaited all messages: that block may be gone "
             "when they come", fiber.thread, fiber.block);
      }
    }
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

// Which of its block's boxes this is.
inline size_t Cluster::box_of(const void* box) {
  const auto& boxes = boxes_[size_t(running_->block)];
  size_t i = 0;
  while (i < boxes.size() && boxes[i].place != box) ++i;
  if (i == boxes.size()) fail("block %d has not opened this box", running_->block);
  return i;
}

inline void Cluster::open(const void* box) {
  if (running_->arrived > 0) fail("open: after the arrival at the cluster's barrier");
  boxes_[size_t(running_->block)].push_back(
      {.place = static_cast<const std::byte*>(box), .releases = std::vector<int64_t>(size_t(blocks_), -1),
       .released = std::vector<int64_t>(size_t(blocks_), -1), .waiting = {}});
  for (int t = 0; t < threads_; ++t) {
    Fiber& fiber = fibers_[size_t(running_->block * threads_ + t)];
    fiber.awaited.push_back(0);
    fiber.acquired.push_back(0);
  }
}

inline void Cluster::acquire() {
  Fiber& me = *running_;
  me.acquired = me.awaited;
  for (size_t b = 0; b < me.known.size(); ++b) me.known[b] = std::max(me.known[b], me.heard[b]);
}

inline void Cluster::post(bool announcement, const void* place, uint64_t value, const void* box, int block) {
  Fiber& me = *running_;
  const auto offset = announcement ? 0 : static_cast<const std::byte*>(place) - shared(me.block);
  if (offset < 0 || size_t(offset) + (announcement ? 0 : sizeof value) > shared_bytes_ || offset % 8 != 0) {
    fail("send: byte %td is outside the %zu bytes of block %d's shared memory, or no multiple of 8", offset,
         shared_bytes_, me.block);
  }
  if (block < 0 || block >= blocks_) fail("send: block %d of a cluster of %d", block, blocks_);
  if (blocks_ == 1) fail("send: undefined in a cluster of one block");
  if (me.waited == 0) {
    fail("send: block %d sends to block %d, but has not waited at the cluster's barrier: it may not have "
         "started", me.block, block);
  }
  messages_.push_back({announcement, block, &me, box_of(box), size_t(offset), value,
                       announcement ? me.released : me.known[size_t(block)]});
  give_way();
}

// One of the messages that are under way comes.
inline void Cluster::deliver() {
  const size_t i = random_.below(uint32_t(messages_.size()));
  const Message message = messages_[i];
  messages_[i] = messages_.back();
  messages_.pop_back();
  if (gone(message.to)) fail("a message comes to block %d, which has returned", message.to);
  if (boxes_[size_t(message.to)].size() <= message.box) fail("block %d has not opened this box", message.to);
  Box& box = boxes_[size_t(message.to)][message.box];
  if (message.announcement) {
    ++box.announced;
    box.missing += int64_t(message.value);
    int64_t& release = box.releases[size_t(message.from->block)];
    release = std::max(release, message.time);
  } else {
    if (check_message) check_message(*this, message, box.phases);
    running_cluster = nullptr;  // not an access of this thread's
    std::memcpy(shared(message.to) + message.offset, &message.value, sizeof message.value);
    running_cluster = this;
    box.missing -= int64_t(sizeof message.value);
  }
  if (box.announced < blocks_ || box.missing != 0) return;
  box.announced = 0;
  ++box.phases;
  box.released = box.releases;
  runnable_.insert(runnable_.end(), box.waiting.begin(), box.waiting.end());
  box.waiting.clear();
}

inline void Cluster::await(const void* place, uint32_t parity) {
  Fiber& me = *running_;
  const size_t i = box_of(place);
  Box& box = boxes_[size_t(me.block)][i];
  if (parity != uint32_t(me.awaited[i] & 1)) {
    fail("await: thread %d of block %d waits for the end of a phase of parity %u, but has seen the end of %d",
         me.thread, me.block, parity, me.awaited[i]);
  }
  (box.phases > me.awaited[i] ? runnable_ : box.waiting).push_back(&me);
  next(me);
  if (box.phases != ++me.awaited[i]) fail("await: another phase has ended since");
  for (size_t b = 0; b < me.heard.size(); ++b) me.heard[b] = std::max(me.heard[b], box.released[b]);
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
