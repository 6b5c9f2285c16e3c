// Decode attention: one query token a row against its paged KV, for all rows of a step.
//
// Flash-decoding (Dao et al. 2023) on an even cut: the KV blocks of all (row, KV head) pairs form
// one line, and every thread block of a persistent grid takes an equal share of it, so that a
// batch's skew costs nothing. A warp takes every fourth block of the share through its own ring of
// copies, and multiplies with swapped operands: the 16 keys of a block are the rows of the tensor
// core's tile, the query heads of the KV head its 8 columns. Warps meet where a pair ends; a pair
// that spans thread blocks is finished by whichever arrives last, in the fixed order of its parts,
// so that results do not depend on timing.
//
// Macros beside those of attention.cuh: STAGES of a warp's ring, MIN_BLOCKS_PER_SM.
#include "attention.cuh"
#include "block_ring.cuh"

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kRowBytes = HEAD_DIM * (KV_FP8 ? 1 : 2);
constexpr int kRunBytes = kv_layout::run_bytes<kRowBytes>();
constexpr int kTiles = (GROUP + 7) / 8;   // of 8 query heads
constexpr int kSteps = HEAD_DIM / 16;     // of a product along the head size
constexpr int kRingBytes = block_ring_bytes(kWarps, STAGES, kRunBytes);
constexpr int kPadded = HEAD_DIM + 4;     // floats of a head in shared memory: no bank conflicts

#if KV_FP8
using Operand = __half;
#else
using Operand = SCALAR;
#endif

struct Partial {
  float max;  // of the scaled scores, in units of log2
  float sum;  // of 2^(score - max)
};

struct alignas(16) Shared {
  float out[kWarps][GROUP][kPadded];
  Partial partial[kWarps][GROUP];
  int last;
};

// Past L1, which may hold an earlier step's.
__device__ __forceinline__ DecodeShare load_share(const DecodeShare* from) {
  static_assert(sizeof(DecodeShare) == 2 * sizeof(int4), "two vectors");
  DecodeShare share;
  int4* const to = reinterpret_cast<int4*>(&share);
  to[0] = __ldcg(reinterpret_cast<const int4*>(from));
  to[1] = __ldcg(reinterpret_cast<const int4*>(from) + 1);
  return share;
}

// A walk over the segments of a share: runs of blocks of one (row, KV head).
struct Walk {
  int row, head, begin, end, table_row, tokens, query;
  int position;   // of `begin` in the share
  int remaining;  // blocks of the share behind `end`

  __device__ explicit Walk(const DecodeShare& share)
      : row(share.row), head(share.head), begin(share.block), table_row(share.table_row),
        tokens(share.tokens), query(share.query), position(0), remaining(share.blocks) {
    take();
  }
  __device__ int blocks() const { return (tokens + kBlockTokens - 1) / kBlockTokens; }
  __device__ void take() {
    end = min(blocks(), begin + remaining);
    remaining -= end - begin;
  }
  // False when the share is done.
  __device__ bool advance(const DecodeRow* rows, int num_kv_heads) {
    if (remaining == 0) return false;
    position += end - begin;
    if (++head == num_kv_heads) {
      head = 0;
      const DecodeRow next = rows[++row];
      table_row = next.table_row;
      tokens = next.tokens;
      query = next.query;
    }
    begin = 0;
    take();
    return true;
  }
  // The first block of the segment that is warp `warp`'s: blocks are dealt out in turn.
  __device__ int first(int warp) const { return begin + ((warp - position) & (kWarps - 1)); }
};

// Runs ahead of the arithmetic and keeps the warp's ring full.
struct Fetcher {
  Walk walk;
  int block;
  int table_base = 0;
  int entry = 0;      // lane i: the block table's entry of block table_base + kWarps * i
  bool done = false;

