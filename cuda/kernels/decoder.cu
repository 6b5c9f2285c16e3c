// All layers of a decoder for the few tokens of a decode step, by one grid that stays on the
// device.
//
// A step of one sequence reads every weight once and does little with it: what it costs beyond the
// reading is waiting, five times a layer. Here nothing waits but who must. Producer warps stream
// the thread block's rows of all weights, and its pieces of the KV cache, through deep rings in
// shared memory, in the order of their use over all layers, without regard to where the arithmetic
// is. Consumer warps take x from the mailbox (mailbox.cuh), where it arrives without a barrier.
//
// The rows of the residual that a block's products add to are its own in all layers, so it stays
// in shared memory.
#include "decoder_attention.cuh"
#include "decoder_product.cuh"

using Qkv = Product<kQkvWidth, HIDDEN, QKV_ROWS, true, false>;
using Output = Product<HIDDEN, kAttended, OUTPUT_ROWS, false, false>;
using GateUp = Product<INNER, HIDDEN, GATE_UP_ROWS, true, true>;
using Down = Product<HIDDEN, INNER, DOWN_ROWS, false, false>;

// The mailbox: words of the step's tensors, [ROWS][width / 2] each.
struct Mail {
  u64 *x, *qkv, *attended, *middle, *inner, *parts;

  __device__ explicit Mail(u64* base)
      : x(base), qkv(x + ROWS * (HIDDEN / 2)), attended(qkv + ROWS * (kQkvWidth / 2)),
        middle(attended + ROWS * (kAttended / 2)), inner(middle + ROWS * (HIDDEN / 2)),
        parts(inner + ROWS * (INNER / 2)) {}
};

// The small vectors of a layer, to L2 before anyone waits for them: a few lines a block.
__device__ __forceinline__ void prefetch_norms(const Layer& layer) {
  constexpr int lines = (HIDDEN * 2 + 127) / 128;
  const auto prefetch = [](const SCALAR* p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
  };
  for (int i = blockIdx.x * 32 + threadIdx.x % 32; i < 2 * lines + 2; i += GRID * 32) {
    if (i < 2 * lines)
      prefetch((i < lines ? layer.input_norm : layer.post_norm) + i % lines * 64);
    else if (QK_NORM)
      prefetch(i == 2 * lines ? layer.q_norm : layer.k_norm);
  }
}

// Producers wait for the plan of attention, consumers do not wait for them.
template <bool Wait> __device__ __forceinline__ void sync_plan() {
  constexpr int threads = WARPS * 32 + PRODUCERS * 32;
  if (Wait)
    asm volatile("bar.sync 2, %0;" ::"n"(threads) : "memory");
  else
    asm volatile("bar.arrive 2, %0;" ::"n"(threads) : "memory");
}

// Takes the rows' embedding into the residual, and posts this block's share.
__device__ __forceinline__ void embed(Shared& shared, u64* x, u32 tag, const SCALAR* table,
                                      const int* tokens, int count, int vocab) {
  const Tile mine = Output::share();
#pragma unroll 1
  for (int j = threadIdx.x; j < ROWS * mine.count; j += WARPS * 32) {
    const int r = j % ROWS, pair = j / ROWS, token = r < count ? tokens[r] : -1;
    u32 value = 0;
    if (token >= 0 && token < vocab)
      value = __ldg(reinterpret_cast<const u32*>(table + static_cast<i64>(token) * HIDDEN) +
                    mine.first + pair);
    shared.residual[r][pair] = value;
    post(x + r * (HIDDEN / 2) + mine.first + pair, value, tag);
  }
}

__device__ __forceinline__ u32 add_to_residual(u32& residual, float2 y) {
  const float2 old = unpack<SCALAR>(residual);
  return residual = pack<SCALAR>(y.x + old.x, y.y + old.y);
}

