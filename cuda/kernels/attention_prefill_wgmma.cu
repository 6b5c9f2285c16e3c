// Attention of rows with several query tokens, for sm_90a: FlashAttention-3 (Shah et al. 2024) over
// paged KV. One warp brings keys and one brings values, block by block, with the bulk copy engine;
// two bring the queries of the tile to come; two warpgroups of 64 query rows each multiply: while
// one runs its softmax the other has the tensor cores, and a warpgroup's own softmax runs beside
// its product with the values before. The query heads of a KV head are packed with the tokens into
// the tile's 128 rows, so that short chunks fill it too.
//
// Macros: those of attention.cuh, HEAD_DIM 64, 128 or 256, a 16-bit cache; SPLIT_KEYS (1: items may
// be parts of a tile's keys, which the last one to finish merges).
#include "wgmma.cuh"
#include "prefill_pipeline.cuh"

constexpr int kThreads = 384;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
constexpr int kOutParts = HEAD_DIM > 128 ? 2 : 1;  // of at most 128 columns
constexpr int kOutColumns = HEAD_DIM / kOutParts;

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

// What a thread knows of its two rows of a tile.
struct Rows {
  float top[2], sum[2];
  int last[2];   // the last key that each sees
  int unmasked;  // keys that every row of the warpgroup sees

  __device__ void begin(const Items& items, int group) {
    const int first = items.tile.tile * kTileRows + group * kGroupRows;
    const int row = first + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    unmasked = items.tile.cached + first / GROUP + 1;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h] = -CUDART_INF_F;
      sum[h] = 0.f;
      last[h] = items.tile.cached + (row + 8 * h) / GROUP;
    }
  }

  // scores -> probabilities, in place; returns in `factor` what older sums must be scaled by.
  __device__ __forceinline__ void softmax(float (&s)[kTileKeys / 2], float (&factor)[2],
                                          int first_key, float scale) {
    const int t = threadIdx.x % 4;
    if (first_key + kTileKeys > unmasked) {
#pragma unroll
      for (int i = 0; i < kTileKeys / 2; ++i)
        if (first_key + i / 4 * 8 + 2 * t + i % 2 > last[i / 2 % 2]) s[i] = -CUDART_INF_F;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float next = top[h];
#pragma unroll
      for (int i = 2 * h; i < kTileKeys / 2; i += 4) next = fmaxf(next, fmaxf(s[i], s[i + 1]));
      next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, 1));
      next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, 2));
      factor[h] = exp2_fast((top[h] - next) * scale);
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
      sum[h] = sum[h] * factor[h] + (even + odd);
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

using Output = float[kOutParts][kOutColumns / 2];

__device__ __forceinline__ void own(Output& o) {
#pragma unroll
  for (int part = 0; part < kOutParts; ++part) wgmma_own(o[part]);
}
__device__ __forceinline__ void scale_output(Output& o, const float (&factor)[2]) {
#pragma unroll
  for (int part = 0; part < kOutParts; ++part)
#pragma unroll
    for (int i = 0; i < kOutColumns / 2; ++i) o[part][i] *= factor[i / 2 % 2];
}
__device__ __forceinline__ void clear_output(Output& o) {
#pragma unroll
  for (int part = 0; part < kOutParts; ++part)
#pragma unroll
    for (int i = 0; i < kOutColumns / 2; ++i) o[part][i] = 0.f;
}

constexpr int kPartialFloats = HEAD_DIM / 2 + 4;  // of a thread: its output, maxima and sums

// Where the parts of tiles meet. partials: slots of 256 threads; arrivals: 8 warps a slot, zero
// between launches.
struct Meeting {
  float* partials;
  int* arrivals;
};

// A finished tile's place in the output: what is left of it while the next one begins.
struct Finished {
  SCALAR* to[2];  // of this thread's rows; null: behind the last query
  float top[2], sum[2];
  int valid_keys;  // of its last tile of keys
  int part, parts, slot;

