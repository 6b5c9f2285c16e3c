// Attention of rows with several query tokens, for sm_80 on: FlashAttention-2 (Dao 2023) over paged
// KV, with mma.sync and cp.async. The query heads of a KV head are packed with the tokens into the
// tile's 64 rows, so that short chunks fill it too.
#include "async_copy.cuh"
#include "attention.cuh"

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kTileRows = kWarps * 16;
constexpr int kTileBlocks = HEAD_DIM > 128 ? 2 : 4;
constexpr int kTileKeys = kTileBlocks * kBlockTokens;
constexpr int kKeyTiles = kTileKeys / 8;
constexpr int kSteps = HEAD_DIM / 16;
constexpr int kRowBytes = HEAD_DIM * (KV_FP8 ? 1 : 2);
constexpr int kRunBytes = kv_layout::run_bytes<kRowBytes>();
constexpr int kQueryBytes = kTileRows * HEAD_DIM * 2;
constexpr int kStageBytes = 2 * kTileBlocks * kRunBytes;

#if KV_FP8
using Operand = __half;
#else
using Operand = SCALAR;
#endif

__device__ __forceinline__ u32 query_offset(int row, int chunk) {
  return row / 16 * (16 * HEAD_DIM * 2) + kv_layout::offset<HEAD_DIM * 2>(row % 16, chunk);
}

// The tile's rows into shared memory as operands; zeros behind the last query.
__device__ __forceinline__ void load_queries(u8* shared, const SCALAR* q, const PrefillTile& tile,
                                             int q_stride) {
  constexpr int kPairs = HEAD_DIM / 16;  // of 16-byte chunks
  for (int i = threadIdx.x; i < kTileRows * kPairs; i += kThreads) {
    const int row = i / kPairs, pair = i % kPairs;
    const int m = tile.tile * kTileRows + row, token = m / GROUP, head = m % GROUP;
    uint4 raw[2] = {};
    if (token < tile.queries) {
      const uint4* p = reinterpret_cast<const uint4*>(
          q + static_cast<i64>(tile.query + token) * q_stride + head * HEAD_DIM + pair * 16);
      raw[0] = p[0];
      raw[1] = p[1];
    }
#if KV_FP8
    // Converted keys come in the order 0 1 4 5 8 9 12 13, 2 3 6 7 10 11 14 15 along the head size.
    const SCALAR* x = reinterpret_cast<const SCALAR*>(raw);
    u32 ordered[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      ordered[j] = pack<Operand>(to_float(x[4 * j]), to_float(x[4 * j + 1]));
      ordered[4 + j] = pack<Operand>(to_float(x[4 * j + 2]), to_float(x[4 * j + 3]));
    }
    const uint4* out = reinterpret_cast<const uint4*>(ordered);
#else
    const uint4* out = raw;
#endif
    *reinterpret_cast<uint4*>(shared + query_offset(row, 2 * pair)) = out[0];
    *reinterpret_cast<uint4*>(shared + query_offset(row, 2 * pair + 1)) = out[1];
  }
}

// Starts the copy of the keys and values of a tile of blocks; zeros behind the last key, since
// what stands there may be NaN.
__device__ __forceinline__ void fetch(u32 stage, const u8* keys, const u8* values,
                                      const int* table, int first_block, int num_keys,
                                      i64 block_bytes) {
  constexpr int kChunks = kRunBytes / 16;
  constexpr int kWideChunks = kRowBytes / 128 * 128;  // in columns of 128 bytes
#pragma unroll
  for (int i = threadIdx.x; i < kTileBlocks * kChunks; i += kThreads) {
    const int local = i / kChunks, chunk = i % kChunks, block = first_block + local;
    const int row = chunk < kWideChunks ? chunk / 8 % 16 : (chunk - kWideChunks) / 4;
    const bool valid = block * kBlockTokens + row < num_keys;
    const i64 offset = (valid ? table[block] * block_bytes : 0) + chunk * 16;
    cp_async_16(stage + i * 16, keys + offset, valid);
    cp_async_16(stage + kTileBlocks * kRunBytes + i * 16, values + offset, valid);
  }
}

