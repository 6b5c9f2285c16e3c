// Attention of the resident decoder: one query token a row against its paged KV.
//
// The blocks of each (row, KV head) are cut into equal pieces, as many as there are thread blocks
// for. Old keys and values depend on nothing in this step, so they come through the warps' rings
// like weights; the step's own ones are normalized, rotated and put in their place by the piece
// that ends with them. Parts of a head meet through the mailbox and are merged, 16 elements of a
// head a warp, in a fixed order.
#pragma once
#include "decoder_shared.cuh"
#include "linear_finish.cuh"

constexpr int kSlotsEach = 2 * kRunBytes > SLOT_BYTES ? 2 : 1;  // slots of a block of KV
constexpr int kPartWords = GROUP * (HEAD_DIM + 2);              // of a piece in the mailbox
constexpr int kPairs = HEAD_DIM / 2;                            // words of a head in the mailbox

__device__ __forceinline__ int blocks_of(int tokens) {
  return (tokens + kBlockTokens - 1) / kBlockTokens;
}

// A run of blocks [begin, end) of one row and KV head.
struct Piece {
  int index, row, head, begin, end, blocks;

  __device__ __forceinline__ Piece(const Shared& shared, int index) : index(index), row(0) {
    while (row + 1 < ROWS && index >= shared.rows[row + 1].first_part) ++row;
    const Row& its = shared.rows[row];
    const u32 local = index - its.first_part, parts = its.parts;
    blocks = blocks_of(its.tokens);
    head = local / parts;
    const Tile mine = share_of(blocks, parts, local % parts);
    begin = mine.first;
    end = mine.first + mine.count;
  }
};

// Cuts the step's rows: the smallest pieces of which there are not more than thread blocks. By one
// warp; rows' tokens and first parts are in place.
__device__ __forceinline__ void plan_pieces(Shared& shared) {
  const int lane = threadIdx.x % 32;
  const int blocks = lane < ROWS ? blocks_of(shared.rows[lane].tokens) : 0;
  const auto sum = [](int x) { return __reduce_add_sync(0xffffffffu, x); };
  const int most = max(GRID, kKvHeads * sum(blocks > 0));
  int low = 1, high = max(1, __reduce_max_sync(0xffffffffu, blocks));
  while (low < high) {
    const int middle = (low + high) / 2;
    if (kKvHeads * sum((blocks + middle - 1) / middle) <= most)
      high = middle;
    else
      low = middle + 1;
  }
  const int parts = (blocks + low - 1) / low;
  int before = 0;
  for (int r = 0; r < ROWS; ++r) {
    const int its = __shfl_sync(0xffffffffu, parts, r);
    if (lane == r) {
      shared.rows[r].parts = parts;
      shared.rows[r].first_part = before;
    }
    before += kKvHeads * its;
  }
  if (lane == 0) shared.pieces = before;
}

// ---- the producers' side ----

__device__ __forceinline__ void copy_run(u32 to, const SCALAR* from) {
#pragma unroll
  for (int i = threadIdx.x % 32; i < kRunBytes / 16; i += 32)
    cp_async_16(to + i * 16, reinterpret_cast<const u8*>(from) + i * 16);
}

__device__ __forceinline__ void produce_kv(Producer& producer, Shared& shared, const Layer& layer,
                                           const int* block_table, int table_stride,
                                           i64 block_elements) {
#pragma unroll 1
  for (int i = blockIdx.x; i < shared.pieces; i += GRID) {
    const Piece piece(shared, i);
    const int* const table =
        block_table + static_cast<i64>(shared.rows[piece.row].table_row) * table_stride;
    int next[kConsumersEach];
#pragma unroll
    for (int c = 0; c < kConsumersEach; ++c)
      next[c] = __ldg(table + min(piece.begin + producer.first + c, piece.end - 1));
#pragma unroll 1
    for (int base = piece.begin; base < piece.end; base += WARPS) {
#pragma unroll
      for (int c = 0; c < kConsumersEach; ++c) {
        const int consumer = producer.first + c, block = base + consumer;
        if (block >= piece.end) continue;
        const i64 from = next[c] * block_elements + piece.head * (kRunBytes / 2);
        next[c] = __ldg(table + min(block + WARPS, piece.end - 1));
        Barriers& barriers = shared.barriers[consumer];
        barriers.acquire(producer.at[c]);
        u32 slot = shared_address(shared.slots[consumer][producer.at[c].index]);
        copy_run(slot, layer.keys + from);
        if constexpr (kSlotsEach == 2) {
          barriers.commit(producer.at[c]);
          barriers.acquire(producer.at[c]);
          slot = shared_address(shared.slots[consumer][producer.at[c].index]);
        } else {
          slot += kRunBytes;
        }
        copy_run(slot, layer.values + from);
        barriers.commit(producer.at[c]);
        producer.pace();
      }
    }
  }
}