  __device__ Fetcher(const DecodeShare& share, const int* table, int table_stride)
      : walk(share), block(walk.first(threadIdx.x / 32)) {
    load_table(table, table_stride);
  }
  __device__ void load_table(const int* table, int table_stride) {
    table_base = block;
    const int mine = block + kWarps * static_cast<int>(threadIdx.x % 32);
    entry = mine < walk.end
                ? __ldcg(table + static_cast<i64>(walk.table_row) * table_stride + mine)
                : 0;
  }
  // Whether the next block was in the cache before this step: a row's token stands in its last one.
  __device__ bool next_is_old() const { return block < walk.end && block + 1 < walk.blocks(); }

  template <typename Ring>
  __device__ void next(Ring& ring, const u8* keys, const u8* values, const int* table,
                       const DecodeRow* rows, int table_stride, int num_kv_heads,
                       i64 block_bytes) {
    while (!done && block >= walk.end) {
      done = !walk.advance(rows, num_kv_heads);
      if (done) break;
      block = walk.first(threadIdx.x / 32);
      load_table(table, table_stride);
    }
    if (done) {
      ring.fetch_nothing();
      return;
    }
    if (block >= table_base + 32 * kWarps) load_table(table, table_stride);
    const int id = __shfl_sync(0xffffffffu, entry, (block - table_base) / kWarps);
    const i64 offset = id * block_bytes + walk.head * kRunBytes;
    ring.fetch(keys + offset, values + offset);
    block += kWarps;
  }
};

// The query heads as B fragments: step k, tile n. Lanes beyond GROUP hold zeros.
struct Queries {
  u32 b[kSteps][kTiles][2];

  __device__ void load(const SCALAR* q) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const bool real = n * 8 + g < GROUP;
        const SCALAR* p = q + (n * 8 + g) * HEAD_DIM + k * 16;
#if KV_FP8
        // The order of k within a step is that of the converted keys: see load_keys().
        uint2 raw = real ? *reinterpret_cast<const uint2*>(p + 4 * t) : make_uint2(0, 0);
        const SCALAR* x = reinterpret_cast<const SCALAR*>(&raw);
        b[k][n][0] = pack<Operand>(to_float(x[0]), to_float(x[1]));
        b[k][n][1] = pack<Operand>(to_float(x[2]), to_float(x[3]));
#else
        b[k][n][0] = real ? *reinterpret_cast<const u32*>(p + 2 * t) : 0;
        b[k][n][1] = real ? *reinterpret_cast<const u32*>(p + 2 * t + 8) : 0;
#endif
      }
  }
};

// scores[n] += keys (16 rows) x queries. Two chains of products hide the latency of each other.
__device__ __forceinline__ void multiply_keys(float (&scores)[kTiles][4], u32 keys,
                                              const Queries& q) {
  const int lane = threadIdx.x % 32;
  float odd[kTiles][4] = {};
#if KV_FP8
#pragma unroll
  for (int k = 0; k < kSteps; k += 2) {
    // Lane (g, t) gets bytes 4t..4t+3 of rows g, g+8 of two 16-byte chunks. k 2t..2t+1 of the
    // fragment stands for elements 4t..4t+1, k 2t+8.. for 4t+2..4t+3.
    u32 raw[4];
    load_matrix_x4(raw, keys + kv_layout::offset<kRowBytes>(lane & 15, k + (lane >> 4)));
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const u32 a[4] = {half2_from_e4m3x2(raw[2 * c]), half2_from_e4m3x2(raw[2 * c + 1]),
                        half2_from_e4m3x2(raw[2 * c] >> 16),
                        half2_from_e4m3x2(raw[2 * c + 1] >> 16)};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) mma_16x8x16<Operand>(c ? odd[n] : scores[n], a, q.b[k + c][n]);
    }
  }
#else
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    u32 a[4];
    load_matrix_x4(a, keys + kv_layout::offset<kRowBytes>(lane & 15, 2 * k + (lane >> 4)));
#pragma unroll
    for (int n = 0; n < kTiles; ++n) mma_16x8x16<Operand>(k & 1 ? odd[n] : scores[n], a, q.b[k][n]);
  }