// scores[j] += queries (16 rows) x keys of 16-key blocks.
__device__ __forceinline__ void multiply_keys(float (&scores)[kKeyTiles][4], u32 queries,
                                              u32 keys) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kSteps; k += KV_FP8 ? 2 : 1) {
    u32 a[KV_FP8 ? 2 : 1][4];
#pragma unroll
    for (int c = 0; c < (KV_FP8 ? 2 : 1); ++c)
      load_matrix_x4(a[c], queries + kv_layout::offset<HEAD_DIM * 2>(lane & 15,
                                                                    2 * (k + c) + (lane >> 4)));
#pragma unroll
    for (int b = 0; b < kTileBlocks; ++b) {
      const u32 run = keys + b * kRunBytes;
      u32 raw[4];
#if KV_FP8
      load_matrix_x4(raw, run + kv_layout::offset<kRowBytes>(lane & 15, k + (lane >> 4)));
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const u32 x = raw[2 * c + n];
          const u32 fragment[2] = {half2_from_e4m3x2(x), half2_from_e4m3x2(x >> 16)};
          mma_16x8x16<Operand>(scores[2 * b + n], a[c], fragment);
        }
#else
      load_matrix_x4(raw, run + kv_layout::offset<kRowBytes>((lane & 7) + (lane >> 4) * 8,
                                                             2 * k + ((lane >> 3) & 1)));
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const u32 fragment[2] = {raw[2 * n], raw[2 * n + 1]};
        mma_16x8x16<Operand>(scores[2 * b + n], a[0], fragment);
      }
#endif
    }
  }
}

// out[2d], out[2d+1] += probabilities (16 rows) x values.
__device__ __forceinline__ void multiply_values(float (&out)[2 * kSteps][4],
                                                const u32 (&p)[kTileBlocks][4], u32 values) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int b = 0; b < kTileBlocks; ++b) {
    const u32 run = values + b * kRunBytes;
#if KV_FP8
#pragma unroll
    for (int d = 0; d < kSteps; d += 2) {
      u32 raw[4];
      load_matrix_x4_transposed(raw,
                                run + kv_layout::offset<kRowBytes>(lane & 15, d + (lane >> 4)));
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        // A transposed element is a pair along the head size: the even ones make one tile of 8
        // columns, the odd ones the next.
        const u32 low = __byte_perm(raw[2 * c], 0, 0x3120);
        const u32 high = __byte_perm(raw[2 * c + 1], 0, 0x3120);
        const u32 even[2] = {half2_from_e4m3x2(low), half2_from_e4m3x2(high)};
        const u32 odd[2] = {half2_from_e4m3x2(low >> 16), half2_from_e4m3x2(high >> 16)};
        mma_16x8x16<Operand>(out[2 * (d + c)], p[b], even);
        mma_16x8x16<Operand>(out[2 * (d + c) + 1], p[b], odd);
      }
    }
#else
#pragma unroll
    for (int d = 0; d < kSteps; ++d) {
      u32 raw[4];
      load_matrix_x4_transposed(
          raw, run + kv_layout::offset<kRowBytes>(lane & 15, 2 * d + (lane >> 4)));
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const u32 fragment[2] = {raw[2 * n], raw[2 * n + 1]};
        mma_16x8x16<Operand>(out[2 * d + n], p[b], fragment);
      }
    }
#endif
  }
}

__device__ __forceinline__ void store_out(SCALAR* out, const float (&x)[2 * kSteps][4], int half,
                                          float factor) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int d = 0; d < kSteps; ++d) {
    const float* even = &x[2 * d][2 * half];
    const float* odd = &x[2 * d + 1][2 * half];
#if KV_FP8
    *reinterpret_cast<uint2*>(out + d * 16 + 4 * t) =
        make_uint2(pack<SCALAR>(even[0] * factor, odd[0] * factor),
                   pack<SCALAR>(even[1] * factor, odd[1] * factor));
#else
    *reinterpret_cast<u32*>(out + d * 16 + 2 * t) = pack<SCALAR>(even[0] * factor, even[1] * factor);
    *reinterpret_cast<u32*>(out + d * 16 + 8 + 2 * t) =
        pack<SCALAR>(odd[0] * factor, odd[1] * factor);
#endif
  }
}

