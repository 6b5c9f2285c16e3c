// y = x W^T for up to 256 rows of x on Hopper, with wgmma: x is its M side, in tiles of 64 to 256
// rows, and W its N side, as wide as an even share of it.
//
// What limits is what goes through shared memory: a tile's rows and columns come in once, and each
// 64 rows of x read the columns again. So tiles are about as high as they are wide, and where W is
// too short for that the SPLIT blocks of a cluster divide K and add their sums through each other's
// shared memory, in a fixed order.
//
// One thread asks the tensor copy engine for what the warpgroups then multiply, STAGES ahead; the
// first stages of W before the kernel before this one has ended. Sums leave through the ring, when
// that is done with: rounded where a block has all of a sum, else CHUNK columns of partial ones at
// a time.
//
// Nobody looks at the sums of a tile's rows behind the x_rows that exist. Tall tiles have zeros
// there, once for all steps: they cost less power, which is what limits then. (To have the copy
// engine bring them took up to 15% longer.)
//
// Macros: SCALAR; WARPGROUPS, TILES (of 64 rows of x) for each of them; COLUMNS (rows of W in a
// tile), CHUNK (a part of them), STAGES (of 64 k), SPLIT, BLOCKS (on a multiprocessor); ADD and
// GATED as in linear_skinny.cu; of linear_norm.cuh, SCALED (with ADD: what the next norm needs is
// left beside the residual) and NORM (x is what such a product left).
#include "linear_finish.cuh"
#include "linear_norm.cuh"
#include "tensor_copy.cuh"
#include "wgmma.cuh"

namespace {
constexpr int CONSUMERS = 128 * WARPGROUPS;
constexpr int THREADS = CONSUMERS + 128;
// What a thread starts with, and how the thread block then divides it.
constexpr int REGISTERS = 65536 / BLOCKS / THREADS / 8 * 8;
constexpr int PRODUCER_REGISTERS = NORM ? 40 : 24;
constexpr int LEFT = (THREADS * REGISTERS - 128 * PRODUCER_REGISTERS) / CONSUMERS / 8 * 8;
constexpr int CONSUMER_REGISTERS = LEFT < 232 ? LEFT : 232;
constexpr int ROWS = 64 * WARPGROUPS * TILES;
constexpr int HELPERS = 96;  // of the producer's warpgroup, for the factors of NORM
constexpr int DEPTH = 64;
constexpr int ROW_BYTES = 2 * DEPTH;
constexpr int X_BYTES = ROWS * ROW_BYTES;
constexpr int W_BYTES = COLUMNS * ROW_BYTES;
constexpr int STAGE = X_BYTES + W_BYTES;
constexpr int OUTPUTS = GATED ? COLUMNS / 2 : COLUMNS;
constexpr int PITCH = CHUNK + 4, OUT_PITCH = OUTPUTS + 8;
constexpr int UNIT = 8;  // rows of W: one pattern of the swizzle
static_assert(ROWS * PITCH * 4 <= STAGES * STAGE, "partial sums fit the ring");
static_assert(ROWS * OUT_PITCH * 2 <= STAGES * STAGE, "so do rounded ones");
static_assert(COLUMNS % CHUNK == 0 && CHUNK % 8 == 0, "whole chunks");

struct Slot {
  int index = 0;
  u32 parity = 0;
  __device__ __forceinline__ void advance() {
    if (++index == STAGES) index = 0, parity ^= 1;
  }
};

// Outputs of a tile, rounded and in shared memory, leave 16 bytes at a time.
__device__ __forceinline__ void store_staged(const Epilogue<SCALAR>& to, const SCALAR* staged,
                                             int first) {
  constexpr int vectors = OUTPUTS / 8;
  const int count = min(OUTPUTS, to.n - first);
  for (int i = threadIdx.x; i < to.m * vectors; i += CONSUMERS) {
    const int row = i / vectors, o = i % vectors * 8;
    const SCALAR* const from = staged + row * OUT_PITCH + o;
    SCALAR* const place = to.out + static_cast<i64>(row) * to.n + first + o;
    if (to.n % 8 == 0 && o + 8 <= count)
      store_vec(place, load_vec(from));
    else
      for (int c = 0; c < min(8, count - o); ++c) place[c] = from[c];
  }
}
}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
#if SPLIT > 1
    __cluster_dims__(SPLIT, 1, 1)