#endif
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] += odd[n][i];
}

// out[d][n] += transposed values (16 rows of the head size) x probabilities.
__device__ __forceinline__ void multiply_values(float (&out)[kSteps][kTiles][4], u32 values,
                                                const u32 (&p)[kTiles][2]) {
  const int lane = threadIdx.x % 32;
#if KV_FP8
#pragma unroll
  for (int d = 0; d < kSteps; d += 2) {
    // A transposed 16-bit element is a pair of neighbours along the head size: the even ones make
    // rows 0..7 of the fragment, the odd ones rows 8..15.
    u32 raw[4];
    load_matrix_x4_transposed(raw,
                              values + kv_layout::offset<kRowBytes>(lane & 15, d + (lane >> 4)));
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const u32 low = __byte_perm(raw[2 * c], 0, 0x3120);
      const u32 high = __byte_perm(raw[2 * c + 1], 0, 0x3120);
      const u32 a[4] = {half2_from_e4m3x2(low), half2_from_e4m3x2(low >> 16),
                        half2_from_e4m3x2(high), half2_from_e4m3x2(high >> 16)};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) mma_16x8x16<Operand>(out[d + c][n], a, p[n]);
    }
  }
#else
#pragma unroll
  for (int d = 0; d < kSteps; ++d) {
    u32 a[4];
    load_matrix_x4_transposed(
        a, values + kv_layout::offset<kRowBytes>((lane & 7) + (lane >> 4) * 8,
                                                 2 * d + ((lane >> 3) & 1)));
#pragma unroll
    for (int n = 0; n < kTiles; ++n) mma_16x8x16<Operand>(out[d][n], a, p[n]);
  }
#endif
}

// Where along the head size row `g` (+ 8 if `high`) of step d of multiply_values() lies.
__device__ __forceinline__ int out_element(int d, int g, bool high) {
  return KV_FP8 ? d * 16 + 2 * g + high : d * 16 + g + 8 * high;
}

// What a warp knows of one (row, KV head): online softmax (Milakov & Gimelshein 2018).
struct Accumulator {
  float out[kSteps][kTiles][4];
  float max[kTiles][2];  // of the columns 2t, 2t+1
  float sum[kTiles][2];  // of this lane's keys alone, until finish()

  __device__ void clear() {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        max[n][c] = -CUDART_INF_F;
        sum[n][c] = 0.f;
      }
#pragma unroll
      for (int d = 0; d < kSteps; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[d][n][i] = 0.f;
    }
  }

  // Takes a block of 16 keys and values, of which the first `valid` count.
  __device__ void add(const Queries& q, u32 keys, u32 values, int valid, float scale) {
    const int g = threadIdx.x % 32 / 4;
    float s[kTiles][4] = {};
    multiply_keys(s, keys, q);
    u32 p[kTiles][2];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float top[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        s[n][c] = g < valid ? s[n][c] * scale : -CUDART_INF_F;
        s[n][c + 2] = g + 8 < valid ? s[n][c + 2] * scale : -CUDART_INF_F;
        top[c] = fmaxf(s[n][c], s[n][c + 2]);
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2)
          top[c] = fmaxf(top[c], __shfl_xor_sync(0xffffffffu, top[c], distance));
      }
      if (__any_sync(0xffffffffu, top[0] > max[n][0] || top[1] > max[n][1])) rescale(n, top);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        s[n][c] = exp2_fast(s[n][c] - max[n][c]);
        s[n][c + 2] = exp2_fast(s[n][c + 2] - max[n][c]);
        sum[n][c] += s[n][c] + s[n][c + 2];
      }
      p[n][0] = transpose_8x8(pack<Operand>(s[n][0], s[n][1]));
      p[n][1] = transpose_8x8(pack<Operand>(s[n][2], s[n][3]));
    }
    multiply_values(out, values, p);
  }

  // Sums over the lanes that share a column.
  __device__ void finish() {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2)
          sum[n][c] += __shfl_xor_sync(0xffffffffu, sum[n][c], distance);
  }

 private:
  __device__ void rescale(int n, const float (&top)[2]) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float next = fmaxf(max[n][c], top[c]);
      const float factor = exp2_fast(max[n][c] - next);
      max[n][c] = next;
      sum[n][c] *= factor;