// Grid: any number of thread blocks; they take (tile, KV head) in turn.
extern "C" __global__ void __launch_bounds__(kThreads)
    attention_prefill_mma(const SCALAR* q, SCALAR* out, const u8* keys, const u8* values,
                      const int* block_table, const PrefillTile* tiles, const float* k_scale,
                      const float* v_scale, int max_tiles, int num_kv_heads, int block_bytes,
                      int table_stride, float scale) {
  extern __shared__ __align__(1024) u8 memory[];
  const u32 queries = shared_address(memory);
  const u32 stages = queries + kQueryBytes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int q_stride = num_kv_heads * GROUP * HEAD_DIM;
  let_next_start();
  wait_for_previous();
  scale *= kLog2e * (KV_FP8 ? *k_scale : 1.f);
  const float out_scale = KV_FP8 ? *v_scale : 1.f;

  for (int item = blockIdx.x; item < max_tiles * num_kv_heads; item += gridDim.x) {
    const PrefillTile tile = tiles[item / num_kv_heads];
    if (tile.queries == 0) break;
    const int head = item % num_kv_heads;
    const int* table = block_table + static_cast<i64>(tile.table_row) * table_stride;
    const u8* head_keys = keys + head * kRunBytes;
    const u8* head_values = values + head * kRunBytes;
    const int first_row = tile.tile * kTileRows;
    const int num_keys =
        tile.cached + min(tile.queries, (first_row + kTileRows + GROUP - 1) / GROUP);
    const int key_tiles = (num_keys + kTileKeys - 1) / kTileKeys;
    const SCALAR* q_head = q + head * GROUP * HEAD_DIM;

    __syncthreads();  // the tile before may still be read
    fetch(stages, head_keys, head_values, table, 0, num_keys, block_bytes);
    cp_async_commit();
    load_queries(memory, q_head, tile, q_stride);

    // The last key that rows g and g + 8 of this warp see.
    const int row = first_row + warp * 16 + g;
    const int last[2] = {tile.cached + row / GROUP, tile.cached + (row + 8) / GROUP};
    float o[2 * kSteps][4] = {};
    float top[2] = {-CUDART_INF_F, -CUDART_INF_F}, sum[2] = {0.f, 0.f};
#pragma unroll 1
    for (int j = 0; j < key_tiles; ++j) {
      if (j + 1 < key_tiles)
        fetch(stages + (j + 1) % 2 * kStageBytes, head_keys, head_values, table,
              (j + 1) * kTileBlocks, num_keys, block_bytes);
      cp_async_commit();
      cp_async_wait<1>();
      __syncthreads();
      const u32 stage = stages + j % 2 * kStageBytes;
      float s[kKeyTiles][4] = {};
      multiply_keys(s, queries + warp * (16 * HEAD_DIM * 2), stage);

      const bool masked = (j + 1) * kTileKeys > tile.cached + (first_row + warp * 16) / GROUP + 1;
      u32 p[kTileBlocks][4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float next = top[h];
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& x = s[n][2 * h + c];
            x *= scale;
            if (masked && j * kTileKeys + n * 8 + 2 * t + c > last[h]) x = -CUDART_INF_F;
            next = fmaxf(next, x);
          }
        next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, 1));
        next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, 2));
        const float factor = exp2_fast(top[h] - next);
        top[h] = next;
        sum[h] *= factor;
#pragma unroll
        for (int n = 0; n < 2 * kSteps; ++n) {
          o[n][2 * h] *= factor;
          o[n][2 * h + 1] *= factor;
        }
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          const float low = exp2_fast(s[n][2 * h] - next);
          const float high = exp2_fast(s[n][2 * h + 1] - next);
          sum[h] += low + high;
          p[n / 2][n % 2 * 2 + h] = pack<Operand>(low, high);
        }
      }
      multiply_values(o, p, stage + kTileBlocks * kRunBytes);
      __syncthreads();  // before the next fetch takes the stage
    }

#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
      sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
      const int m = row + 8 * h, token = m / GROUP;
      if (token < tile.queries)
        store_out(out + static_cast<i64>(tile.query + token) * q_stride +
                      (head * GROUP + m % GROUP) * HEAD_DIM,
                  o, h, out_scale / sum[h]);
    }
  }
}
