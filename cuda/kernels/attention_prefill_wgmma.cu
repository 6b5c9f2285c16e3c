// Attention of rows with several query tokens, for sm_90a: FlashAttention-3 (Shah et al. 2024) over
// paged KV. One warp brings keys and values block by block with the bulk copy engine, three bring
// the queries of the tile to come, two warpgroups of 64 query rows each multiply: while one runs
// its softmax the other has the tensor cores, and a warpgroup's own softmax runs beside its
// product with the values before. The query heads of a KV head are packed with the tokens into the
// tile's 128 rows, so that short chunks fill it too.
//
// Macros: those of attention.cuh, HEAD_DIM 64, 128 or 256, a 16-bit cache.
#include "async_copy.cuh"
#include "attention.cuh"
#include "attention_wgmma.cuh"

constexpr int kThreads = 384;
constexpr int kGroupRows = 64;  // of one warpgroup
constexpr int kTileRows = 2 * kGroupRows;
constexpr int kTileKeys = HEAD_DIM > 128 ? 64 : 128;
constexpr int kTileBlocks = kTileKeys / kBlockTokens;
constexpr int kColumns = HEAD_DIM / 64;  // of 128 bytes
constexpr int kRunBytes = kv_layout::run_bytes<HEAD_DIM * 2>();
constexpr int kRunColumnBytes = kBlockTokens * 128;
constexpr int kColumnBytes = kTileKeys * 128;
constexpr int kTileBytes = kColumns * kColumnBytes;
constexpr int kStages = 2;
constexpr int kQueryBuffers = HEAD_DIM > 128 ? 1 : 2;
constexpr int kQueryColumnBytes = kGroupRows * 128;
constexpr int kQueryGroupBytes = kColumns * kQueryColumnBytes;
constexpr int kQueryBytes = 2 * kQueryGroupBytes;
constexpr int kQueryThreads = 96;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
constexpr int kOutParts = HEAD_DIM > 128 ? 2 : 1;  // of at most 128 columns
constexpr int kOutColumns = HEAD_DIM / kOutParts;
static_assert(!KV_FP8 && HEAD_DIM % 64 == 0);

// Shared memory from a 1,024-byte boundary: queries, keys, values, barriers.
struct Addresses {
  u32 base;

  __device__ u32 query(int buffer) const { return base + buffer * kQueryBytes; }
  __device__ u32 keys(int stage) const {
    return base + kQueryBuffers * kQueryBytes + stage * kTileBytes;
  }
  __device__ u32 values(int stage) const { return keys(kStages + stage); }
  __device__ u32 barrier(int i) const { return keys(2 * kStages) + i * 8; }
  __device__ u32 keys_full(int stage) const { return barrier(stage); }
  __device__ u32 keys_empty(int stage) const { return barrier(kStages + stage); }
  __device__ u32 values_full(int stage) const { return barrier(2 * kStages + stage); }
  __device__ u32 values_empty(int stage) const { return barrier(3 * kStages + stage); }
  __device__ u32 query_full(int buffer) const { return barrier(4 * kStages + buffer); }
  __device__ u32 query_empty(int buffer) const {
    return barrier(4 * kStages + kQueryBuffers + buffer);
  }
};

// A place in a ring of buffers and the parity of its barriers.
template <int Size> struct Place {
  int index = 0;
  u32 parity = 0;

  __device__ void next() {
    if (++index == Size) {
      index = 0;
      parity ^= 1;
    }
  }
};

// The items of a thread block: (tile, KV head) from the longest to the shortest, dealt out there
// and back, so that every thread block gets as much.
struct Items {
  const PrefillTile* tiles;
  int limit, num_kv_heads, round = 0;
  PrefillTile tile;
  int head;

  __device__ bool next() {
    const int place = round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const int item = round++ * gridDim.x + place;
    if (item >= limit) return false;
    tile = tiles[item / num_kv_heads];
    head = item % num_kv_heads;
    return tile.queries != 0;
  }
  __device__ int sequence_keys() const { return tile.cached + tile.queries; }
  __device__ int key_tiles() const {
    const int last = (tile.tile * kTileRows + kTileRows + GROUP - 1) / GROUP;
    return (tile.cached + min(tile.queries, last) + kTileKeys - 1) / kTileKeys;
  }
};

