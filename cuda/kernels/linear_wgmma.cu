// y = x W^T for up to 256 rows of x on Hopper, with wgmma: x is its M side, in tiles of 64 to 256
// rows, and W its N side, as wide as an even share of it; SWAPPED, W is the M side, in tiles of 64
// to 192 rows, and x the N side, no wider than it need be.
//
// What limits is what goes through shared memory: a tile's rows and columns come in once, and each
// 64 rows of the M side read the N side again. So tiles are about as high as they are wide, and
// where W is too short for that the SPLIT blocks of a cluster divide K and add their sums through
// each other's shared memory, in a fixed order.
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
// Macros: SCALAR; SWAPPED; WARPGROUPS, TILES (of 64 rows of the M side) for each of them; SHORT
// (rows of the N side), PIECES (in which they are taken), CHUNK (a part of W's rows in a tile),
// STAGES (of 64 k), SPLIT, BLOCKS (on a multiprocessor); ADD and GATED as in linear_skinny.cu; of
// linear_norm.cuh, SCALED (with ADD: what the next norm needs is left beside the residual) and NORM
// (x is what such a product left); QKV (the tile's columns are a head, and end as such) with what
// linear_heads.cuh asks for; SAMPLED (what sampling needs of each chunk of logits is left beside them).
#include "chunk.cuh"
#include "linear_finish.cuh"
#if QKV
#include "linear_heads.cuh"
#endif
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
constexpr int LONG = 64 * WARPGROUPS * TILES;
constexpr int ROWS = SWAPPED ? SHORT : LONG, COLUMNS = SWAPPED ? LONG : SHORT;
constexpr int PIECE = SHORT / PIECES, SUMS = PIECE / 2;
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
static_assert(COLUMNS % CHUNK == 0 && CHUNK % (SWAPPED ? 64 : 8) == 0, "whole chunks");
static_assert(PIECE % 8 == 0, "whole patterns of the swizzle");

// Sums that are neighbours on the N side, where the first belongs in a tile of rows of x.
template <int Pitch> __device__ __forceinline__ void store_two(float* to, float low, float high) {
  if constexpr (SWAPPED)
    to[0] = low, to[Pitch] = high;
  else
    *reinterpret_cast<float2*>(to) = make_float2(low, high);
}
template <int Pitch> __device__ __forceinline__ void store_two(SCALAR* to, float low, float high) {
  if constexpr (SWAPPED)
    to[0] = from_float<SCALAR>(low), to[Pitch] = from_float<SCALAR>(high);
  else
    *reinterpret_cast<u32*>(to) = pack<SCALAR>(low, high);
}

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
                     int parts, float eps, int m, int n, int k, int x_rows
#if QKV  // and `out` is q's; `early`: positions and slots were written before this could start
                     ,
                     CACHE* keys, CACHE* values, const int* positions, const int* slots,
                     const float* cos_sin, const SCALAR* q_norm, const SCALAR* k_norm,
                     const float* k_scale, const float* v_scale, i64 block_stride, float head_eps,
                     int early
#endif
#if SAMPLED  // chunks [m, chunk_pitch]; the temperature of row r: temperatures[param_words * rows[r]]
                     ,
                     Chunk* chunks, const int* sample_rows, const float* temperatures,
                     int param_words, int chunk_pitch
#endif
        ) {
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
#if SAMPLED
      // A head's weights are to drive the logits out of the L2. Left there, and written back one by
      // one while the next step reads, they cost it ten times their own time.
      copy_box(to, w_map, column_of(step), tile * COLUMNS, barrier);
#else
      copy_box_once(to, w_map, column_of(step), tile * COLUMNS, barrier);
#endif
  };
  if (producer) {
    prefetch_map(x_map);
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
#if QKV
  HeadEnd<ROWS, SPLIT, CONSUMERS> heads(
      HeadsTo{out, keys, values, positions, slots, cos_sin, q_norm, k_norm, k_scale, v_scale,
              block_stride, head_eps},
      tile, row, min(m - row, x_rows), part);
  if (threadIdx.x < CONSUMERS) {
    if (!early) wait_for_previous();
    heads.ask();
  }
#endif
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
    RingPlace<STAGES> slot;
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
  // Where a lane's i-th sum of its t-th product stands in the tile. Two that follow each other are
  // neighbours on the N side.
  const int m_side = group * TILES * 64 + thread / 32 * 16 + thread % 32 / 4;
  const int n_side = thread % 4 * 2;
  const auto row_at = [&](int t, int i) {
    return SWAPPED ? n_side + t % PIECES * PIECE + i / 4 * 8 + i % 2
                   : m_side + t * 64 + i / 2 % 2 * 8;
  };
  const auto column_at = [&](int t, int i) {
    return SWAPPED ? m_side + t / PIECES * 64 + i / 2 % 2 * 8 : n_side + i / 4 * 8 + i % 2;
  };

  const i64 above = static_cast<i64>(row) * n;
  const int rows = min(m - row, x_rows);
  using End = ScaledEnd<ROWS, CHUNK, SPLIT, CONSUMERS, SCALAR>;
  // Whether registers can hold what was there while the product runs.
  constexpr bool EARLY = SCALED && COLUMNS == CHUNK && End::kRegisters <= 16;
  const auto end_of = [&](int c) {
    const int start = tile * COLUMNS + c * CHUNK;
    return End(start, max(min(CHUNK, n - start), 0), part);
  };
  const auto scaled_of = [&](int c) {
    const i64 chunk = tile * (COLUMNS / CHUNK) + c;
    return ScaledResidual<SCALAR>{
        out + above, residual + above, scaled + above, gains, squares + chunk * m + row, rows, n};
  };
  End early_end = end_of(0);
  if constexpr (EARLY) early_end.ask(scaled_of(0));

#if SAMPLED
  static_assert(COLUMNS % kChunk == 0 && CONSUMERS % ROWS == 0, "a thread has chunks of one row");
  const int chunk_row = threadIdx.x % ROWS;
  float scale = 0.f;
  if (chunk_row < rows)
    scale = weight_scale(temperatures[i64(sample_rows[row + chunk_row]) * param_words]);
#endif
  float acc[TILES * PIECES][SUMS] = {};
  RingPlace<STAGES> slot;
  int previous = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const u32 x = ring + slot.index * STAGE, w = x + X_BYTES;
    const u32 a = (SWAPPED ? w : x) + group * TILES * 64 * ROW_BYTES, b = SWAPPED ? x : w;
    barrier_wait(full + slot.index * 8, slot.parity);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < DEPTH / 16; ++s)
