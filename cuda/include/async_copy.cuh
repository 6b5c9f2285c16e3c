// Copies from global to shared memory that run beside the arithmetic: 16 bytes a thread (cp.async,
// sm_80 on), or runs by the bulk copy engine that end on an mbarrier (sm_90).
#pragma once
#include "common.cuh"

__device__ __forceinline__ void cp_async_16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// Zeros instead of data where `valid` is false; `from` must still be an address.
__device__ __forceinline__ void cp_async_16(u32 to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most Pending of this thread's groups are under way.
template <int Pending> __device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// A place in a ring of Size buffers, and the parity of the phase that its barriers are in.
template <int Size> struct RingPlace {
  int index = 0;
  u32 parity = 0;

  __device__ __forceinline__ void advance() {
    if (++index == Size) index = 0, parity ^= 1;
  }
};

// How the L2 is to treat what a copy brings (sm_90; PTX ISA, "createpolicy").
constexpr u64 kEvictNormal = 0x1000000000000000, kEvictFirst = 0x12f0000000000000;

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void barrier_init(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialized barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// One arrival, and the bytes whose copies end this phase.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "retry:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra retry;\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// One arrival when all copies that this thread has asked for with cp.async are done; the barrier
// counts it among its arrivals.
__device__ __forceinline__ void barrier_arrive_after_copies(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// `bytes` is a multiple of 16, both ends are aligned to 16.
__device__ __forceinline__ void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier,
                                          u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], "
      "%2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
// Orders ordinary accesses to shared memory before later ones of the copy engine or of wgmma.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
#endif
// Asks the L2 for `bytes`, a multiple of 16 from an address that is one, too. It sees what anyone writes
// there until they are read, so that they may be asked for before wait_for_previous().
__device__ __forceinline__ void prefetch_bulk(const void* from, u32 bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}
