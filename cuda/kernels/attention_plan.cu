// The work lists of a step's attention, made once for all layers: one thread block.
//
// Decode rows (one query token) are cut into equal shares of KV blocks, whatever the rows' lengths.
// Rows with more tokens are cut into tiles of query rows, the longest first, so that thread blocks
// that take them in turn end together. Padding rows (no token) appear in neither list.
#define GROUP 1
#define HEAD_DIM 64
#define KV_FP8 0
#define SCALAR __half
#include "attention.cuh"

constexpr int kThreads = 1024;
constexpr int kMaxRows = 4096;
constexpr int kBins = kThreads;

struct Counts {
  int decodes, blocks, tiles;

  __device__ Counts operator+(const Counts& x) const {
    return {decodes + x.decodes, blocks + x.blocks, tiles + x.tiles};
  }
};

__device__ __forceinline__ Counts shuffle_up(const Counts& x, int distance) {
  return {__shfl_up_sync(0xffffffffu, x.decodes, distance),
          __shfl_up_sync(0xffffffffu, x.blocks, distance),
          __shfl_up_sync(0xffffffffu, x.tiles, distance)};
}

// The sum over all threads up to this one and, in `total`, over all.
__device__ Counts block_scan(Counts x, Counts& total) {
  __shared__ Counts warps[32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int distance = 1; distance < 32; distance *= 2) {
    const Counts below = shuffle_up(x, distance);
    if (lane >= distance) x = x + below;
  }
  __syncthreads();
  if (lane == 31) warps[warp] = x;
  __syncthreads();
  Counts before = {0, 0, 0};
  total = {0, 0, 0};
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) before = before + warps[w];
    total = total + warps[w];
  }
  return before + x;
}

// The last index below `count` whose prefix is at most `value`.
__device__ __forceinline__ int find(const int* prefix, int count, i64 value, int factor) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (static_cast<i64>(prefix[middle]) * factor <= value)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

__device__ __forceinline__ int cdiv(int a, int b) { return (a + b - 1) / b; }

// Keys that the last token of a tile sees.
__device__ __forceinline__ int tile_keys(int queries, int cached, int tile, int tile_rows,
                                         int group) {
  return cached + min(queries, cdiv((tile + 1) * tile_rows, group));
}

extern "C" __global__ void __launch_bounds__(kThreads)
    attention_plan(const int* rows, const int* q_start, const int* kv_len, DecodeShare* shares,
                   DecodeRow* decode_rows, PrefillTile* tiles, int num_rows, int num_shares,
                   int max_tiles, int num_kv_heads, int group, int tile_rows, int min_share) {
  __shared__ int block_prefix[kMaxRows];
  __shared__ int tile_prefix[kMaxRows];
  __shared__ int bins[kBins];
  __shared__ int max_keys;
  const int thread = threadIdx.x;
  if (thread == 0) max_keys = 1;
  bins[thread] = 0;
  wait_for_previous();
  __syncthreads();

  Counts sum = {0, 0, 0};
  for (int base = 0; base < num_rows; base += kThreads) {
    const int r = base + thread;
    Counts mine = {0, 0, 0};
    DecodeRow row = {};
    if (r < num_rows) {
      const int begin = q_start[r], queries = q_start[r + 1] - begin;
      row = {begin, rows[r], kv_len[r] + queries, 0};
      if (queries == 1) {
        mine = {1, cdiv(row.tokens, kBlockTokens), 0};
      } else if (queries > 1) {
        mine = {0, 0, cdiv(queries * group, tile_rows)};
        atomicMax(&max_keys, row.tokens);
      }
    }
    Counts total;
    const Counts upto = sum + block_scan(mine, total);
    if (mine.decodes) {
      decode_rows[upto.decodes - 1] = row;
      block_prefix[upto.decodes - 1] = upto.blocks - mine.blocks;
    }
    if (r < num_rows) tile_prefix[r] = upto.tiles - mine.tiles;
    sum = sum + total;
  }
  __syncthreads();

  const i64 all_blocks = static_cast<i64>(sum.blocks) * num_kv_heads;
  const int share = max(min_share, static_cast<int>((all_blocks + num_shares - 1) / num_shares));
  for (int c = thread; c < num_shares; c += kThreads) {
    const i64 begin = static_cast<i64>(c) * share;
    DecodeShare s = {};
    if (begin < all_blocks) {
      s.row = find(block_prefix, sum.decodes, begin, num_kv_heads);
      const DecodeRow row = decode_rows[s.row];
      const int blocks = cdiv(row.tokens, kBlockTokens);
      const int local = static_cast<int>(begin - static_cast<i64>(block_prefix[s.row]) * num_kv_heads);
      s.head = local / blocks;
      s.block = local % blocks;
      s.blocks = static_cast<int>(min(static_cast<i64>(share), all_blocks - begin));
      s.table_row = row.table_row;
      s.tokens = row.tokens;
      s.query = row.query;
      s.share = share;
    }
    shares[c] = s;
  }

  // Counting sort by falling cost; the order within a bin does not matter.
  const int count = min(sum.tiles, max_tiles);
  for (int pass = 0; pass < 2; ++pass) {
    for (int i = thread; i < count; i += kThreads) {
      const int r = find(tile_prefix, num_rows, i, 1);
      const int begin = q_start[r], queries = q_start[r + 1] - begin, cached = kv_len[r];
      const int tile = i - tile_prefix[r];
      const int keys = tile_keys(queries, cached, tile, tile_rows, group);
      const int bin = static_cast<int>(static_cast<i64>(max_keys - keys) * (kBins - 1) / max_keys);
      const int place = atomicAdd(bins + bin, 1);
      if (pass == 1) tiles[place] = {begin, queries, cached, rows[r], tile, count, {}};
    }
    __syncthreads();
    if (pass == 0) {
      const Counts mine = {bins[thread], 0, 0};
      Counts total;
      bins[thread] = block_scan(mine, total).decodes - mine.decodes;
      __syncthreads();
    }
  }
  for (int i = count + thread; i < max_tiles; i += kThreads) tiles[i] = {};
}
