// How many blocks take a row: prints what csrc/cuda/blocks.h chooses for
// "vocab_size clusters rejection processors kilobytes largest", one line for each of standard input.
// kilobytes: of shared memory that a block may have; largest: cluster that the device runs.
// Output: blocks (0: no cluster holds such a row), threads of a block, its bytes of shared memory,
// and the widest row that a cluster holds.
#include <cstdio>

#define PTK_KERNEL inline
#include "../../csrc/cuda/blocks.h"

int main() {
  long long vocab_size, clusters;
  int rejection, processors, kilobytes, largest;
  while (std::scanf("%lld %lld %d %d %d %d", &vocab_size, &clusters, &rejection, &processors,
                    &kilobytes, &largest) == 6) {
    ptk::cuda::SharedLimits limits{};
    for (size_t i = 0; i < limits.size(); ++i) {
      limits[i] = ptk::cuda::kSizes[i] <= largest ? size_t(kilobytes) * 1024 : 0;
    }
    const int blocks =
        ptk::cuda::choose_blocks(vocab_size, clusters, rejection, processors, limits);
    const size_t bytes = blocks ? ptk::cuda::shared_bytes(vocab_size, blocks, rejection) : 0;
    std::printf("%d %d %zu %lld\n", blocks, ptk::cuda::kThreads, bytes,
                static_cast<long long>(ptk::cuda::widest_row(rejection, limits)));
  }
}
