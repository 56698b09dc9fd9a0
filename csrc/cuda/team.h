// All that the cluster kernels ask of the device, in one class: which thread this is, barriers, messages to other
// blocks, exchange within a warp, loads. tests/cluster has this class for a CPU, and runs the kernels
// over it; what the calls below do on a device is all that those tests leave out.
//
// Blocks of a cluster send each other messages: 8 bytes to a place in the other one's shared memory. None reads
// another's. A box, an mbarrier beside the place, counts bytes that have come and blocks that have said how many
// they send. This is right by the PTX memory model (PTX ISA, Memory Consistency Model):
//
// - What was sent is seen. A message's signal to the box has release semantics at the scope of the cluster.
//   await() reads the box, and acquire() after it makes an acquire pattern of that read.
// - No message comes too early, where the receiver still reads what it replaces. The receiver's threads read, and
//   meet at sync(); then one calls release() and announce(), a release pattern, which is cumulative. Each thread
//   that sends has called await() and acquire() for that announcement. So the reads are ordered before the send,
//   and what a send does comes after all instructions before it in its thread.
// - The fences are of shared memory alone (.sync_restrict), since nothing else passes between blocks. They are
//   what makes this cheap: nvcc 13.0 makes MEMBAR.ALL.CTA of release() and nothing of acquire(). Of
//   barrier.cluster.arrive, fence.acq_rel.cluster and mbarrier.arrive.release.cluster it makes MEMBAR.ALL.GPU,
//   which waits for device memory; of barrier.cluster.wait and mbarrier.try_wait.acquire.cluster CCTL.IVALL,
//   which empties L1.
// - Boxes are there before the first message: open() ends with the fence for just that, which lets the arrival at
//   the cluster's barrier be relaxed; its wait acquires. That barrier is passed once.
// - A block may end when it has awaited all that the others send to it: nothing else reaches into it.
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
  // All threads of the cluster, in two steps; makes nothing visible but boxes.
  PTK_KERNEL void arrive_cluster() const { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
  PTK_KERNEL void wait_cluster() const { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

  // Makes a box, whose phases end when all blocks have announced what they send, and it is there. One thread.
  PTK_KERNEL void open(uint64_t* box) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(box)), "r"(blocks()) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  // What the block's threads read before they met at sync() may be replaced by who acquires what follows.
  PTK_KERNEL void release() const { asm volatile("fence.release.sync_restrict::shared::cta.cluster;" ::: "memory"); }
  PTK_KERNEL void acquire() const { asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory"); }
  // Says that this block sends so many bytes to a block, by its box. One thread of each block, to each block.
  PTK_KERNEL void announce(uint64_t* box, uint32_t bytes, int block) const {
    asm volatile("mbarrier.arrive.expect_tx.relaxed.cluster.shared::cluster.b64 _, [%0], %1;" ::"r"(
                     address_in(box, block)),
                 "r"(bytes)
                 : "memory");
  }
  // Stores a value in the same place of a block's shared memory, some time later. In a cluster of one block it
  // is undefined.
  PTK_KERNEL void send(uint64_t* place, uint64_t value, uint64_t* box, int block) const {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(
                     address_in(place, block)),
                 "l"(value), "r"(address_in(box, block))
                 : "memory");
  }
  // Waits for the end of the box's phase with this parity.
  PTK_KERNEL void await(uint64_t* box, uint32_t parity) const {
    uint32_t ended;
    do {
      asm volatile(
          "{ .reg .pred ended;\n"
          "mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 ended, [%1], %2;\n"
          "selp.u32 %0, 1, 0, ended; }"
          : "=r"(ended)
          : "r"(address(box)), "r"(parity)
          : "memory");
    } while (!ended);
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
    int32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
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

 private:
  static PTK_KERNEL uint32_t address(const uint64_t* own) { return uint32_t(__cvta_generic_to_shared(own)); }
  static PTK_KERNEL uint32_t address_in(const uint64_t* own, int block) {
    uint32_t theirs;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(address(own)), "r"(block));
    return theirs;
  }
};

}  // namespace cuda
}  // namespace ptk
