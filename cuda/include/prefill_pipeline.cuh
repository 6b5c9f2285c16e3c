// What attention_prefill_wgmma.cu multiplies and how it gets there: the tiles of a thread block, the
// buffers in shared memory, and the warps that fill them.
//
// Keys, values and queries each have a ring of buffers with two barriers: `full` when the copies
// have landed, `empty` when every warp that multiplies has let go.
#pragma once
#include "async_copy.cuh"
#include "attention.cuh"

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
constexpr int kQueryBuffers = HEAD_DIM > 128 ? 1 : 3;
constexpr int kQueryColumnBytes = kGroupRows * 128;
constexpr int kQueryGroupBytes = kColumns * kQueryColumnBytes;
constexpr int kQueryBytes = 2 * kQueryGroupBytes;
constexpr int kQueryThreads = 64;
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

// The items of a thread block: (tile, KV head). The list falls from the longest to the shortest and
// is dealt out there and back, so that every thread block gets as much; a thread block takes from
// both ends of its share in turn, since short items want memory, for queries and output, and long
// ones arithmetic. The item after the current one is read ahead.
class Items {
 public:
  PrefillTile tile;
  int head;

  // The grid is no larger than the list can be.
  __device__ Items(const PrefillTile* tiles, int num_kv_heads)
      : tiles_(tiles), num_kv_heads_(num_kv_heads) {
    ahead_ = tiles[blockIdx.x / num_kv_heads];
    head_ahead_ = blockIdx.x % num_kv_heads;
    items_ = ahead_.count * num_kv_heads;
    rounds_ = (items_ + gridDim.x - 1) / gridDim.x;
  }
  __device__ bool next() {
    tile = ahead_;
    head = head_ahead_;
    if (tile.queries == 0) return false;
    int item = item_of(++turn_);
    if (item >= items_) item = item_of(++turn_);  // the last round, taken second, is not full
    if (turn_ < rounds_)
      ahead_ = tiles_[item / num_kv_heads_];
    else
      ahead_.queries = 0;
    head_ahead_ = item % num_kv_heads_;
    return true;
  }
  // The tile after the current one; no queries: there is none.
  __device__ const PrefillTile& ahead() const { return ahead_; }
  __device__ int sequence_keys() const { return tile.cached + tile.queries; }
  // The tiles of keys of an item: from first() up to end().
  __device__ int first() const { return first_of(tile); }
  __device__ int end() const {
    return SPLIT_KEYS ? key_tiles(tile) * (tile.part + 1) / tile.parts : key_tiles(tile);
  }
  __device__ static int first_of(const PrefillTile& t) {
    return SPLIT_KEYS ? key_tiles(t) * t.part / t.parts : 0;
  }

 private:
  __device__ static int key_tiles(const PrefillTile& t) {
    const int last = (t.tile * kTileRows + kTileRows + GROUP - 1) / GROUP;
    return (t.cached + min(t.queries, last) + kTileKeys - 1) / kTileKeys;
  }
  __device__ int item_of(int turn) const {
    const int round = turn & 1 ? rounds_ - 1 - turn / 2 : turn / 2;
    return round * gridDim.x + (round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  }

  const PrefillTile* tiles_;
  int num_kv_heads_, items_, rounds_, turn_ = 0;
  PrefillTile ahead_;
  int head_ahead_;
};

// Brings keys or values: one warp. `stages`, `full` and `empty` are those of the first stage.
__device__ __forceinline__ void produce_blocks(Items items, u32 stages, u32 full, u32 empty,
                                               const u8* cache, const int* block_table,
                                               i64 block_bytes, int table_stride) {
  const int lane = threadIdx.x % 32, local = lane / kColumns, column = lane % kColumns;
  const auto block_of = [&](const PrefillTile& tile, int block) {
    const bool there = local < kTileBlocks && block * kBlockTokens < tile.cached + tile.queries;
    return there ? block_table[static_cast<i64>(tile.table_row) * table_stride + block] : 0;
  };
  stages += column * kColumnBytes + local * kRunColumnBytes;
  cache += column * kRunColumnBytes;
  RingPlace<kStages> stage;
  stage.parity = 1;
  int id = 0;
#pragma unroll 1
  for (bool first = true; items.next(); first = false) {
    const int blocks = (items.sequence_keys() + kBlockTokens - 1) / kBlockTokens;
    const int end = items.end();
    const u8* head = cache + items.head * kRunBytes;
    if (first) id = block_of(items.tile, items.first() * kTileBlocks + local);
#pragma unroll 1
    for (int j = items.first(); j < end; ++j) {
      const int here = min(kTileBlocks, blocks - j * kTileBlocks);
      const u8* from = head + id * block_bytes;
      // The entries of the tile to come, be it another item's first, arrive behind this one.
      if (j + 1 < end)
        id = block_of(items.tile, (j + 1) * kTileBlocks + local);
      else if (items.ahead().queries != 0)
        id = block_of(items.ahead(), Items::first_of(items.ahead()) * kTileBlocks + local);
      const u32 barrier = full + stage.index * 8;
      barrier_wait(empty + stage.index * 8, stage.parity);
      if (lane == 0) barrier_expect(barrier, here * kRunBytes);
      __syncwarp();
      if (local < here) bulk_copy(stages + stage.index * kTileBytes, from, kRunColumnBytes, barrier);
      stage.advance();
    }
  }
}

// Brings queries in the swizzled order, the last one again behind it: two warps, a thread always the
// same 16 bytes of a row. They go on to the next item while these copies are under way: what
// multiplies must fence_async_proxy() when they are there.
__device__ __forceinline__ void produce_queries(Items items, Addresses at, const SCALAR* q,
                                                int q_stride) {
  constexpr int kChunks = HEAD_DIM / 8, kRowsAtOnce = kQueryThreads / kChunks;
  const int thread = threadIdx.x - 64, chunk = thread % kChunks;
  RingPlace<kQueryBuffers> buffer;
  buffer.parity = 1;
  while (items.next()) {
    const SCALAR* const from = q + static_cast<i64>(items.tile.query) * q_stride +
                               items.head * (GROUP * HEAD_DIM) + chunk * 8;
    const u32 to = at.query(buffer.index) + chunk / 8 * kQueryColumnBytes;
    barrier_wait(at.query_empty(buffer.index), buffer.parity);
#pragma unroll 4
    for (int row = thread / kChunks; row < kTileRows; row += kRowsAtOnce) {
      const int m = items.tile.tile * kTileRows + row;
      const int token = min(m / GROUP, items.tile.queries - 1);
      cp_async_16(to + row / kGroupRows * kQueryGroupBytes + row % kGroupRows * 128 +
                      ((chunk ^ row) & 7) * 16,
                  from + static_cast<i64>(token) * q_stride + m % GROUP * HEAD_DIM);
    }
    barrier_arrive_after_copies(at.query_full(buffer.index));
    buffer.advance();
  }
}
