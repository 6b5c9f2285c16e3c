// The work lists of a step's attention, made once for all layers: one thread block.
//
// Decode rows (one query token) are cut into equal shares of KV blocks, whatever the rows' lengths,
// where each pair of a row and a KV head counts as `gap` blocks more than it has. Rows with more
// tokens are cut into tiles of query rows, the longest first, so that thread blocks that take them
// in turn end together; a tile with far more keys than a thread block's even share (a short chunk
// behind a long prefix) is cut along its keys too. Padding rows (no token) appear in neither list.
#define GROUP 1
#define HEAD_DIM 64
#define KV_FP8 0
#define SCALAR __half
#include "attention.cuh"

constexpr int kThreads = 1024;
constexpr int kMaxRows = 4096;
constexpr int kBins = kThreads;
constexpr int kMinKeyTiles = 8;  // of a part of a tile: fewer would only be merged again

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
__device__ __forceinline__ int tile_keys_seen(const PrefillTile& t, int tile_rows, int group) {
  return t.cached + min(t.queries, cdiv((t.tile + 1) * tile_rows, group));
}

// `tile_keys`: keys that the prefill kernel takes at a time; `num_blocks`: its thread blocks, 0 if
// it cannot merge parts of a tile.
extern "C" __global__ void __launch_bounds__(kThreads)
    attention_plan(const int* rows, const int* q_start, const int* kv_len, DecodeShare* shares,
                   DecodeRow* decode_rows, PrefillTile* tiles, int num_rows, int num_shares,
                   int max_tiles, int num_kv_heads, int group, int tile_rows, int tile_keys,
                   int num_blocks, int min_share, int gap) {
  __shared__ int block_prefix[kMaxRows];
  __shared__ int tile_prefix[kMaxRows];
  __shared__ int bins[kBins];
  __shared__ int max_keys, all_tiles, slots;
  const int thread = threadIdx.x;
  if (thread == 0) {
    max_keys = 1;
    all_tiles = slots = 0;
  }
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
        mine = {1, cdiv(row.tokens, kBlockTokens) + gap, 0};
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

  const i64 line = static_cast<i64>(sum.blocks) * num_kv_heads;
  const int share = max(min_share, static_cast<int>((line + num_shares - 1) / num_shares));
  for (int c = thread; c < num_shares; c += kThreads) {
    const i64 begin = static_cast<i64>(c) * share;
    DecodeShare s = {};
    if (begin < line) {
      s.row = find(block_prefix, sum.decodes, begin, num_kv_heads);
      const DecodeRow row = decode_rows[s.row];
      const int places = gap + cdiv(row.tokens, kBlockTokens);
      const int local = static_cast<int>(begin - static_cast<i64>(block_prefix[s.row]) * num_kv_heads);
      s.head = local / places;
      s.block = local % places - gap;
      s.length = static_cast<int>(min(static_cast<i64>(share), line - begin));
      s.table_row = row.table_row;
      s.tokens = row.tokens;
      s.query = row.query;
      s.share = share;
    }
    shares[c] = s;
  }

  if (max_tiles > 0) {  // else every row has one token
    // Counting sort by falling cost; the order within a bin does not matter.
    const auto tile_of = [&](int i) {
      const int r = find(tile_prefix, num_rows, i, 1);
      const int begin = q_start[r];
      return PrefillTile{begin, q_start[r + 1] - begin, kv_len[r], rows[r], i - tile_prefix[r]};
    };
    const auto key_tiles = [&](const PrefillTile& t) {
      return cdiv(tile_keys_seen(t, tile_rows, group), tile_keys);
    };
    for (int i = thread; i < sum.tiles; i += kThreads) atomicAdd(&all_tiles, key_tiles(tile_of(i)));
    __syncthreads();
    const i64 all = static_cast<i64>(all_tiles) * num_kv_heads;
    const int even = num_blocks ? max(kMinKeyTiles, static_cast<int>((all + num_blocks - 1) / num_blocks))
                                : 1 << 29;
    const int most = cdiv(max_keys, tile_keys);
    int count = 0;
    for (int pass = 0; pass < 2; ++pass) {
      for (int i = thread; i < sum.tiles; i += kThreads) {
        PrefillTile tile = tile_of(i);
        const int cost = key_tiles(tile), parts = cost >= 2 * even ? cdiv(cost, even) : 1;
        const int bin = static_cast<int>(static_cast<i64>(most - cost / parts) * (kBins - 1) / most);
        const int place = atomicAdd(bins + bin, parts);
        if (pass == 0) continue;
        tile.count = count;
        tile.parts = parts;
        tile.slot = parts > 1 ? atomicAdd(&slots, parts) : 0;
        for (int part = 0; part < parts && place + part < max_tiles; ++part) {
          tile.part = part;
          tiles[place + part] = tile;
        }
      }
      __syncthreads();
      if (pass == 0) {
        const Counts mine = {bins[thread], 0, 0};
        Counts total;
        bins[thread] = block_scan(mine, total).decodes - mine.decodes;
        count = min(total.decodes, max_tiles);
        __syncthreads();
      }
    }
    for (int i = count + thread; i < max_tiles; i += kThreads) tiles[i] = {};
  }

  // Last of all, so that whatever starts after this kernel may read the plan, and what was written
  // before it, without waiting: attention asks for old keys and values while its queries are made.
  __threadfence();
  __syncthreads();
  let_next_start();
}