// Brings keys and values: one warp.
__device__ __forceinline__ void produce_blocks(Items items, Addresses at, const u8* keys,
                                               const u8* values, const int* block_table,
                                               i64 block_bytes, int table_stride) {
  const int lane = threadIdx.x % 32, local = lane / kColumns, column = lane % kColumns;
  const u32 target = column * kColumnBytes + local * kRunColumnBytes;
  Place<kStages> stage;
  stage.parity = 1;
  while (items.next()) {
    const int* table = block_table + static_cast<i64>(items.tile.table_row) * table_stride;
    const int blocks = (items.sequence_keys() + kBlockTokens - 1) / kBlockTokens;
    const int key_tiles = items.key_tiles();
    const int source = items.head * kRunBytes + column * kRunColumnBytes;
    int id = local < kTileBlocks && local < blocks ? table[local] : 0;
    for (int j = 0; j < key_tiles; ++j) {
      const int here = min(kTileBlocks, blocks - j * kTileBlocks);
      const i64 offset = id * block_bytes + source;
      const int ahead = (j + 1) * kTileBlocks + local;
      if (local < kTileBlocks && ahead < blocks) id = table[ahead];
      barrier_wait(at.keys_empty(stage.index), stage.parity);
      if (lane == 0) barrier_expect(at.keys_full(stage.index), here * kRunBytes);
      __syncwarp();
      if (local < here)
        bulk_copy(at.keys(stage.index) + target, keys + offset, kRunColumnBytes,
                  at.keys_full(stage.index));
      barrier_wait(at.values_empty(stage.index), stage.parity);
      if (lane == 0) barrier_expect(at.values_full(stage.index), here * kRunBytes);
      __syncwarp();
      if (local < here)
        bulk_copy(at.values(stage.index) + target, values + offset, kRunColumnBytes,
                  at.values_full(stage.index));
      stage.next();
    }
  }
}

// Brings queries in the swizzled order, zeros behind the last one: three warps.
__device__ __forceinline__ void produce_queries(Items items, Addresses at, const SCALAR* q,
                                                int q_stride) {
  constexpr int kChunks = HEAD_DIM / 8;
  Place<kQueryBuffers> buffer;
  buffer.parity = 1;
  while (items.next()) {
    const SCALAR* q_head = q + static_cast<i64>(items.tile.query) * q_stride +
                           items.head * (GROUP * HEAD_DIM);
    barrier_wait(at.query_empty(buffer.index), buffer.parity);
#pragma unroll 2
    for (int i = threadIdx.x - 32; i < kTileRows * kChunks; i += kQueryThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      const int m = items.tile.tile * kTileRows + row, token = m / GROUP;
      const bool valid = token < items.tile.queries;
      const SCALAR* from =
          q_head + (valid ? static_cast<i64>(token) * q_stride + m % GROUP * HEAD_DIM : 0);
      const u32 to = row / kGroupRows * kQueryGroupBytes + chunk / 8 * kQueryColumnBytes +
                     row % kGroupRows * 128 + ((chunk ^ row) & 7) * 16;
      cp_async_16(at.query(buffer.index) + to, from + chunk * 8, valid);
    }
    cp_async_commit();
    cp_async_wait<0>();
    fence_async_proxy();
    barrier_arrive(at.query_full(buffer.index));
    buffer.next();
  }
}

// One thread of each warp tells the producers that the warp is done with a buffer.
__device__ __forceinline__ void release(u32 barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Warpgroups take turns at issuing products; barriers 1 and 2 are the turns, 3 and 4 their own.
__device__ __forceinline__ void take_turn(int group) { named_barrier_sync(1 + group, 256); }
__device__ __forceinline__ void pass_turn(int group) { named_barrier_arrive(2 - group, 256); }

// What a thread knows of its two rows.
struct Rows {
  float top[2], sum[2];
  int last[2];  // the last key that each sees

  // scores -> probabilities, in place; returns in `factor` what older sums must be scaled by.
  template <bool First>
  __device__ __forceinline__ void softmax(float (&s)[kTileKeys / 2], float (&factor)[2],
                                          int first_key, bool masked, float scale) {
    const int t = threadIdx.x % 4;
    if (masked) {
#pragma unroll
      for (int i = 0; i < kTileKeys / 2; ++i)
        if (first_key + i / 4 * 8 + 2 * t + i % 2 > last[i / 2 % 2]) s[i] = -CUDART_INF_F;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float next = First ? -CUDART_INF_F : top[h];
#pragma unroll
      for (int i = 2 * h; i < kTileKeys / 2; i += 4) next = fmaxf(next, fmaxf(s[i], s[i + 1]));
      next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, 1));
      next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, 2));
      factor[h] = First ? 0.f : exp2_fast((top[h] - next) * scale);
      top[h] = next;
      const float shift = next * scale;
      float even = 0.f, odd = 0.f;