  __device__ Finished(const Items& items, const Rows& rows, SCALAR* out, int q_stride, int group)
      : valid_keys(items.sequence_keys() - (items.end() - 1) * kTileKeys), part(items.tile.part),
        parts(SPLIT_KEYS ? items.tile.parts : 1) {
    const int heads = q_stride / (GROUP * HEAD_DIM);
    slot = items.tile.slot * heads + items.head * parts;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int m = items.tile.tile * kTileRows + group * kGroupRows + threadIdx.x / 32 % 4 * 16 +
                    threadIdx.x % 32 / 4 + 8 * h;
      const int token = m / GROUP;
      to[h] = token < items.tile.queries
                  ? out + static_cast<i64>(items.tile.query + token) * q_stride +
                        (items.head * GROUP + m % GROUP) * HEAD_DIM
                  : nullptr;
      top[h] = rows.top[h];
      sum[h] = rows.sum[h] + __shfl_xor_sync(0xffffffffu, rows.sum[h], 1);
      sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
    }
  }

  // Leaves the warp's part for the others. The last warp to come takes all parts, in their order,
  // and returns true: what it holds then is the whole. Parts of a warp are read by the same warp
  // of another thread block, thread by thread.
  __device__ bool merge(Output& o, const Meeting& meeting, float scale) {
    const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
    const auto at = [&](int which) {
      return meeting.partials +
             (static_cast<i64>(slot + which) * 8 + warp) * (32 * kPartialFloats) + lane;
    };
    float* mine = at(part);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      __stcg(mine + h * 32, top[h]);
      __stcg(mine + (2 + h) * 32, sum[h]);
    }
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i)
      __stcg(mine + (4 + i) * 32, o[i * 2 / kOutColumns][i % (kOutColumns / 2)]);
    __syncwarp();
    int* counter = meeting.arrivals + slot * 8 + warp;
    int before = lane == 0 ? arrive(counter) : 0;
    before = __shfl_sync(0xffffffffu, before, 0);
    if (before != parts - 1) return false;
    __syncwarp();
    if (lane == 0) *counter = 0;
    clear_output(o);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h] = -CUDART_INF_F;
      sum[h] = 0.f;
    }
#pragma unroll 1
    for (int which = 0; which < parts; ++which) {
      const float* theirs = at(which);
      float factor[2], weight[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float other = __ldcg(theirs + h * 32), next = fmaxf(top[h], other);
        factor[h] = exp2_fast((top[h] - next) * scale);
        weight[h] = exp2_fast((other - next) * scale);
        sum[h] = sum[h] * factor[h] + __ldcg(theirs + (2 + h) * 32) * weight[h];
        top[h] = next;
      }
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 2; ++i) {
        float& x = o[i * 2 / kOutColumns][i % (kOutColumns / 2)];
        x = x * factor[i / 2 % 2] + __ldcg(theirs + (4 + i) * 32) * weight[i / 2 % 2];
      }
    }
    return true;
  }

  __device__ void deliver(Output& o, const Meeting& meeting, float scale) {
    if constexpr (SPLIT_KEYS) {
      if (parts > 1 && !merge(o, meeting, scale)) return;
    }
    store(o);
  }

 private:
  // Four lanes hold 8 neighbouring columns; they trade so that each stores 8 by itself.
  __device__ void store(const Output& o) const {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float inverse = 1.f / sum[h];
#pragma unroll
      for (int n = 0; n < HEAD_DIM / 8; n += 4) {
        u32 x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &o[n * 8 / kOutColumns][(n + i) % (kOutColumns / 8) * 4 + 2 * h];
          x[i] = pack<SCALAR>(pair[0] * inverse, pair[1] * inverse);
        }
#pragma unroll
        for (int distance = 1; distance < 4; distance *= 2)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (i & distance) continue;
            const bool upper = t & distance;
            const u32 other =
                __shfl_xor_sync(0xffffffffu, upper ? x[i] : x[i + distance], distance);
            (upper ? x[i] : x[i + distance]) = other;
          }
        if (to[h] != nullptr)
          *reinterpret_cast<uint4*>(to[h] + (n + t) * 8) = make_uint4(x[0], x[1], x[2], x[3]);
      }
    }
  }
};

