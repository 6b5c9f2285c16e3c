// Writes a step's sampled tokens straight into pinned host memory: no copy to launch, and none for
// the next step to wait for. Two halves take turns by the step's number, so that the host may
// still read one step's tokens while the next step writes its own.
//
// Macros: H_STEP, the arena header's step number.
#include "common.cuh"

extern "C" __global__ void publish(int* host, const int* __restrict__ tokens,
                                   const int* __restrict__ arena, int count, int capacity) {
  let_next_start();
  wait_for_previous();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) host[(arena[H_STEP] & 1) * capacity + i] = tokens[i];
}