// ---- the consumers' side ----

struct AttentionInput {
  const u64* qkv;        // mailbox: [ROWS][kQkvWidth / 2]
  const float* cos_sin;  // [positions][HEAD_DIM]
  float eps, scale;
  i64 block_elements;  // of the cache, from block to block
};

// One head of q, k or v by one warp: lane l holds elements 2l, 2l + 1 of either half.
struct Head {
  float2 low, high;

  __device__ static bool active() { return threadIdx.x % 32 < HEAD_DIM / 4; }

  __device__ __forceinline__ void receive_from(const u64* words, u32 tag) {
    const int lane = threadIdx.x % 32;
    low = high = {0.f, 0.f};
    if (active()) {
      One halves[2];
      receive(
          halves, tag, [&](int i) { return words + i * (kPairs / 2) + lane; },
          [](int) { return true; });
      low = unpack<SCALAR>(halves[0].data());
      high = unpack<SCALAR>(halves[1].data());
    }
  }
  __device__ __forceinline__ void normalize(float2 weight_low, float2 weight_high, float eps) {
    const float squares =
        warp_sum(low.x * low.x + low.y * low.y + high.x * high.x + high.y * high.y);
    const float factor = rsqrtf(squares / HEAD_DIM + eps);
    low.x *= factor * weight_low.x, low.y *= factor * weight_low.y;
    high.x *= factor * weight_high.x, high.y *= factor * weight_high.y;
  }
  __device__ __forceinline__ void rotate(float2 cosine, float2 sine) {
    const float2 a = low, b = high;
    low = {a.x * cosine.x - b.x * sine.x, a.y * cosine.y - b.y * sine.y};
    high = {b.x * cosine.x + a.x * sine.x, b.y * cosine.y + a.y * sine.y};
  }
  // To plain shared memory and, if `run` is not null, to row `row` of a cache block's run.
  __device__ __forceinline__ void store(SCALAR* to, SCALAR* run, int row) const {
    if (!active()) return;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 x = half ? high : low;
      const u32 pair = pack<SCALAR>(x.x, x.y);
      const int element = half * (HEAD_DIM / 2) + 2 * lane;
      *reinterpret_cast<u32*>(to + element) = pair;
      if (run != nullptr)
        *reinterpret_cast<u32*>(reinterpret_cast<u8*>(run) +
                                kv_layout::offset<kRowBytes>(row, element / 8) + element % 8 * 2) =
            pair;
    }
  }
};