#endif
        linear_wgmma(const __grid_constant__ TensorMap x_map,
                     const __grid_constant__ TensorMap w_map, SCALAR* out,
                     const SCALAR* residual, SCALAR* scaled, const SCALAR* gains, float* squares,
                     int parts, float eps, int m, int n, int k, int x_rows) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char shared[];
  const u32 ring = shared_address(shared);
  const u32 full = ring + STAGES * STAGE, empty = full + STAGES * 8;
  float* const factors = reinterpret_cast<float*>(shared + STAGES * (STAGE + 16));

  const int part = SPLIT > 1 ? cluster_rank() : 0;
  const int tile = blockIdx.x / SPLIT, row = blockIdx.y * x_rows;
  const int steps = (k + DEPTH * SPLIT - 1) / (DEPTH * SPLIT);
  const auto column_of = [&](int step) { return (step * SPLIT + part) * DEPTH; };

  const int first = min(steps, STAGES);
  const bool producer = threadIdx.x == CONSUMERS;
  const auto copy_w = [&](int slot, int step) {
    const u32 barrier = full + slot * 8, to = ring + slot * STAGE + X_BYTES;
    barrier_expect(barrier, W_BYTES + x_rows * ROW_BYTES);
    if constexpr (GATED)
      copy_gated_box_once(to, w_map, column_of(step), tile * (OUTPUTS / UNIT), barrier);
    else
      copy_box_once(to, w_map, column_of(step), tile * COLUMNS, barrier);
  };
  if (producer) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(full + s * 8, 1);
      barrier_init(empty + s * 8, WARPGROUPS);
    }
    barrier_init_fence();
    for (int s = 0; s < first; ++s) copy_w(s, s);
  }
  __syncwarp();
  if constexpr (ROWS >= 128) {
    for (int s = 0; s < STAGES; ++s)
      for (int at = x_rows * ROW_BYTES + threadIdx.x * 16; at < X_BYTES; at += THREADS * 16)
        *reinterpret_cast<uint4*>(shared + s * STAGE + at) = uint4{};
    fence_async_proxy();
  }
  // The cluster's barrier says nothing of what was written.
  if constexpr (SPLIT == 1 || ROWS >= 128) __syncthreads();
  if constexpr (SPLIT > 1) sync_cluster_relaxed();
  let_next_start();
  wait_for_previous();

  if (threadIdx.x >= CONSUMERS) {
    give_registers<PRODUCER_REGISTERS>();
    if constexpr (NORM) {
      const int helper = threadIdx.x - CONSUMERS - 32;
      if (helper >= 0) {
        const int rows = min(m - row, x_rows);
        norm_factors<HELPERS>(factors, squares + row, parts, m, rows, k, eps, helper);
        asm volatile("bar.arrive 2, %0;" ::"n"(CONSUMERS + HELPERS) : "memory");
      }
    }
    if (!producer) return;
    const auto copy_x = [&](int slot, int step) {
      copy_box(ring + slot * STAGE, x_map, column_of(step), row, full + slot * 8);
    };
    for (int s = 0; s < first; ++s) copy_x(s, s);
    Slot slot;
#pragma unroll 1
    for (int s = first; s < steps; ++s) {
      barrier_wait(empty + slot.index * 8, slot.parity);
      copy_w(slot.index, s);
      copy_x(slot.index, s);
      slot.advance();
    }
    return;
  }

  take_registers<CONSUMER_REGISTERS>();
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
  const auto release = [&](int slot) {
    if (thread == 0) barrier_arrive(empty + slot * 8);
  };
  // A lane's sums are pairs of neighbours, of which those of two rows follow each other.
  const int mine = group * TILES * 64 + thread / 32 * 16 + thread % 32 / 4, t2 = thread % 4 * 2;

  float acc[TILES][COLUMNS / 2] = {};
  Slot slot;
  int previous = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const u32 w = ring + slot.index * STAGE + X_BYTES;
    const u32 x = ring + slot.index * STAGE + group * TILES * 64 * ROW_BYTES;
    barrier_wait(full + slot.index * 8, slot.parity);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < DEPTH / 16; ++s)
