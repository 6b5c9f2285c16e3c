// Decode attention: one query token a row against its paged KV, for all rows of a step.
//
// Flash-decoding (Dao et al. 2023) on an even cut: the KV blocks of all (row, KV head) pairs form
// one line, with a gap for what each pair costs by itself, and every thread block of a persistent
// grid takes an equal share of it, so that a batch's skew costs nothing. A warp takes every fourth
// block of the share through its own ring of copies, and multiplies with swapped operands: the 16
// keys of a block are the rows of the tensor core's tile, the query heads of the KV head its 8
// columns. Warps meet where a pair ends; a pair that spans thread blocks is finished by whichever
// arrives last, in the fixed order of its parts, so that results do not depend on timing.
//
// Macros beside those of attention.cuh: STAGES of a warp's ring, MIN_BLOCKS_PER_SM.
#include "block_ring.cuh"
#include "decode_tile.cuh"

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kRingBytes = block_ring_bytes(kWarps, STAGES, kRunBytes);
// What a thread block reads at most where the L2 is spared.
constexpr int kSparing = 3 << 20;
constexpr int kPadded = HEAD_DIM + 4;  // floats of a head in shared memory: no bank conflicts

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
__device__ __forceinline__ DecodeRow load_row(const DecodeRow* from) {
  const int4 row = __ldcg(reinterpret_cast<const int4*>(from));
  return {row.x, row.y, row.z, row.w};
}

// A walk over the segments of a share: runs of blocks of one (row, KV head).
struct Walk {
  int row, head, begin, end, table_row, tokens, query;
  int position;  // of `begin` in the share
  int dealt;     // blocks of the share before `begin`
  int length;    // of the share

  __device__ explicit Walk(const DecodeShare& share)
      : row(share.row), head(share.head), begin(max(share.block, 0)), table_row(share.table_row),
        tokens(share.tokens), query(share.query), position(max(-share.block, 0)), dealt(0),
        length(share.length) {
    take();
  }
  __device__ int blocks() const { return (tokens + kBlockTokens - 1) / kBlockTokens; }
  __device__ int tokens_in(int block) const {
    return min(tokens - block * kBlockTokens, kBlockTokens);
  }
  __device__ void take() { end = min(blocks(), begin + length - position); }
  // False when the share is done.
  __device__ bool advance(const DecodeRow* rows, int num_kv_heads, int gap) {
    dealt += end - begin;
    position += end - begin + gap;
    if (position >= length) return false;
    if (++head == num_kv_heads) {
      head = 0;
      const DecodeRow next = load_row(rows + ++row);
      table_row = next.table_row;
      tokens = next.tokens;
      query = next.query;
    }
    begin = 0;
    take();
    return true;
  }
  // The first block of the segment that is warp `warp`'s: blocks are dealt out in turn.
  __device__ int first(int warp) const { return begin + ((warp - dealt) & (kWarps - 1)); }
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
                       const DecodeRow* rows, int table_stride, int num_kv_heads, int gap,
                       i64 block_bytes) {
    while (!done && block >= walk.end) {
      done = !walk.advance(rows, num_kv_heads, gap);
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
    ring.fetch(keys + offset, values + offset, walk.tokens_in(block));
    block += kWarps;
  }
};

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
                     int num_kv_heads, int block_bytes, int table_stride, int gap, float scale) {
  extern __shared__ __align__(1024) u8 memory[];
  BlockRing<kWarps, STAGES, kRunBytes> ring(shared_address(memory));
  Shared& shared = *reinterpret_cast<Shared*>(memory + kRingBytes);

  let_next_start();
  // The plan was there before the kernel before this one began (attention_plan.cu), and so was all
  // of the cache but the step's own tokens.
  const DecodeShare share = load_share(shares + blockIdx.x);
  // All blocks together would drive out of the L2 what the next kernels read, attention's own
  // results among it. Where they are so many that this matters little, they are read faster if
  // they may.
  if (share.share < kSparing / (2 * kRunBytes)) ring.spare_l2();
  Walk walk(share);
  Fetcher fetcher(share, block_table, table_stride);
  const auto fetch = [&] {
    fetcher.next(ring, keys, values, block_table, rows, table_stride, num_kv_heads, gap,
                 block_bytes);
  };
  int fetched = 0;
#pragma unroll 1
  for (; fetched < STAGES && fetcher.next_is_old(); ++fetched) fetch();
  wait_for_previous();
  if (share.length == 0) return;
#pragma unroll 1
  for (; fetched < STAGES; ++fetched) fetch();

  scale *= kLog2e * (KV_FP8 ? *k_scale : 1.f);
  const float out_scale = KV_FP8 ? *v_scale : 1.f;
  const int q_stride = num_kv_heads * GROUP * HEAD_DIM;
  Partial* const partial_sums =
      reinterpret_cast<Partial*>(partials + static_cast<i64>(gridDim.x) * 2 * GROUP * HEAD_DIM);
  Queries queries;
  Accumulator accumulator;
  const auto load_queries = [&] {
    const i64 at = static_cast<i64>(walk.query) * q_stride + walk.head * (GROUP * HEAD_DIM);
    queries.load(q + at);
    return at;
  };
  i64 target = load_queries();

  for (bool more = true; more;) {
    accumulator.clear();
    for (int block = walk.first(threadIdx.x / 32); block < walk.end; block += kWarps) {
      const u32 stage = ring.wait();
      const int valid = walk.tokens_in(block);
      if (valid < kBlockTokens) clear_values(stage + kRunBytes, valid);
      accumulator.add(queries, stage, stage + kRunBytes, valid, scale);
      fetch();
    }
    accumulator.finish();

    // The pair's place on the line of all blocks says which thread blocks hold its parts.
    const int start = blockIdx.x * share.share + walk.position - walk.begin;
    const int first = start / share.share;
    const int parts = (start + walk.blocks() - 1) / share.share - first + 1;
    const int slot = 2 * blockIdx.x + (walk.begin == 0);
    SCALAR* const pair_out = out + target;
    publish(shared, accumulator);
    // What the next pair needs is asked for before this one's results meet.
    more = walk.advance(rows, num_kv_heads, gap);
    if (more) target = load_queries();
    __syncthreads();

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
        store_out(pair_out, head, d, sum, out_scale / all.sum);
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
          store_out(pair_out, head, d, sum, out_scale / all.sum);
        }
      }
    }
    __syncthreads();  // before the next pair's results take the shared memory
  }
}
