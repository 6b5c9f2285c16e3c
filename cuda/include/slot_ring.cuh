// Rings of shared memory that one warp fills and another reads: each consumer warp owns one, so
// that no two of them ever wait for each other. A slot is filled by cp.async of all lanes.
#pragma once
#include "async_copy.cuh"

// A ring's barriers; its slots lie wherever the owner puts them.
template <int Slots> struct SlotBarriers {
  u64 full[Slots], empty[Slots];

  // By one thread, before anyone else uses them.
  __device__ void init() {
    for (int s = 0; s < Slots; ++s) {
      barrier_init(address(full[s]), 32);
      barrier_init(address(empty[s]), 1);
    }
  }
  // Producer: waits until the slot is left.
  __device__ __forceinline__ void acquire(const RingPlace<Slots>& at) {
    barrier_wait(address(empty[at.index]), at.parity ^ 1);
  }
  // Producer: all that the lanes have asked for so far fills the slot.
  __device__ __forceinline__ void commit(RingPlace<Slots>& at) {
    barrier_arrive_after_copies(address(full[at.index]));
    at.advance();
  }
  // Consumer: waits until the slot is filled.
  __device__ __forceinline__ void wait(const RingPlace<Slots>& at) {
    barrier_wait(address(full[at.index]), at.parity);
  }
  // Consumer: all lanes have read the slot.
  __device__ __forceinline__ void release(RingPlace<Slots>& at) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(address(empty[at.index]));
    at.advance();
  }

 private:
  static __device__ __forceinline__ u32 address(u64& barrier) {
    return static_cast<u32>(__cvta_generic_to_shared(&barrier));
  }
};
