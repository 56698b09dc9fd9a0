// The kernels and their launches: the CUDA half of the C API. docs/cuda.md says why.
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <bit>
#include <climits>
#include <mutex>

#include "../common/arguments.h"
#include "team.h"  // before what is written over it

#include "sample.h"
#include "verify.h"

namespace ptk {
namespace cuda {
namespace {

constexpr int kThreads = 512;
using Block = Team<kThreads>;

// Clusters came with compute capability 9.0. For an older one the kernels are compiled to nothing, and
// `query` refuses to launch them.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define PTK_CLUSTERS 1
#endif

extern __shared__ __align__(16) std::byte memory[];

// A cluster a row.
__global__ void __launch_bounds__(kThreads)
    sample_kernel(const __grid_constant__ proxytune_sample_args args) {
#ifdef PTK_CLUSTERS
  const Block block;
  sample_cluster(block, memory, args, blockIdx.x / block.blocks());
#endif
}

// A cluster a position of a row. Compiled for one mode: rejection takes more registers.
template <int kMode>
__global__ void __launch_bounds__(kThreads)
    verify_kernel(const __grid_constant__ proxytune_verify_args args, int32_t* arrived,
                  int32_t* steps) {
#ifdef PTK_CLUSTERS
  __builtin_assume(args.mode == kMode);
  const Block block;
  const int64_t cluster = blockIdx.x / block.blocks(), positions = args.num_drafts + 1;
  verify_cluster(block, memory, args, arrived, steps, cluster / positions, cluster % positions);
#endif
}

constexpr auto coupled_kernel = verify_kernel<PROXYTUNE_VERIFY_COUPLED>;
constexpr auto rejection_kernel = verify_kernel<PROXYTUNE_VERIFY_REJECTION>;

constexpr std::array kSizes = {1, 2, 4, 8, 16};  // blocks of a cluster
constexpr int kPortable = 8;  // every device has clusters of so many blocks; of more, some
static_assert(kSizes.back() == kMaxBlocks);

constexpr int64_t kMaxClusters = INT_MAX / kMaxBlocks;  // blocks of a grid
constexpr int64_t kTokensOfBlock = 16384;               // 64 KiB; unmeasured
constexpr int kMaxDevices = 64;

// Bytes of dynamic shared memory that a block may have, by cluster size; 0: no such cluster runs.
using SharedLimits = std::array<size_t, kSizes.size()>;

// What a device can run.
struct Limits {
  int code = PROXYTUNE_OK;
  int processors = 0;
  SharedLimits sample{}, coupled{}, rejection{};
};

int code_of(cudaError_t error) {
  if (error == cudaSuccess) return PROXYTUNE_OK;
  // Compiled for other devices only.
  if (error == cudaErrorNoKernelImageForDevice) return PROXYTUNE_ERROR_DEVICE;
  return PROXYTUNE_ERROR_CUDA + int(error);
}

cudaLaunchConfig_t configure(unsigned clusters, int blocks, size_t shared, cudaStream_t stream,
                             cudaLaunchAttribute* attribute) {
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim = {unsigned(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = clusters * unsigned(blocks);
  config.blockDim = kThreads;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = 1;
  return config;
}

// Allows a kernel all that the current device has, and asks which clusters run then.
template <typename Kernel>
cudaError_t allow(Kernel* kernel, size_t most, SharedLimits* limits) {
  cudaFuncAttributes attributes;
  if (const auto error = cudaFuncGetAttributes(&attributes, kernel)) return error;
  const size_t shared = most - attributes.sharedSizeBytes;
  if (const auto error = cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared))) {
    return error;
  }
  const bool large = !cudaFuncSetAttribute(
      kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  for (size_t i = 0; i < kSizes.size(); ++i) {
    cudaLaunchAttribute attribute;
    const auto config = configure(1, kSizes[i], shared, nullptr, &attribute);
    int clusters = 0;
    const bool runs = (kSizes[i] <= kPortable || large) &&
                      !cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) && clusters > 0;
    (*limits)[i] = runs ? shared : 0;
  }
  return cudaSuccess;
}

// Of the current device.
cudaError_t query(int device, Limits* limits) {
  int major = 0, most = 0;
  if (const auto e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) {
    return e;
  }
  if (major < 9) return cudaErrorNoKernelImageForDevice;
  if (const auto e = cudaDeviceGetAttribute(&limits->processors, cudaDevAttrMultiProcessorCount,
                                            device)) {
    return e;
  }
  if (const auto e = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                            device)) {
    return e;
  }
  if (const auto e = allow(sample_kernel, size_t(most), &limits->sample)) return e;
  if (const auto e = allow(coupled_kernel, size_t(most), &limits->coupled)) return e;
  return allow(rejection_kernel, size_t(most), &limits->rejection);
}

// Asked once: what a process may use of a device does not change.
Limits limits_of(int device) {
  static std::mutex mutex;
  static std::array<Limits, kMaxDevices> known;
  static std::array<bool, kMaxDevices> asked;
  if (device < 0 || device >= kMaxDevices) return {PROXYTUNE_ERROR_ARGUMENT};
  const std::lock_guard lock(mutex);
  if (asked[device]) return known[device];
  Limits limits;
  limits.code = code_of(query(device, &limits));
  known[device] = limits;
  asked[device] = limits.code < PROXYTUNE_ERROR_CUDA;  // what CUDA refuses may pass
  return limits;
}

bool fits(int64_t vocab_size, int blocks, bool rejection, const SharedLimits& limits) {
  const size_t limit = limits[size_t(std::countr_zero(unsigned(blocks)))];
  return limit >= shared_bytes(vocab_size, blocks, rejection);
}

// Blocks of a cluster for rows of this width, 0 where none holds one. 8 for a large vocabulary; all 16
// where every cluster has them at once, and a larger one could only wait.
int choose_blocks(int64_t vocab_size, int64_t clusters, bool rejection, int processors,
                  const SharedLimits& limits) {
  const auto enough = std::bit_ceil(uint64_t(vocab_size + kTokensOfBlock - 1) / kTokensOfBlock);
  int wanted = std::min(int(enough), kPortable);
  if (wanted == kPortable && clusters * kMaxBlocks <= processors) wanted = kMaxBlocks;
  for (int blocks = wanted; blocks <= kMaxBlocks; blocks *= 2) {
    if (fits(vocab_size, blocks, rejection, limits)) return blocks;
  }
  for (int blocks = wanted / 2; blocks >= 1; blocks /= 2) {
    if (fits(vocab_size, blocks, rejection, limits)) return blocks;
  }
  return 0;
}

bool any_fits(int64_t vocab_size, bool rejection, const SharedLimits& limits) {
  return choose_blocks(vocab_size, kMaxClusters, rejection, 0, limits) > 0;
}

// Launches a kernel on the current device.
template <typename Args, typename... More>
int launch(void (*kernel)(Args, More...), SharedLimits Limits::* own, bool rejection,
           int64_t clusters, void* stream, const Args& args, More... more) {
  int device = 0;
  if (const auto error = cudaGetDevice(&device)) return code_of(error);
  const Limits limits = limits_of(device);
  if (limits.code != PROXYTUNE_OK) return limits.code;
  if (clusters == 0) return PROXYTUNE_OK;
  const int64_t vocab_size = args.inputs.vocab_size;
  const int blocks =
      choose_blocks(vocab_size, clusters, rejection, limits.processors, limits.*own);
  if (blocks == 0) return PROXYTUNE_ERROR_SHAPE;
  cudaLaunchAttribute attribute;
  const auto config =
      configure(unsigned(clusters), blocks, shared_bytes(vocab_size, blocks, rejection),
                static_cast<cudaStream_t>(stream), &attribute);
  return code_of(cudaLaunchKernelEx(&config, kernel, args, more...));
}

}  // namespace
}  // namespace cuda
}  // namespace ptk