#pragma unroll
      for (int d = 0; d < kSteps; ++d) {
        out[d][n][c] *= factor;
        out[d][n][c + 2] *= factor;
      }
    }
  }
};

// Values behind a sequence's end may be anything, NaN too, and 0 x NaN is NaN.
__device__ __forceinline__ void clear_values(u32 values, int valid) {
  const int lane = threadIdx.x % 32;
  constexpr int kChunks = kRowBytes / 16;
  for (int i = valid * kChunks + lane; i < kBlockTokens * kChunks; i += 32)
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(
                     values + kv_layout::offset<kRowBytes>(i / kChunks, i % kChunks)),
                 "r"(0)
                 : "memory");
#if BLOCK_RING_BULK
  fence_async_proxy();
#endif
  __syncwarp();
}

// Puts a warp's result where the thread block can merge it.
__device__ __forceinline__ void publish(Shared& shared, const Accumulator& a) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int head = n * 8 + 2 * t + c;
      if (head >= GROUP) continue;
      if (g == 0) shared.partial[warp][head] = {a.max[n][c], a.sum[n][c]};
#pragma unroll
      for (int d = 0; d < kSteps; ++d) {
        shared.out[warp][head][out_element(d, g, false)] = a.out[d][n][c];
        shared.out[warp][head][out_element(d, g, true)] = a.out[d][n][c + 2];
      }
    }
}

__device__ __forceinline__ void add_scaled(float4& sum, float factor, const float4& x) {
  sum.x += factor * x.x;
  sum.y += factor * x.y;
  sum.z += factor * x.z;
  sum.w += factor * x.w;
}

__device__ __forceinline__ void store_out(SCALAR* out, int head, int d, const float4& x,
                                          float factor) {
  const u32 pair[2] = {pack<SCALAR>(x.x * factor, x.y * factor),
                       pack<SCALAR>(x.z * factor, x.w * factor)};
  *reinterpret_cast<uint2*>(out + head * HEAD_DIM + d) = make_uint2(pair[0], pair[1]);
}