#pragma unroll
      for (int t = 0; t < TILES * PIECES; ++t)
        wgmma_shared<SCALAR>(acc[t], wgmma_tile(a + t / PIECES * 64 * ROW_BYTES + s * 32),
                             wgmma_tile(b + t % PIECES * PIECE * ROW_BYTES + s * 32));
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
    for (int t = 0; t < TILES * PIECES; ++t)
#pragma unroll
      for (int i = 0; i < SUMS; ++i) acc[t][i] *= factors[row_at(t, i)];
  }
  const Epilogue<SCALAR> to{out + above, residual + above, 0.f, rows, n, k};
  if constexpr (SPLIT == 1 && !ADD && !QKV) {
    SCALAR* const staged = reinterpret_cast<SCALAR*>(shared);
    // Of 16 rows of W, 8 are the gate's, and then come their 8 of the up projection.
    constexpr int up = SWAPPED ? 2 : 4;
#pragma unroll
    for (int t = 0; t < TILES * PIECES; ++t)
#pragma unroll
      for (int i = 0; i < SUMS; i += 2) {
        if (GATED && i / up % 2) continue;
        const float* const sums = acc[t] + i;
        float low = sums[0], high = sums[1];
        if constexpr (GATED) low = silu(low) * sums[up], high = silu(high) * sums[up + 1];
        const int column = column_at(t, i), o = GATED ? column / 16 * 8 + column % 8 : column;
        store_two<OUT_PITCH>(staged + row_at(t, i) * OUT_PITCH + o, low, high);
      }
    sync_group<CONSUMERS>(1);
    store_staged(to, staged, tile * OUTPUTS);
#if SAMPLED
    for (int c = threadIdx.x / ROWS; c < COLUMNS / kChunk; c += CONSUMERS / ROWS) {
      const int first_column = tile * COLUMNS + c * kChunk, count = min(kChunk, n - first_column);
      if (chunk_row < rows && count > 0)
        chunks[i64(row + chunk_row) * chunk_pitch + first_column / kChunk] =
            chunk_of(staged + chunk_row * OUT_PITCH + c * kChunk, count, scale);
    }
#endif
  } else {
    float* const staged = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int c = 0; c < COLUMNS / CHUNK; ++c) {
#pragma unroll
      for (int t = 0; t < TILES * PIECES; ++t)
#pragma unroll
        for (int i = 0; i < SUMS; i += 2) {
          const int column = column_at(t, i) - c * CHUNK;
          if (SWAPPED ? column < 0 || column >= CHUNK : i / 4 * 8 / CHUNK != c) continue;
          store_two<PITCH>(staged + row_at(t, i) * PITCH + column, acc[t][i], acc[t][i + 1]);
        }
#if QKV
      heads.finish(staged);
      continue;
#endif
      if constexpr (EARLY) {
        early_end.finish(scaled_of(c), staged);
      } else if constexpr (SCALED) {
        End end = end_of(c);
        end.ask(scaled_of(c));
        end.finish(scaled_of(c), staged);
      } else {
        constexpr int outputs = OUTPUTS * CHUNK / COLUMNS;
        const int start = tile * OUTPUTS + c * outputs;
        finish_tile<CHUNK, ROWS, 1, SPLIT, CONSUMERS / 32, false, ADD, GATED>(
            to, Tile{start, max(min(outputs, n - start), 0)}, staged, nullptr, part);
      }
    }
  }
#endif
}