// Brings a piece's query heads to shared memory and, where the piece ends the row, its new key and
// value there and to the cache.
__device__ __forceinline__ void stage_heads(const Consumer& consumer, Shared& shared,
                                            const Piece& piece, const Layer& layer, u32 tag,
                                            const AttentionInput& in) {
  const int lane = threadIdx.x % 32;
  const Row& row = shared.rows[piece.row];
  const bool newest = piece.end == piece.blocks;
  const u64* const words = in.qkv + piece.row * (kQkvWidth / 2);
  const auto load2 = [](const SCALAR* p) {
    return unpack<SCALAR>(__ldg(reinterpret_cast<const u32*>(p)));
  };
#pragma unroll 1
  for (int task = consumer.warp; task < GROUP + (newest ? 2 : 0); task += WARPS) {
    const bool is_value = task == GROUP + 1, is_key = task == GROUP;
    const int head = is_value ? HEADS + kKvHeads + piece.head
                     : is_key ? HEADS + piece.head
                              : piece.head * GROUP + task;
    float2 cosine = {}, sine = {}, weight_low = {}, weight_high = {};
    if (Head::active() && !is_value) {
      const float* const angles = in.cos_sin + static_cast<i64>(row.position) * HEAD_DIM + 2 * lane;
      cosine = __ldg(reinterpret_cast<const float2*>(angles));
      sine = __ldg(reinterpret_cast<const float2*>(angles + HEAD_DIM / 2));
      if (QK_NORM) {
        const SCALAR* const norm = (is_key ? layer.k_norm : layer.q_norm) + 2 * lane;
        weight_low = load2(norm), weight_high = load2(norm + HEAD_DIM / 2);
      }
    }
    Head x;
    x.receive_from(words + head * kPairs, tag);
    if (!is_value) {
      if (QK_NORM) x.normalize(weight_low, weight_high, in.eps);
      x.rotate(cosine, sine);
    }
    SCALAR* const to = is_value  ? shared.new_value
                       : is_key ? shared.new_key
                                : shared.queries[task];
    SCALAR* run = nullptr;
    if (task >= GROUP)
      run = (is_value ? layer.values : layer.keys) +
            row.slot / kBlockTokens * in.block_elements + piece.head * (kRunBytes / 2);
    x.store(to, run, row.slot % kBlockTokens);
  }
}

// Puts the step's own key or value in its place in a slot.
__device__ __forceinline__ void patch(u32 run, const SCALAR* fresh, int row) {
  const int lane = threadIdx.x % 32;
  if (lane < kRowBytes / 16) {
    const uint4 v = reinterpret_cast<const uint4*>(fresh)[lane];
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(
                     run + kv_layout::offset<kRowBytes>(row, lane)),
                 "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
  }
  __syncwarp();
}

// Posts the piece's share of the attention: the output itself if the row's head is one piece.
__device__ __forceinline__ void post_piece(const Shared& shared, const Piece& piece, u32 tag,
                                           u64* attended, u64* parts) {
  const int warps = min(WARPS, piece.end - piece.begin);
#pragma unroll 1
  for (int i = threadIdx.x; i < GROUP * kPairs; i += WARPS * 32) {
    const int head = i / kPairs, d = i % kPairs * 2;
    float factors[WARPS], top = -CUDART_INF_F, sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      factors[w] = w < warps ? shared.partial[w][head].max : -CUDART_INF_F;
      top = fmaxf(top, factors[w]);
    }
    float2 out = {0.f, 0.f};
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      if (w >= warps) continue;
      factors[w] = exp2_fast(factors[w] - top);
      sum += factors[w] * shared.partial[w][head].sum;
      const float2 x = *reinterpret_cast<const float2*>(&shared.out[w][head][d]);
      out.x += factors[w] * x.x, out.y += factors[w] * x.y;
    }
    out.x = __fdividef(out.x, sum), out.y = __fdividef(out.y, sum);
    if (shared.rows[piece.row].parts == 1) {
      post(attended + piece.row * (kAttended / 2) + (piece.head * GROUP + head) * kPairs + d / 2,
           pack<SCALAR>(out.x, out.y), tag);
      continue;
    }
    u64* const to = parts + piece.index * kPartWords;
    post_pair(to + head * HEAD_DIM + d, __float_as_uint(out.x), __float_as_uint(out.y), tag);
    if (d == 0) {
      const u32 weight = __float_as_uint(top + __log2f(sum));
      post_pair(to + GROUP * HEAD_DIM + 2 * head, weight, weight, tag);
    }
  }
}

// A mean of outputs, each of weight 2^top * sum.
struct Mean {
  float top = -CUDART_INF_F, sum = 0.f;
  float2 out = {0.f, 0.f};

  __device__ __forceinline__ void add(float its_top, float its_sum, float2 its) {
    const float next = fmaxf(top, its_top);
    if (next == -CUDART_INF_F) return;
    const float mine = exp2_fast(top - next), other = exp2_fast(its_top - next);
    top = next;
    sum = mine * sum + other * its_sum;
    out.x = mine * out.x + other * its.x, out.y = mine * out.y + other * its.y;
  }
};

