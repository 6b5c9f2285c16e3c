// Copies of whole cache blocks: copy-on-write inside the pool, and swap between the pool and
// pinned host memory, which the device reads and writes in place.
//
// A block is `runs` runs of `run_vecs` 16-byte vectors: one when the pool is block-major, one a
// layer and side when it is layer-major. Strides are in vectors.
#include "common.cuh"

// Grid: any. pairs: (source block, target block), `count` of them, both on the device. No pair's
// target may be another's source or target.
extern "C" __global__ void __launch_bounds__(256)
copy_blocks(uint4* target, const uint4* source, const int* pairs,
            const int* count, int runs, int run_vecs, i64 source_block,
            i64 source_run, i64 target_block, i64 target_run) {
  let_next_start();
  wait_for_previous();
  const int block_vecs = runs * run_vecs;
  const int parts = (block_vecs + 4 * 256 - 1) / (4 * 256);
  const int work = *count * parts;
  for (int w = blockIdx.x; w < work; w += gridDim.x) {
    const int pair = w / parts;
    const i64 from = pairs[2 * pair] * source_block, to = pairs[2 * pair + 1] * target_block;
    const int first = (w % parts) * (4 * 256) + threadIdx.x;
    uint4 data[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int v = first + i * 256;
      if (v < block_vecs)
        data[i] = __ldcs(source + from + v / run_vecs * source_run + v % run_vecs);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int v = first + i * 256;
      if (v < block_vecs) target[to + v / run_vecs * target_run + v % run_vecs] = data[i];
    }
  }
}
