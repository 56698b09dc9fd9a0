// Small kernels for the tests of Team itself: one that uses all of it, and one for each mistake.
#include <map>
#include <string>

#include "team.h"

namespace ptk {
namespace {

using cuda::Team;

constexpr size_t kSharedBytes = 4096;

// Every value that a thread gives is its number in the cluster plus 1; out [threads of the cluster] gets
// the sum over the cluster, by way of warps, blocks, and a ring of other blocks' memory.
template <class T>
PTK_KERNEL void everything(const T& team, std::byte* shared, uint64_t* out) {
  struct Shared {
    uint32_t of_warp[T::kWarps];
    uint64_t of_block;
    uint32_t arrivals, most;
  };
  auto& s = *reinterpret_cast<Shared*>(shared);
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
  team.sync_cluster();
  right &= s.arrivals == uint32_t(T::kThreads) && s.most == uint32_t((team.block() + 1) * T::kThreads);
  uint64_t all = 0;
  for (int i = 0; i < team.blocks(); ++i) all += *team.at(&s.of_block, (team.block() + i) % team.blocks());
  team.sync_cluster();
  out[mine - 1] = right ? all : 0;
}

// Passes a value on to the next lane, warp or block by shared memory, with or without a barrier.
enum class Reach { kLane, kWarp, kBlock, kBlockInTwoSteps };

template <Reach kReach, bool kBarrier, class T>
PTK_KERNEL void pass_on(const T& team, std::byte* shared, uint64_t* out) {
  auto* values = reinterpret_cast<uint32_t*>(shared);
  const int i = team.thread(), first = i - team.lane();
  values[i] = 0;
  team.sync_cluster();
  if (!kBarrier && kReach == Reach::kBlockInTwoSteps) team.arrive_cluster();  // too early
  values[i] = uint32_t(team.block() * T::kThreads + i);
  if (kBarrier && kReach == Reach::kLane) team.sync_warp();
  if (kBarrier && kReach == Reach::kWarp) team.sync();
  if (kBarrier && kReach == Reach::kBlock) team.sync_cluster();
  if (kBarrier && kReach == Reach::kBlockInTwoSteps) team.arrive_cluster();
  if (kReach == Reach::kBlockInTwoSteps) team.wait_cluster();
  uint32_t got = 0;
  if (kReach == Reach::kLane) got = values[first + (team.lane() + 1) % 32];
  if (kReach == Reach::kWarp) got = values[(i + 32) % T::kThreads];
  if (kReach >= Reach::kBlock) got = team.at(values, (team.block() + 1) % team.blocks())[i];
  if (kReach >= Reach::kBlock) team.sync_cluster();
  out[team.block() * T::kThreads + i] = got;
}

// What would be undefined on a device, or whose result its threads' order makes.
template <class T>
PTK_KERNEL void mistake(const T& team, std::byte* shared, uint64_t* out, const std::string& name) {
  auto* counter = reinterpret_cast<uint32_t*>(shared);
  const int next = (team.block() + 1) % team.blocks();
  if (name == "half a block" && team.warp() == 0) team.sync();
  if (name == "one block" && team.block() == 0) team.sync_cluster();
  if (name == "half a warp" && team.lane() < 16) team.ballot(true);
  if (name == "two places") {
    if (team.lane() < 16) {
      team.sync_warp();
    } else {
      team.sync_warp();
    }
  }
  if (name == "lane 32") team.shuffle(1, team.lane() + 1);
  if (name == "block too many") {
    team.sync_cluster();
    if (next == 0) team.at(shared, team.blocks());
  }
  if (name == "arrives twice") {
    team.arrive_cluster();
    team.sync_cluster();
  }
  if (name == "only waits") team.wait_cluster();
  if (name == "only arrives") team.arrive_cluster();
  if (name == "outside") team.at(shared + kSharedBytes, 0);
  if (name == "not started") team.at(shared, next);
  if (name == "gone") {
    team.sync_cluster();
    team.at(shared, next);
  }
  if (name == "gone at once") {
    if (team.thread() == 0) *counter = 1;
    team.sync_cluster();
    const uint32_t* other = team.at(counter, next);
    team.sync_cluster();
    *out += *other;
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
    if (team.thread() == 0) *counter = 0;
    team.sync_cluster();
    out[team.block() * T::kThreads + team.thread()] = team.add_shared(team.at(counter, 0), 1);
    team.sync_cluster();
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
      {"block to block", pass_on<Reach::kBlock, true, T>},
      {"block to block in two steps", pass_on<Reach::kBlockInTwoSteps, true, T>},
      {"early arrive_cluster", pass_on<Reach::kBlockInTwoSteps, false, T>},
      {"no sync_warp", pass_on<Reach::kLane, false, T>},
      {"no sync", pass_on<Reach::kWarp, false, T>},
      {"no sync_cluster", pass_on<Reach::kBlock, false, T>},
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