// The outputs of heads from their parts: 16 elements a warp, every fourth part a lane.
__device__ __forceinline__ void merge_parts(const Shared& shared, u32 tag, u64* attended,
                                            const u64* parts) {
  constexpr int slices = HEAD_DIM / 16, batch = 4;
  const int lane = threadIdx.x % 32, quarter = lane % 4, warp = threadIdx.x / 32;
#pragma unroll 1
  for (int unit = blockIdx.x + GRID * warp; unit < ROWS * HEADS * slices; unit += GRID * WARPS) {
    const int r = unit / (HEADS * slices), head = unit / slices % HEADS;
    const int pair = unit % slices * 8 + lane / 4, count = shared.rows[r].parts;
    if (count == 1) continue;
    const u64* const from =
        parts + (shared.rows[r].first_part + head / GROUP * count) * kPartWords;
    const int value_at = head % GROUP * HEAD_DIM + 2 * pair;
    const int weight_at = GROUP * HEAD_DIM + 2 * (head % GROUP);
    Mean mean;
#pragma unroll 1
    for (int base = quarter; base < count; base += 4 * batch) {
      Two words[2 * batch];
      const auto real = [&](int i) { return base + 4 * (i % batch) < count; };
      receive(
          words, tag,
          [&](int i) {
            return from + (base + 4 * (i % batch)) * kPartWords +
                   (i < batch ? value_at : weight_at);
          },
          real);
#pragma unroll
      for (int b = 0; b < batch; ++b) {
        if (!real(b)) continue;
        const uint2 value = words[b].data();
        mean.add(__uint_as_float(words[batch + b].data().x), 1.f,
                 {__uint_as_float(value.x), __uint_as_float(value.y)});
      }
    }
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      const auto other = [&](float x) { return __shfl_xor_sync(0xffffffffu, x, distance); };
      mean.add(other(mean.top), other(mean.sum), {other(mean.out.x), other(mean.out.y)});
    }
    if (quarter == 0) {
      const float inverse = count == 0 ? 0.f : __fdividef(1.f, mean.sum);
      post(attended + r * (kAttended / 2) + head * kPairs + pair,
           pack<SCALAR>(mean.out.x * inverse, mean.out.y * inverse), tag);
    }
  }
}

__device__ __forceinline__ void consume_attention(Consumer& consumer, Shared& shared,
                                                  const Layer& layer, u32 tag,
                                                  const AttentionInput& in, u64* attended,
                                                  u64* parts) {
  const int warp = consumer.warp;
#pragma unroll 1
  for (int i = blockIdx.x; i < shared.pieces; i += GRID) {
    const Piece piece(shared, i);
    stage_heads(consumer, shared, piece, layer, tag, in);
    sync_consumers();
    if (piece.begin + warp < piece.end) {
      const int tokens = shared.rows[piece.row].tokens;
      Queries queries;
      Accumulator accumulator;
      queries.load(&shared.queries[0][0], kQueryPitch);
      accumulator.clear();
#pragma unroll 1
      for (int block = piece.begin + warp; block < piece.end; block += WARPS) {
        const u32 keys = shared_address(shared.slots[warp][consumer.at.index]);
        shared.barriers[warp].wait(consumer.at);
        RingPlace<SLOTS> after = consumer.at;
        after.advance();
        u32 values = keys + kRunBytes;
        if constexpr (kSlotsEach == 2) {
          values = shared_address(shared.slots[warp][after.index]);
          shared.barriers[warp].wait(after);
        }
        const int valid = min(tokens - block * kBlockTokens, kBlockTokens);
        if (block == piece.blocks - 1) {
          patch(keys, shared.new_key, valid - 1);
          if (valid < kBlockTokens) clear_values(values, valid);
          patch(values, shared.new_value, valid - 1);
        }
        accumulator.add(queries, keys, values, valid, in.scale);
        shared.barriers[warp].release(consumer.at);
        if constexpr (kSlotsEach == 2) shared.barriers[warp].release(consumer.at);
      }
      accumulator.finish();
      publish(shared, accumulator);
    }
    sync_consumers();
    post_piece(shared, piece, tag, attended, parts);
  }
  merge_parts(shared, tag, attended, parts);
}