// Grid: GRID thread blocks, all resident. P = num_tokens, at most ROWS: hidden [P, HIDDEN];
// embedding [vocab, HIDDEN]; tokens, positions, slots, rows, kv_len [P] and q_start [P + 1] as
// Batch has them; cos_sin [positions, HEAD_DIM]; mailbox: zeros at first; epoch: one word, zero at
// first, for all launches that share the mailbox.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    decoder(SCALAR* hidden, const SCALAR* embedding, const int* tokens, const int* positions,
            const int* slots, const int* rows, const int* q_start, const int* kv_len,
            const int* block_table, const float* cos_sin, const Layer* layers,
            u64* mailbox, u32* epoch, i64 block_elements,
            int num_tokens, int vocab, int table_stride, float scale, float eps) {
  extern __shared__ __align__(1024) u8 memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int warp = threadIdx.x / 32;
  if (threadIdx.x < WARPS) shared.barriers[threadIdx.x].init();
  if (threadIdx.x < ROWS) shared.rows[threadIdx.x] = {};
  for (int i = threadIdx.x; i < LAYERS; i += kThreads) shared.layers[i] = layers[i];
  __syncthreads();
  if (warp >= WARPS) {
    Producer producer;
    producer.first = (warp - WARPS) * kConsumersEach;
#pragma unroll 1
    for (int l = 0; l < LAYERS; ++l) {
      const Layer& layer = shared.layers[l];
      Qkv::produce(producer, shared, layer.qkv);
      if (l == 0) {
        wait_for_previous();
        sync_plan<true>();
      }
      if (warp == WARPS && l + 1 < LAYERS) prefetch_norms(shared.layers[l + 1]);
      produce_kv(producer, shared, layer, block_table, table_stride, block_elements);
      Output::produce(producer, shared, layer.output);
      GateUp::produce(producer, shared, layer.gate_up);
      Down::produce(producer, shared, layer.down);
    }
    return;
  }

  wait_for_previous();
  if (threadIdx.x < num_tokens) {
    const int begin = q_start[threadIdx.x];
    if (q_start[threadIdx.x + 1] == begin + 1)
      shared.rows[begin] = {kv_len[threadIdx.x] + 1, rows[threadIdx.x], slots[begin],
                            positions[begin], 0, 0};
  }
  sync_consumers();
  if (warp == 0) plan_pieces(shared);
  sync_plan<false>();

  const u32 first_tag = *epoch + 1;
  const Mail mail(mailbox);
  Consumer consumer;
  consumer.warp = warp;
  const AttentionInput attention = {mail.qkv, cos_sin, eps, scale * kLog2e, block_elements};
  const int first_hidden = Output::share().first;
  embed(shared, mail.x, first_tag, embedding, tokens, num_tokens, vocab);

#pragma unroll 1
  for (int l = 0; l < LAYERS; ++l) {
    const Layer& layer = shared.layers[l];
    const u32 tag = first_tag + l;
    const int first_qkv = Qkv::share().first, first_inner = GateUp::share().first;
    Qkv::consume(consumer, shared, mail.x, tag, layer.input_norm, eps,
                 [&](int r, int pair, float2 y, float2) {
                   post(mail.qkv + r * (kQkvWidth / 2) + first_qkv + pair, pack<SCALAR>(y.x, y.y),
                        tag);
                 });
    consume_attention(consumer, shared, layer, tag, attention, mail.attended, mail.parts);
    Output::consume(consumer, shared, mail.attended, tag, nullptr, eps,
                    [&](int r, int pair, float2 y, float2) {
                      post(mail.middle + r * (HIDDEN / 2) + first_hidden + pair,
                           add_to_residual(shared.residual[r][pair], y), tag);
                    });
    GateUp::consume(consumer, shared, mail.middle, tag, layer.post_norm, eps,
                    [&](int r, int pair, float2 gate, float2 up) {
                      post(mail.inner + r * (INNER / 2) + first_inner + pair,
                           pack<SCALAR>(silu(gate.x) * up.x, silu(gate.y) * up.y), tag);
                    });
    Down::consume(consumer, shared, mail.inner, tag, nullptr, eps,
                  [&](int r, int pair, float2 y, float2) {
                    const u32 sum = add_to_residual(shared.residual[r][pair], y);
                    if (l + 1 < LAYERS)
                      post(mail.x + r * (HIDDEN / 2) + first_hidden + pair, sum, tag + 1);
                    else if (r < num_tokens)
                      reinterpret_cast<u32*>(hidden)[r * (HIDDEN / 2) + first_hidden + pair] = sum;
                  });
  }
  // Every block has read the epoch: this one's last product needed all of them.
  if (blockIdx.x == 0 && threadIdx.x == 0) *epoch = first_tag + LAYERS;
}
