// The kernels and their launches: the CUDA half of the C API. docs/cuda.md says why.
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <mutex>

#include "../common/arguments.h"
#include "team.h"  // first: the kernels are written over it

#include "blocks.h"
#include "sample.h"
#include "verify.h"

namespace ptk {
namespace cuda {
namespace {

using Block = Team<kThreads>;

// Clusters came with compute capability 9.0. For an older one the kernels are compiled to nothing,
// and `query` refuses to launch them.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define PTK_CLUSTERS 1
#endif

extern __shared__ __align__(16) std::byte memory[];

// A cluster a row.
template <bool kTop>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    sample_kernel(const __grid_constant__ proxytune_sample_args args) {
#ifdef PTK_CLUSTERS
  const Block block;
  sample_cluster<kTop>(block, memory, args, blockIdx.x / block.blocks());
#endif
}

// A cluster a position of a row. Compiled for one mode: rejection takes more registers, and two rows
// leave room for one block a processor.
template <int kMode>
__global__ void __launch_bounds__(kThreads, kMode == PROXYTUNE_VERIFY_COUPLED ? kBlocksPerProcessor : 1)
    verify_kernel(const __grid_constant__ proxytune_verify_args args, int32_t* arrived,
                  int32_t* steps) {
#ifdef PTK_CLUSTERS
  proxytune_verify_args own = args;
  own.mode = kMode;  // known to the compiler
  const Block block;
  const int64_t cluster = blockIdx.x / block.blocks(), positions = args.num_drafts + 1;
  verify_cluster(block, memory, own, arrived, steps, cluster / positions, cluster % positions);
#endif
}

constexpr auto plain_kernel = sample_kernel<false>;
constexpr auto top_kernel = sample_kernel<true>;
constexpr auto coupled_kernel = verify_kernel<PROXYTUNE_VERIFY_COUPLED>;
constexpr auto rejection_kernel = verify_kernel<PROXYTUNE_VERIFY_REJECTION>;

constexpr int kMaxDevices = 64;

// What a device can run.
struct Limits {
  int code = PROXYTUNE_OK;
  int processors = 0;
  SharedLimits plain{}, top{}, coupled{}, rejection{};
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

// Allows a kernel all that the current device has, and asks which clusters run then: with all of a
// multiprocessor for a block, or with half, where the device has no so many multiprocessors side by side.
template <typename Kernel>
cudaError_t allow(Kernel* kernel, size_t most, SharedLimits* limits) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  const size_t shared = most - attributes.sharedSizeBytes;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error != cudaSuccess) return error;
  const bool more = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed,
                                         1) == cudaSuccess;
  for (size_t i = 0; i < kSizes.size(); ++i) {
    (*limits)[i] = 0;
    if (kSizes[i] > kPortable && !more) continue;
    for (const size_t bytes : {shared, (shared + kReserved) / kBlocksPerProcessor - kReserved}) {
      cudaLaunchAttribute attribute;
      const auto config = configure(1, kSizes[i], bytes, nullptr, &attribute);
      int clusters = 0;
      const bool runs =
          cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess && clusters > 0;
      if (runs) (*limits)[i] = std::max((*limits)[i], bytes);
    }
  }
  return cudaSuccess;
}

// Of the current device.
cudaError_t query(int device, Limits* limits) {
  int major = 0, most = 0;
  cudaError_t error = cudaSuccess;
  const auto get = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  get(&major, cudaDevAttrComputeCapabilityMajor);
  get(&limits->processors, cudaDevAttrMultiProcessorCount);
  get(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (error == cudaSuccess && major < 9) error = cudaErrorNoKernelImageForDevice;
  if (error == cudaSuccess) error = allow(plain_kernel, size_t(most), &limits->plain);
  if (error == cudaSuccess) error = allow(top_kernel, size_t(most), &limits->top);
  if (error == cudaSuccess) error = allow(coupled_kernel, size_t(most), &limits->coupled);
  if (error == cudaSuccess) error = allow(rejection_kernel, size_t(most), &limits->rejection);
  return error;
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
  if (device != current) {
    if (const auto error = cudaSetDevice(device)) return code_of(error);
  }
  const Limits limits = limits_of(device);
  if (device != current) cudaSetDevice(current);
  if (limits.code != PROXYTUNE_OK) return limits.code;
  *max_vocab_size = rejection ? widest_row(true, limits.rejection)
                              : std::min({widest_row(false, limits.plain), widest_row(false, limits.top),
                                         widest_row(false, limits.coupled)});
  return PROXYTUNE_OK;
}

int proxytune_cuda_sample(const proxytune_sample_args* args, int64_t rows, void* stream) {
  if (!valid_sample(args) || args->attribution || rows < 0 || rows > kMaxClusters) return PROXYTUNE_ERROR_ARGUMENT;
  if (args->inputs.edits) return PROXYTUNE_ERROR_EDITS;
  const bool top = args->num_top > 0;
  return launch(top ? top_kernel : plain_kernel, top ? &Limits::top : &Limits::plain, false, rows,
                stream, *args);
}

size_t proxytune_cuda_workspace_size(int64_t rows, int64_t num_drafts) {
  if (rows < 0 || num_drafts < 0 || num_drafts >= kMaxClusters) return 0;
  if (rows > kMaxClusters / (num_drafts + 1)) return 0;
  return size_t(rows * (num_drafts + 2)) * sizeof(int32_t);
}

int proxytune_cuda_verify(const proxytune_verify_args* args, int64_t rows, void* workspace,
                          size_t workspace_size, void* stream) {
  if (!valid_verify(args) || rows < 0) return PROXYTUNE_ERROR_ARGUMENT;
  if (args->inputs.edits) return PROXYTUNE_ERROR_EDITS;
  const size_t wanted = proxytune_cuda_workspace_size(rows, args->num_drafts);
  if ((rows > 0 && !wanted) || !valid_workspace(workspace, workspace_size, wanted, sizeof(int32_t))) {
    return PROXYTUNE_ERROR_ARGUMENT;
  }
  const int64_t clusters = rows * (args->num_drafts + 1);
  int32_t* const arrived = static_cast<int32_t*>(workspace);
  int32_t* const steps = arrived + rows;
  const bool rejection = args->mode == PROXYTUNE_VERIFY_REJECTION;
  return launch(rejection ? rejection_kernel : coupled_kernel,
                rejection ? &Limits::rejection : &Limits::coupled, rejection, clusters, stream,
                *args, arrived, steps);
}

const char* proxytune_cuda_error(int code) {
  if (code < PROXYTUNE_ERROR_CUDA) return error_text(code);
  return cudaGetErrorString(cudaError_t(code - PROXYTUNE_ERROR_CUDA));
}

}  // extern "C"
