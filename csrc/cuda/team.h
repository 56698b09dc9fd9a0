// All that the cluster kernels ask of the device, in one class: which thread this is, barriers, other blocks'
// shared memory, exchange within a warp, loads. tests/cluster has this class for a CPU, and runs the kernels
// over it; what the calls below do on a device is all that those tests leave out.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>

#define PTK_KERNEL __device__ __forceinline__

namespace ptk {
namespace cuda {

struct Words {
  uint32_t w[4];  // 16 bytes
};

template <int kThreadsOfBlock>
class Team {
 public:
  static constexpr int kThreads = kThreadsOfBlock;
  static constexpr int kWarps = kThreads / 32;

  PTK_KERNEL int thread() const { return int(threadIdx.x); }
  PTK_KERNEL int lane() const { return int(threadIdx.x & 31); }
  PTK_KERNEL int warp() const { return int(threadIdx.x >> 5); }
  // A cluster is one row's: grid (rows * blocks).
  PTK_KERNEL int block() const { return int(cooperative_groups::this_cluster().block_rank()); }
  PTK_KERNEL int blocks() const { return int(cooperative_groups::this_cluster().num_blocks()); }

  // All threads of the block; what they wrote is then visible to them.
  PTK_KERNEL void sync() const { __syncthreads(); }
  // All threads of the cluster, likewise; also what was written to other blocks' shared memory.
  PTK_KERNEL void sync_cluster() const { cooperative_groups::this_cluster().sync(); }
  // The same in two steps: what is done between them does not wait for anyone.
  PTK_KERNEL void arrive_cluster() const { cooperative_groups::this_cluster().barrier_arrive(); }
  PTK_KERNEL void wait_cluster() const { cooperative_groups::this_cluster().barrier_wait(); }

  // The same place in the shared memory of another block of the cluster.
  template <typename T>
  PTK_KERNEL T* at(T* own, int block) const {
    return cooperative_groups::this_cluster().map_shared_rank(own, unsigned(block));
  }

  // Warp-wide: all lanes call.
  template <typename T>
  PTK_KERNEL T shuffle(T value, int lane) const { return __shfl_sync(~0u, value, lane); }
  template <typename T>
  PTK_KERNEL T shuffle_up(T value, int lanes) const { return __shfl_up_sync(~0u, value, unsigned(lanes)); }
  template <typename T>
  PTK_KERNEL T shuffle_xor(T value, int mask) const { return __shfl_xor_sync(~0u, value, mask); }
  PTK_KERNEL uint32_t ballot(bool value) const { return __ballot_sync(~0u, value); }
  PTK_KERNEL uint32_t sum(uint32_t value) const { return __reduce_add_sync(~0u, value); }
  PTK_KERNEL uint32_t max(uint32_t value) const { return __reduce_max_sync(~0u, value); }

  // Shared memory of this block; returns what was there.
  PTK_KERNEL uint32_t add_shared(uint32_t* at, uint32_t value) const { return atomicAdd(at, value); }
  PTK_KERNEL uint32_t max_shared(uint32_t* at, uint32_t value) const { return atomicMax(at, value); }

  // One more at a counter in device memory; returns how many were there. What the block's thread wrote
  // before is visible to whoever sees the new count.
  PTK_KERNEL int32_t arrive(int32_t* counter) const {
    __threadfence();
    const int32_t before = atomicAdd(counter, 1);
    __threadfence();
    return before;
  }
  // A value that another block may have written before its arrival.
  template <typename T>
  PTK_KERNEL T load_fresh(const T* at) const { return __ldcg(at); }

  // 16 aligned bytes of a row that nothing reads again: not kept in L1, first to go from L2.
  PTK_KERNEL Words load_once(const void* at) const {
    Words v;
    asm("{ .reg .b64 policy;\n"
        "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
        "ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], policy; }"
        : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
        : "l"(at));
    return v;
  }
  // 2^v to 2 units in the last place, v <= 0; subnormal results are 0.
  PTK_KERNEL float exp2_approx(float v) const {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
    return result;
  }
};

}  // namespace cuda
}  // namespace ptk