// Multiplies: one warpgroup of 64 rows. The tiles of keys of all its items are one stream: the
// scores of the next, be it another item's first, are made beside the product with the values.
__device__ __forceinline__ void consume(Items items, Addresses at, SCALAR* out, int q_stride,
                                        int group, float scale, const Meeting& meeting) {
  RingPlace<kStages> key_stage, value_stage;
  RingPlace<kQueryBuffers> buffer;
  Rows rows;
  Output o;
  clear_output(o);
  float s[kTileKeys / 2], factor[2];
  u32 p[kTileBlocks][4];
  if (group == 1) pass_turn(group);
  if (!items.next()) return;

  rows.begin(items, group);
  u32 query = at.query(0) + group * kQueryGroupBytes;
  barrier_wait(at.query_full(0), 0);
  fence_async_proxy();
  barrier_wait(at.keys_full(0), 0);
  wgmma_own(s);
  wgmma_fence();
  multiply_keys(s, query, at.keys(0));
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_own(s);
  release(at.keys_empty(0));
  key_stage.advance();
  rows.softmax(s, factor, items.first() * kTileKeys, scale);
  pack_probabilities(p, s);

  int j = items.first(), end = items.end();
  Finished finished(items, rows, out, q_stride, group);
#pragma unroll 1
  while (true) {
    const bool last = ++j == end;  // the item has no more keys
    if (last) {
      finished = Finished(items, rows, out, q_stride, group);
      release(at.query_empty(buffer.index));
      buffer.advance();
      if (!items.next()) break;
      j = items.first();
      end = items.end();
      rows.begin(items, group);
      query = at.query(buffer.index) + group * kQueryGroupBytes;
      barrier_wait(at.query_full(buffer.index), buffer.parity);
      fence_async_proxy();
    }
    barrier_wait(at.keys_full(key_stage.index), key_stage.parity);
    take_turn(group);
    wgmma_own(s);
    own(o);
    wgmma_fence();
    multiply_keys(s, query, at.keys(key_stage.index));
    wgmma_commit();
    barrier_wait(at.values_full(value_stage.index), value_stage.parity);
    if (last && finished.valid_keys < kTileKeys)
      clear_values(at.values(value_stage.index), finished.valid_keys, group);
    wgmma_fence();  // once more, behind a branch: the assembler would, and warn
    multiply_values(o, p, at.values(value_stage.index));
    wgmma_commit();
    pass_turn(group);
    wgmma_wait<1>();
    wgmma_own(s);
    release(at.keys_empty(key_stage.index));
    key_stage.advance();
    rows.softmax(s, factor, j * kTileKeys, scale);
    // Never so; but the branch keeps the assembler from moving the wait before the softmax, which
    // is to run beside the product with the values.
    if (fminf(rows.sum[0], rows.sum[1]) < 0.f) __trap();
    wgmma_wait<0>();
    own(o);
    release(at.values_empty(value_stage.index));
    value_stage.advance();
    if (last) {
      finished.deliver(o, meeting, scale);
      clear_output(o);
    } else {
      scale_output(o, factor);
    }
    pack_probabilities(p, s);
  }

  barrier_wait(at.values_full(value_stage.index), value_stage.parity);
  if (finished.valid_keys < kTileKeys)
    clear_values(at.values(value_stage.index), finished.valid_keys, group);
  own(o);
  wgmma_fence();
  multiply_values(o, p, at.values(value_stage.index));
  wgmma_commit();
  wgmma_wait<0>();
  own(o);
  finished.deliver(o, meeting, scale);
}

// Grid: any number of thread blocks up to max_tiles * num_kv_heads. Shared memory: Addresses.
// The arguments without a name are attention_prefill_mma's.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    attention_prefill_wgmma(const SCALAR* q, SCALAR* out, const u8* keys, const u8* values,
                            const int* block_table, const PrefillTile* tiles, const float*,
                            const float*, int, int num_kv_heads, int block_bytes,
                            int table_stride, float scale, float* partials, int* arrivals) {
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
  let_next_start();
  wait_for_previous();
  const int q_stride = num_kv_heads * GROUP * HEAD_DIM;
  const auto items = [&] { return Items(tiles, num_kv_heads); };
  if (threadIdx.x < 128) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x < 32)
      produce_blocks(items(), at.keys(0), at.keys_full(0), at.keys_empty(0), keys, block_table,
                     block_bytes, table_stride);
    else if (threadIdx.x < 64)
      produce_blocks(items(), at.values(0), at.values_full(0), at.values_empty(0), values, block_table,
                     block_bytes, table_stride);
    else
      produce_queries(items(), at, q, q_stride);
  } else {
    take_registers<kConsumerRegisters>();
    consume(items(), at, out, q_stride, threadIdx.x / 128 - 1, scale * kLog2e,
            Meeting{partials, arrivals});
  }
}