#pragma unroll
      for (int i = 2 * h; i < kTileKeys / 2; i += 4) {
        s[i] = exp2_fast(fmaf(s[i], scale, -shift));
        s[i + 1] = exp2_fast(fmaf(s[i + 1], scale, -shift));
        even += s[i];
        odd += s[i + 1];
      }
      sum[h] = (First ? 0.f : sum[h] * factor[h]) + (even + odd);
    }
  }
};

__device__ __forceinline__ void multiply_keys(float (&s)[kTileKeys / 2], u32 query, u32 keys) {
#pragma unroll
  for (int k = 0; k < HEAD_DIM / 16; ++k)
    wgmma_shared<SCALAR>(s, wgmma_tile(query + k / 4 * kQueryColumnBytes + k % 4 * 32),
                         wgmma_tile(keys + k / 4 * kColumnBytes + k % 4 * 32), k != 0);
}
__device__ __forceinline__ void multiply_values(float (&o)[kOutParts][kOutColumns / 2],
                                                const u32 (&p)[kTileBlocks][4], u32 values) {
#pragma unroll
  for (int k = 0; k < kTileBlocks; ++k)
#pragma unroll
    for (int part = 0; part < kOutParts; ++part)
      wgmma_registers<SCALAR>(
          o[part], p[k],
          wgmma_tile(values + part * (kOutColumns / 64) * kColumnBytes + k * kRunColumnBytes,
                     kColumnBytes));
}
__device__ __forceinline__ void pack_probabilities(u32 (&p)[kTileBlocks][4],
                                                   const float (&s)[kTileKeys / 2]) {
#pragma unroll
  for (int i = 0; i < kTileKeys / 4; ++i) p[i / 4][i % 4] = pack<SCALAR>(s[2 * i], s[2 * i + 1]);
}

// Values behind the sequence's end may be anything, NaN too, and 0 x NaN is NaN. Both warpgroups
// write the same zeros.
__device__ __forceinline__ void clear_values(u32 values, int valid, int group) {
  for (int column = 0; column < kColumns; ++column)
    for (int i = valid * 8 + threadIdx.x % 128; i < kTileKeys * 8; i += 128)
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(values + column * kColumnBytes +
                                                                    i * 16),
                   "r"(0)
                   : "memory");
  fence_async_proxy();
  named_barrier_sync(3 + group, 128);
}

