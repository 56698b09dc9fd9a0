// The cluster kernels over the CPU's Team: one cluster after the other, in an order that a seed makes.
#include <cstddef>
#include <numeric>
#include <string>
#include <vector>

#include "team.h"

#include "../../csrc/common/philox.h"
#if defined(__SANITIZE_THREAD__)
// As on a device. What a function returns in memory is instrumented only where it is inlined.
#undef PTK_HOST_DEVICE
#define PTK_HOST_DEVICE inline __attribute__((always_inline))
#endif

#include "../../csrc/common/arguments.h"
#include "../../csrc/cuda/sample.h"
#include "../../csrc/cuda/verify.h"

namespace ptk {
namespace {

std::string error;  // of the last call

const char* failed(const std::string& what) {
  error = what;
  return error.c_str();
}

// Runs kernel(team, shared, i) on a cluster for each i in [0, count); null, or what was wrong.
template <class Team, class Kernel>
const char* launch(int64_t count, int blocks, size_t shared_bytes, uint64_t seed, Kernel kernel) {
  if (count == 0) return nullptr;
  model::Random random(seed);
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(uint32_t(i))]);
  model::Cluster cluster(blocks, Team::kThreads, shared_bytes);
  for (const int64_t i : order) {
    const auto body = [&](int block, int thread) {
      kernel(Team(cluster, block, thread), cluster.shared(block), i);
    };
    if (!cluster.run(body, random.word())) {
      return failed("cluster " + std::to_string(i) + ": " + cluster.error());
    }
  }
  return nullptr;
}

template <class Team>
const char* sample(const proxytune_sample_args& args, int64_t rows, int blocks, uint64_t seed) {
  return launch<Team>(rows, blocks, cuda::shared_bytes(args.inputs.vocab_size, blocks, false), seed,
                      [&](const Team& team, std::byte* shared, int64_t row) {
                        cuda::sample_cluster(team, shared, args, row);
                      });
}

template <class Team>
const char* verify(const proxytune_verify_args& args, int64_t rows, int blocks, uint64_t seed) {
  const int64_t positions = args.num_drafts + 1;
  const bool rejection = args.mode == PROXYTUNE_VERIFY_REJECTION;
  std::vector<int32_t> arrived(size_t(rows), 0), steps(size_t(rows * positions), 0x5A5A5A5A);
  const char* wrong = launch<Team>(
      rows * positions, blocks, cuda::shared_bytes(args.inputs.vocab_size, blocks, rejection), seed,
      [&](const Team& team, std::byte* shared, int64_t i) {
        cuda::verify_cluster(team, shared, args, arrived.data(), steps.data(), i / positions, i % positions);
      });
  if (wrong) return wrong;
  for (const int32_t count : arrived) {
    if (count != 0) return failed("a counter of arrivals is left at " + std::to_string(count));
  }
  return nullptr;
}

// Calls run with a Team of so many threads; the library launches 256.
template <class Run>
const char* with_team(int threads, Run run) {
  switch (threads) {
    case 32: return run.template operator()<cuda::Team<32>>();
    case 64: return run.template operator()<cuda::Team<64>>();
    case 256: return run.template operator()<cuda::Team<256>>();
    default: return "threads must be 32, 64 or 256";
  }
}

}  // namespace
}  // namespace ptk

#define PTK_EXPORT extern "C" __attribute__((visibility("default")))

// Null, or what was wrong. blocks: of a cluster; threads: of a block; seed: of the order in which
// clusters and threads run.
PTK_EXPORT const char* cluster_sample(const proxytune_sample_args* args, int64_t rows, int blocks,
                                      int threads, uint64_t seed) {
  if (!ptk::valid_sample(args)) return ptk::error_text(PROXYTUNE_ERROR_ARGUMENT);
  return ptk::with_team(threads, [&]<class Team>() {
    return ptk::sample<Team>(*args, rows, blocks, seed);
  });
}

PTK_EXPORT const char* cluster_verify(const proxytune_verify_args* args, int64_t rows, int blocks,
                                      int threads, uint64_t seed) {
  if (!ptk::valid_verify(args)) return ptk::error_text(PROXYTUNE_ERROR_ARGUMENT);
  return ptk::with_team(threads, [&]<class Team>() {
    return ptk::verify<Team>(*args, rows, blocks, seed);
  });
}

// Sizes of the structures, for who writes them down again in another language.
PTK_EXPORT void cluster_sizes(size_t* sample_args, size_t* verify_args) {
  *sample_args = sizeof(proxytune_sample_args);
  *verify_args = sizeof(proxytune_verify_args);
}