using namespace ptk;
using namespace ptk::cuda;

extern "C" {

int proxytune_cuda_supported(int device, int rejection, int64_t* max_vocab_size) {
  if (!max_vocab_size) return PROXYTUNE_ERROR_ARGUMENT;
  *max_vocab_size = 0;
  int current = 0;
  if (const auto error = cudaGetDevice(&current)) return code_of(error);
  if (const auto error = cudaSetDevice(device)) return code_of(error);
  const Limits limits = limits_of(device);
  cudaSetDevice(current);
  if (limits.code != PROXYTUNE_OK) return limits.code;
  const SharedLimits& own = rejection ? limits.rejection : limits.coupled;
  int64_t fit = 0, beyond = kMaxVocabSize + 1;
  while (beyond - fit > 1) {
    const int64_t middle = (fit + beyond) / 2;
    (any_fits(middle, rejection, own) ? fit : beyond) = middle;
  }
  *max_vocab_size = fit;
  return PROXYTUNE_OK;
}

int proxytune_cuda_sample(const proxytune_sample_args* args, int64_t rows, void* stream) {
  if (!good_sample(args) || rows < 0 || rows > kMaxClusters) return PROXYTUNE_ERROR_ARGUMENT;
  return launch(sample_kernel, &Limits::sample, false, rows, stream, *args);
}

size_t proxytune_cuda_workspace_size(int64_t rows, int64_t num_drafts) {
  if (rows < 0 || num_drafts < 0 || num_drafts >= kMaxClusters) return 0;
  if (rows > kMaxClusters / (num_drafts + 1)) return 0;
  return size_t(rows * (num_drafts + 2)) * sizeof(int32_t);
}

int proxytune_cuda_verify(const proxytune_verify_args* args, int64_t rows, void* workspace,
                          void* stream) {
  if (!good_verify(args) || !workspace || rows < 0) return PROXYTUNE_ERROR_ARGUMENT;
  if (rows > 0 && !proxytune_cuda_workspace_size(rows, args->num_drafts)) {
    return PROXYTUNE_ERROR_ARGUMENT;
  }
  const int64_t clusters = rows * (args->num_drafts + 1);
  int32_t* const arrived = static_cast<int32_t*>(workspace);
  int32_t* const steps = arrived + rows;
  if (args->mode == PROXYTUNE_VERIFY_COUPLED) {
    return launch(coupled_kernel, &Limits::coupled, false, clusters, stream, *args, arrived, steps);
  }
  return launch(rejection_kernel, &Limits::rejection, true, clusters, stream, *args, arrived, steps);
}

const char* proxytune_cuda_error(int code) {
  if (code < PROXYTUNE_ERROR_CUDA) return sentence(code);
  return cudaGetErrorString(cudaError_t(code - PROXYTUNE_ERROR_CUDA));
}

}  // extern "C"