// Multiplies: one warpgroup of 64 rows.
__device__ __forceinline__ void consume(Items items, Addresses at, SCALAR* out, int q_stride,
                                        int group, float scale) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  Place<kStages> key_stage, value_stage;
  Place<kQueryBuffers> buffer;
  if (group == 1) pass_turn(group);
  while (items.next()) {
    const int first_row = items.tile.tile * kTileRows + group * kGroupRows;
    const int row = first_row + warp * 16 + g;
    const int key_tiles = items.key_tiles(), cached = items.tile.cached;
    const int unmasked = cached + first_row / GROUP + 1;  // keys that all rows see
    Rows rows;
    rows.last[0] = cached + row / GROUP;
    rows.last[1] = cached + (row + 8) / GROUP;
    const u32 query = at.query(buffer.index) + group * kQueryGroupBytes;
    float s[kTileKeys / 2], o[kOutParts][kOutColumns / 2], factor[2];
    u32 p[kTileBlocks][4];
#pragma unroll
    for (int part = 0; part < kOutParts; ++part)
#pragma unroll
      for (int i = 0; i < kOutColumns / 2; ++i) o[part][i] = 0.f;

    barrier_wait(at.query_full(buffer.index), buffer.parity);
    barrier_wait(at.keys_full(key_stage.index), key_stage.parity);
    wgmma_own(s);
    wgmma_fence();
    multiply_keys(s, query, at.keys(key_stage.index));
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_own(s);
    release(at.keys_empty(key_stage.index));
    key_stage.next();
    rows.softmax<true>(s, factor, 0, kTileKeys > unmasked, scale);
    pack_probabilities(p, s);

#pragma unroll 1
    for (int j = 1; j < key_tiles; ++j) {
      barrier_wait(at.keys_full(key_stage.index), key_stage.parity);
      take_turn(group);
      wgmma_own(s);
#pragma unroll
      for (int part = 0; part < kOutParts; ++part) wgmma_own(o[part]);
      wgmma_fence();
      multiply_keys(s, query, at.keys(key_stage.index));
      wgmma_commit();
      barrier_wait(at.values_full(value_stage.index), value_stage.parity);
      multiply_values(o, p, at.values(value_stage.index));
      wgmma_commit();
      pass_turn(group);
      wgmma_wait<1>();
      wgmma_own(s);
      release(at.keys_empty(key_stage.index));
      key_stage.next();
      rows.softmax<false>(s, factor, j * kTileKeys, (j + 1) * kTileKeys > unmasked, scale);
      // Never so; but the branch keeps the assembler from moving the wait before the softmax, which
      // is to run beside the product with the values.
      if (fminf(rows.sum[0], rows.sum[1]) < 0.f) __trap();
      wgmma_wait<0>();
#pragma unroll
      for (int part = 0; part < kOutParts; ++part) wgmma_own(o[part]);
      release(at.values_empty(value_stage.index));
      value_stage.next();
      pack_probabilities(p, s);
#pragma unroll
      for (int part = 0; part < kOutParts; ++part)
#pragma unroll
        for (int i = 0; i < kOutColumns / 2; ++i) o[part][i] *= factor[i / 2 % 2];
    }
    release(at.query_empty(buffer.index));
    buffer.next();

    barrier_wait(at.values_full(value_stage.index), value_stage.parity);
    const int valid = items.sequence_keys() - (key_tiles - 1) * kTileKeys;
    if (valid < kTileKeys) clear_values(at.values(value_stage.index), valid, group);
#pragma unroll
    for (int part = 0; part < kOutParts; ++part) wgmma_own(o[part]);
    wgmma_fence();
    multiply_values(o, p, at.values(value_stage.index));
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int part = 0; part < kOutParts; ++part) wgmma_own(o[part]);
    release(at.values_empty(value_stage.index));
    value_stage.next();

#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = rows.sum[h];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const float inverse = 1.f / sum;
      const int m = row + 8 * h, token = m / GROUP;
      if (token < items.tile.queries) {
        SCALAR* to = out + static_cast<i64>(items.tile.query + token) * q_stride +
                     (items.head * GROUP + m % GROUP) * HEAD_DIM + 2 * t;
#pragma unroll
        for (int part = 0; part < kOutParts; ++part)
#pragma unroll
          for (int n = 0; n < kOutColumns / 8; ++n)
            *reinterpret_cast<u32*>(to + part * kOutColumns + n * 8) =
                pack<SCALAR>(o[part][4 * n + 2 * h] * inverse, o[part][4 * n + 2 * h + 1] * inverse);
      }
    }
  }
}

// Grid: any number of thread blocks. Shared memory: queries, stages, barriers.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    attention_prefill_wgmma(const SCALAR* q, SCALAR* out, const u8* keys, const u8* values,
                            const int* block_table, const PrefillTile* tiles, const float*,
                            const float*, int max_tiles, int num_kv_heads, int block_bytes,
                            int table_stride, float scale) {
  extern __shared__ __align__(1024) u8 memory[];
  const Addresses at{shared_address(memory)};
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(at.keys_full(s), 1);
      barrier_init(at.values_full(s), 1);
      barrier_init(at.keys_empty(s), 8);
      barrier_init(at.values_empty(s), 8);
    }
    for (int b = 0; b < kQueryBuffers; ++b) {
      barrier_init(at.query_full(b), kQueryThreads);
      barrier_init(at.query_empty(b), 8);
    }
    barrier_init_fence();
  }
  __syncthreads();
  wait_for_previous();
  const int q_stride = num_kv_heads * GROUP * HEAD_DIM;
  const Items items{tiles, max_tiles * num_kv_heads, num_kv_heads};
  if (threadIdx.x < 128) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x < 32)
      produce_blocks(items, at, keys, values, block_table, block_bytes, table_stride);
    else
      produce_queries(items, at, q, q_stride);
  } else {
    take_registers<kConsumerRegisters>();
    consume(items, at, out, q_stride, threadIdx.x / 128 - 1, scale * kLog2e);
  }
  let_next_start();
}