// Grid: one thread block a share. `partials`: 2 a share, each GROUP * (HEAD_DIM floats) with its
// Partials behind all of them; `arrivals`: one a share, zero between launches.
extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS_PER_SM)
    attention_decode(const SCALAR* q, SCALAR* out, const u8* keys, const u8* values,
                     const int* block_table, const DecodeShare* shares, const DecodeRow* rows,
                     float* partials, int* arrivals, const float* k_scale, const float* v_scale,
                     int num_kv_heads, int block_bytes, int table_stride, float scale) {
  extern __shared__ __align__(1024) u8 memory[];
  BlockRing<kWarps, STAGES, kRunBytes> ring(shared_address(memory));
  Shared& shared = *reinterpret_cast<Shared*>(memory + kRingBytes);

  let_next_start();
  // The plan was there before the kernel before this one began (attention_plan.cu), and so was all
  // of the cache but the step's own tokens.
  const DecodeShare share = load_share(shares + blockIdx.x);
  Walk walk(share);
  Fetcher fetcher(share, block_table, table_stride);
  const auto fetch = [&] {
    fetcher.next(ring, keys, values, block_table, rows, table_stride, num_kv_heads, block_bytes);
  };
  int fetched = 0;
#pragma unroll 1
  for (; fetched < STAGES && fetcher.next_is_old(); ++fetched) fetch();
  wait_for_previous();
  if (share.blocks == 0) return;
#pragma unroll 1
  for (; fetched < STAGES; ++fetched) fetch();

  scale *= kLog2e * (KV_FP8 ? *k_scale : 1.f);
  const float out_scale = KV_FP8 ? *v_scale : 1.f;
  const int q_stride = num_kv_heads * GROUP * HEAD_DIM;
  Partial* const partial_sums =
      reinterpret_cast<Partial*>(partials + static_cast<i64>(gridDim.x) * 2 * GROUP * HEAD_DIM);
  Queries queries;
  Accumulator accumulator;

  do {
    const i64 target =
        static_cast<i64>(walk.query) * q_stride + walk.head * (GROUP * HEAD_DIM);
    queries.load(q + target);
    accumulator.clear();
    for (int block = walk.first(threadIdx.x / 32); block < walk.end; block += kWarps) {
      const u32 stage = ring.wait();
      const int valid = min(walk.tokens - block * kBlockTokens, kBlockTokens);
      if (valid < kBlockTokens) clear_values(stage + kRunBytes, valid);
      accumulator.add(queries, stage, stage + kRunBytes, valid, scale);
      fetch();
    }
    accumulator.finish();
    publish(shared, accumulator);
    __syncthreads();

    // The pair's place on the line of all blocks says which thread blocks hold its parts.
    const int start = blockIdx.x * share.share + walk.position - walk.begin;
    const int first = start / share.share;
    const int parts = (start + walk.blocks() - 1) / share.share - first + 1;
    const int slot = 2 * blockIdx.x + (walk.begin == 0);
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM / 4; i += kThreads) {
      const int head = i / (HEAD_DIM / 4), d = i % (HEAD_DIM / 4) * 4;
      Partial all = shared.partial[0][head];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) all.max = fmaxf(all.max, shared.partial[w][head].max);
      all.sum = 0.f;
      float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const Partial part = shared.partial[w][head];
        const float factor = exp2_fast(part.max - all.max);
        all.sum += factor * part.sum;
        add_scaled(sum, factor, *reinterpret_cast<const float4*>(&shared.out[w][head][d]));
      }
      if (parts == 1) {
        store_out(out + target, head, d, sum, out_scale / all.sum);
      } else {
        *reinterpret_cast<float4*>(partials + (static_cast<i64>(slot) * GROUP + head) * HEAD_DIM +
                                   d) = sum;
        if (d == 0) partial_sums[slot * GROUP + head] = all;
      }
    }

    if (parts > 1) {
      __syncthreads();
      if (threadIdx.x == 0) shared.last = arrive(arrivals + first) == parts - 1;
      __syncthreads();
      if (shared.last) {
        if (threadIdx.x == 0) arrivals[first] = 0;
        for (int i = threadIdx.x; i < GROUP * HEAD_DIM / 4; i += kThreads) {
          const int head = i / (HEAD_DIM / 4), d = i % (HEAD_DIM / 4) * 4;
          // The pair begins in `first`, in its second slot, and goes on in the first ones.
          const auto slot_of = [&](int part) { return 2 * (first + part) + (part == 0); };
          Partial all = {-CUDART_INF_F, 0.f};
          float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
          for (int part = 0; part < parts; ++part) {
            const i64 at = static_cast<i64>(slot_of(part)) * GROUP + head;
            const float2 one = __ldcg(reinterpret_cast<const float2*>(partial_sums + at));
            const float4 x = __ldcg(reinterpret_cast<const float4*>(partials + at * HEAD_DIM + d));
            const float top = fmaxf(all.max, one.x);
            const float before = exp2_fast(all.max - top), now = exp2_fast(one.x - top);
            all = {top, before * all.sum + now * one.y};
            sum = make_float4(before * sum.x, before * sum.y, before * sum.z, before * sum.w);
            add_scaled(sum, now, x);
          }
          store_out(out + target, head, d, sum, out_scale / all.sum);
        }
      }
    }
    __syncthreads();  // before the next pair's results take the shared memory
  } while (walk.advance(rows, num_kv_heads));
}