#pragma unroll
      for (int t = 0; t < TILES; ++t)
        wgmma_shared<SCALAR>(acc[t], wgmma_tile(x + t * 64 * ROW_BYTES + s * 32),
                             wgmma_tile(w + s * 32));
    wgmma_commit();
    wgmma_wait<1>();
    if (step > 0) release(previous);
    previous = slot.index;
    slot.advance();
  }
  wgmma_wait<0>();
  release(previous);
  sync_group<CONSUMERS>(1);  // nobody reads the ring any more: it takes the partial sums

  if constexpr (NORM) {
    sync_group<CONSUMERS + HELPERS>(2);
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      const float low = factors[mine + t * 64], high = factors[mine + t * 64 + 8];
#pragma unroll
      for (int i = 0; i < COLUMNS / 2; ++i) acc[t][i] *= i / 2 % 2 ? high : low;
    }
  }
  const i64 above = static_cast<i64>(row) * n;
  const Epilogue<SCALAR> to{out + above, residual + above, 0.f, min(m - row, x_rows), n, k};
  if constexpr (SPLIT == 1 && !ADD) {
    SCALAR* const staged = reinterpret_cast<SCALAR*>(shared);
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int i = 0; i < OUTPUTS / 4; ++i) {
        const float* const sums = acc[t] + (GATED ? i / 2 * 8 + i % 2 * 2 : i * 2);
        float low = sums[0], high = sums[1];
        if constexpr (GATED) low = silu(low) * sums[4], high = silu(high) * sums[5];
        *reinterpret_cast<u32*>(staged + (mine + t * 64 + i % 2 * 8) * OUT_PITCH + i / 2 * 8 + t2) =
            pack<SCALAR>(low, high);
      }
    sync_group<CONSUMERS>(1);
    store_staged(to, staged, tile * OUTPUTS);
  } else {
    float* const staged = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int c = 0; c < COLUMNS / CHUNK; ++c) {
#pragma unroll
      for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int i = 0; i < CHUNK / 4; ++i) {
          const float* const sums = acc[t] + c * (CHUNK / 2) + i * 2;
          float* const place = staged + (mine + t * 64 + i % 2 * 8) * PITCH + i / 2 * 8 + t2;
          *reinterpret_cast<float2*>(place) = make_float2(sums[0], sums[1]);
        }
      constexpr int outputs = OUTPUTS * CHUNK / COLUMNS;
      const int start = tile * OUTPUTS + c * outputs;
      if constexpr (SCALED) {
        const int chunk = tile * (COLUMNS / CHUNK) + c;
        const ScaledResidual<SCALAR> to_scaled{out + above,
                                               residual + above,
                                               scaled + above,
                                               gains,
                                               squares + static_cast<i64>(chunk) * m + row,
                                               to.m,
                                               n};
        const int count = max(min(CHUNK, n - start), 0);
        finish_scaled<ROWS, CHUNK, SPLIT, CONSUMERS>(to_scaled, start, count, staged, part);
      } else {
        finish_tile<CHUNK, ROWS, 1, SPLIT, CONSUMERS / 32, false, ADD, GATED>(
            to, Tile{start, max(min(outputs, n - start), 0)}, staged, nullptr, part);
      }
    }
  }
#endif
}
