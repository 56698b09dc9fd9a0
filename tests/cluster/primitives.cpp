// Small kernels for the tests of Team itself: one that uses all of it, and one for each mistake.
#include <map>
#include <string>

#include "team.h"

namespace ptk {
namespace {

using cuda::Team;

constexpr size_t kSharedBytes = 4096;

// Every value that a thread gives is its number in the cluster plus 1; out [threads of the cluster] gets
// the sum over the cluster, by way of warps, blocks, and messages to all blocks.
template <class T>
PTK_KERNEL void everything(const T& team, std::byte* shared, uint64_t* out) {
  struct Shared {
    uint64_t box, of_blocks[16];
    uint32_t of_warp[T::kWarps];
    uint64_t of_block;
    uint32_t arrivals, most;
  };
  auto& s = *reinterpret_cast<Shared*>(shared);
  if (team.thread() == 0) team.open(&s.box);
  team.arrive_cluster();
  const uint32_t mine = uint32_t(team.block() * T::kThreads + team.thread() + 1);
  bool right = team.max(mine) == mine - uint32_t(team.lane()) + 31;
  right &= team.ballot(team.lane() % 3 == 1) == 0x92492492u;
  right &= team.shuffle(double(mine), 7) == double(mine - uint32_t(team.lane()) + 7);
  right &= team.shuffle_xor(int64_t(mine), 5) == int64_t(mine) - team.lane() + (team.lane() ^ 5);
  uint64_t upto = mine;  // of the lanes up to this one
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t before = team.shuffle_up(upto, step);
    if (team.lane() >= step) upto += before;
  }
  const uint32_t total = team.sum(mine);
  right &= team.shuffle(upto, 31) == total;
  if (team.lane() == 0) s.of_warp[team.warp()] = total;
  if (team.thread() == 0) s.arrivals = s.most = 0;
  team.sync();
  right &= team.add_shared(&s.arrivals, 1) < uint32_t(T::kThreads);
  right &= team.max_shared(&s.most, mine) != mine;
  if (team.thread() == 0) {
    s.of_block = 0;
    for (uint32_t value : s.of_warp) s.of_block += value;
  }
  team.wait_cluster();
  team.sync();
  right &= s.arrivals == uint32_t(T::kThreads) && s.most == uint32_t((team.block() + 1) * T::kThreads);
  uint64_t all = 0;
  if (team.blocks() == 1) {
    all = s.of_block;
  } else {
    if (team.thread() < team.blocks()) {
      team.send(&s.of_blocks[team.block()], s.of_block, &s.box, team.thread());
      team.announce(&s.box, 8, team.thread());
    }
    team.await(&s.box, 0);
    team.acquire();
    for (int i = 0; i < team.blocks(); ++i) all += s.of_blocks[i];
  }
  out[mine - 1] = right ? all : 0;
}

// Passes a value on to the next lane or warp by shared memory, with or without a barrier.
enum class Reach { kLane, kWarp };

template <Reach kReach, bool kBarrier, class T>
PTK_KERNEL void pass_on(const T& team, std::byte* shared, uint64_t* out) {
  auto* values = reinterpret_cast<uint32_t*>(shared);
  const int i = team.thread(), first = i - team.lane();
  values[i] = 0;
  team.sync();
  values[i] = uint32_t(team.block() * T::kThreads + i);
  if (kBarrier && kReach == Reach::kLane) team.sync_warp();
  if (kBarrier && kReach == Reach::kWarp) team.sync();
  const int from = kReach == Reach::kLane ? first + (team.lane() + 1) % 32 : (i + 32) % T::kThreads;
  out[team.block() * T::kThreads + i] = values[from];
}

// Passes two values on to the same place of the next block, one after the other, by messages; without one of
// the steps that this needs.
enum class Without { kNothing, kAwait, kAcquire, kTurn, kRelease, kLastAcquire, kSecondBox };

template <Without kWithout, class T>
PTK_KERNEL void pass_to_block(const T& team, std::byte* shared, uint64_t* out) {
  struct Shared {
    uint64_t boxes[2], values[T::kThreads];
  };
  auto& s = *reinterpret_cast<Shared*>(shared);
  const int i = team.thread(), next = (team.block() + 1) % team.blocks();
  if (i == 0) {
    for (uint64_t& box : s.boxes) team.open(&box);
  }
  s.values[i] = 0;
  team.arrive_cluster();
  team.wait_cluster();
  uint64_t got[2] = {0, 0};
  int turns = 0;
  const auto turn = [&](bool sends, uint64_t value) {
    uint64_t* const box = &s.boxes[kWithout == Without::kSecondBox ? 0 : turns & 1];
    const uint32_t parity = uint32_t(kWithout == Without::kSecondBox ? turns : turns >> 1) & 1;
    team.sync();
    if (i < team.blocks()) {
      if (kWithout != Without::kRelease) team.release();
      team.announce(box, sends && i == next ? 8 * T::kThreads : 0, i);
    }
    if (sends) team.send(&s.values[i], value, box, next);
    // The first turn says that all have written their zeros; the second sends.
    if (kWithout != Without::kAwait || turns != 1) team.await(box, parity);
    if (kWithout != Without::kAcquire && (kWithout != Without::kLastAcquire || turns != 3)) team.acquire();
    ++turns;
  };
  turn(false, 0);
  turn(true, uint64_t(team.block() * T::kThreads + i));
  got[0] = s.values[i];
  if (kWithout == Without::kAwait) team.await(&s.boxes[1], 0);
  if (kWithout != Without::kTurn) turn(false, 0);
  turn(true, 7);
  got[1] = s.values[i];
  out[team.block() * T::kThreads + i] = got[1] == 7 ? got[0] : 0;
}

// What would be undefined on a device, or whose result its threads' order makes.
template <class T>
PTK_KERNEL void mistake(const T& team, std::byte* shared, uint64_t* out, const std::string& name) {
  auto* counter = reinterpret_cast<uint32_t*>(shared);
  const int next = (team.block() + 1) % team.blocks();
  if (name == "half a block" && team.warp() == 0) team.sync();
  const auto meet = [&] {
    team.arrive_cluster();
    team.wait_cluster();
  };
  auto* box = reinterpret_cast<uint64_t*>(shared + 64);
  auto* place = reinterpret_cast<uint64_t*>(shared + 128);
  if (name == "one block" && team.block() == 0) meet();
  if (name == "half a warp" && team.lane() < 16) team.ballot(true);
  if (name == "two places") {
    if (team.lane() < 16) {
      team.sync_warp();
    } else {
      team.sync_warp();
    }
  }
  if (name == "lane 32") team.shuffle(1, team.lane() + 1);
  if (name == "arrives twice") {
    team.arrive_cluster();
    team.arrive_cluster();
  }
  if (name == "only waits") team.wait_cluster();
  if (name == "only arrives") team.arrive_cluster();
  if (name == "not started") team.send(place, 1, box, next);
  if (name == "no box") {
    meet();
    team.announce(box, 0, next);
  }
  if (name == "opens late") {
    meet();
    team.open(box);
  }
  if (name.starts_with("message")) {
    const std::string how = name.substr(9);
    if (team.thread() == 0) team.open(box);
    meet();
    const bool one = team.thread() == 0;
    if (how == "to block 4" && one) team.announce(box, 0, 4);
    if (how == "outside" && one) team.send(place + kSharedBytes / 8, 1, box, next);
    if (how == "off 8" && one) team.send(reinterpret_cast<uint64_t*>(shared + 132), 1, box, next);
    if (how == "alone" && one) team.send(place, 1, box, 0);
    if (how == "parity") team.await(box, 1);
    if (how == "not announced") {
      if (one) team.send(place, 1, box, next);
      team.await(box, 0);
    }
    if (how == "not awaited") {
      if (team.thread() < team.blocks()) team.announce(box, 0, team.thread());
      if (team.thread() != 5) team.await(box, 0);
    }
    if (how == "to who is gone" && one) team.send(place, 1, box, next);
  }
  if (name == "past the end" && team.thread() == 0) shared[kSharedBytes] = std::byte{1};
  if (name == "unwritten") *out += uint64_t(shared[8]);
  if (name == "adds without order") {
    if (team.thread() == 0) *counter = 0;
    team.add_shared(counter, 1);
  }
  if (name == "adds and reads") {
    if (team.thread() == 0) *counter = 0;
    team.sync();
    *out += team.lane() == 7 ? *counter : team.add_shared(counter, 1);
  }
  if (name == "order") {
    if (team.thread() == 0) *counter = uint32_t(team.block() * T::kThreads);
    team.sync();
    out[team.block() * T::kThreads + team.thread()] = team.add_shared(counter, 1);
  }
  if (name == "misaligned") team.load_once(reinterpret_cast<char*>(out) + 8);
}

std::string error;  // of the last run

template <class T>
const char* run(const char* name, int blocks, uint64_t seed, uint64_t* out) {
  using Kernel = void (*)(const T&, std::byte*, uint64_t*);
  const std::map<std::string, Kernel> kernels = {
      {"everything", everything<T>},
      {"lane to lane", pass_on<Reach::kLane, true, T>},
      {"warp to warp", pass_on<Reach::kWarp, true, T>},
      {"block to block", pass_to_block<Without::kNothing, T>},
      {"no await", pass_to_block<Without::kAwait, T>},
      {"no acquire", pass_to_block<Without::kAcquire, T>},
      {"no last acquire", pass_to_block<Without::kLastAcquire, T>},
      {"no turn between", pass_to_block<Without::kTurn, T>},
      {"no release", pass_to_block<Without::kRelease, T>},
      {"no second box", pass_to_block<Without::kSecondBox, T>},
      {"no sync_warp", pass_on<Reach::kLane, false, T>},
      {"no sync", pass_on<Reach::kWarp, false, T>},
  };
  model::Cluster cluster(blocks, T::kThreads, kSharedBytes);
  const auto found = kernels.find(name);
  const auto body = [&](int block, int thread) {
    const T team(cluster, block, thread);
    if (found == kernels.end()) return mistake(team, cluster.shared(block), out, name);
    found->second(team, cluster.shared(block), out);
  };
  if (cluster.run(body, seed)) return nullptr;
  error = cluster.error();
  return error.c_str();
}

}  // namespace
}  // namespace ptk

// Runs a kernel, out [threads of the cluster]; null, or what was wrong.
extern "C" __attribute__((visibility("default"))) const char* cluster_run(const char* name, int blocks,
                                                                          int threads, uint64_t seed,
                                                                          uint64_t* out) {
  switch (threads) {
    case 32: return ptk::run<ptk::Team<32>>(name, blocks, seed, out);
    case 64: return ptk::run<ptk::Team<64>>(name, blocks, seed, out);
    case 256: return ptk::run<ptk::Team<256>>(name, blocks, seed, out);
    default: return "threads must be 32, 64 or 256";
  }
}
