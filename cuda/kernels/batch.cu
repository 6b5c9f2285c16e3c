// Takes a step's arena over from pinned memory and expands it into the tensors that kernels read.
// Sizes come from the arena's header on the device, grids from the padded sizes alone, so both kernels
// live in a CUDA graph.
//
// The layout's numbers (H_, P_, F_ and PARAM_WORDS) are macros, given by the one who packs it.
#include "common.cuh"

constexpr int kBlockTokens = 16;
constexpr int kTakeThreads = 1024;

// Grid: 1. Copies to `own`, which has the last step's arena, that of the step after it, from the one
// of two pinned arenas that holds it, and brings the device's tables up to date. Where neither does,
// `own` is used as it is. Each (row, index) and each row is named once. The way to pinned memory is
// long: it is gone twice, for the headers and for what one of them tells of. An L1 may hold what stood
// there two steps ago: all is read past it.
extern "C" __global__ void __launch_bounds__(kTakeThreads)
take_arena(int* own, int* block_table, int* params, const int* first, const int* second,
           int max_blocks) {
  __shared__ int headers[3][HEADER_WORDS];
  let_next_start();
  wait_for_previous();
  for (int i = threadIdx.x; i < 3 * HEADER_WORDS; i += kTakeThreads) {
    const int which = i / HEADER_WORDS, word = i % HEADER_WORDS;
    headers[which][word] = __ldcg((which == 0 ? own : which == 1 ? first : second) + word);
  }
  __syncthreads();
  // The one that is not due may be written to right now.
  const int due = (headers[0][H_STEP] + 1) & 0x7fffffff;
  const int which = headers[1][H_STEP] == due ? 1 : headers[2][H_STEP] == due ? 2 : 0;
  const int* const header = headers[which];
  const int* const arena = which == 0 ? own : which == 1 ? first : second;
  if (which != 0) {
    const uint4* const vectors = reinterpret_cast<const uint4*>(arena);
    for (int i = threadIdx.x; i < (header[H_NUM_WORDS] + 3) / 4; i += kTakeThreads)
      reinterpret_cast<uint4*>(own)[i] = __ldcg(vectors + i);
  }
  const int* const table = arena + header[H_TABLE_UPDATES];
  for (int i = threadIdx.x; i < header[H_NUM_TABLE_UPDATES]; i += kTakeThreads)
    block_table[i64(__ldcg(table + 3 * i)) * max_blocks + __ldcg(table + 3 * i + 1)] =
        __ldcg(table + 3 * i + 2);
  const int* const updates = arena + header[H_PARAM_UPDATES];
  for (int i = threadIdx.x; i < header[H_NUM_PARAM_UPDATES] * PARAM_WORDS; i += kTakeThreads) {
    const int row = __ldcg(updates + i / PARAM_WORDS * PARAM_WORDS + P_ROW);
    params[i64(row) * PARAM_WORDS + i % PARAM_WORDS] = __ldcg(updates + i);
  }
}

// The row whose tokens hold token t: the last one that starts at or before it. Empty rows that
// start there too come first, so the last is the one that is not empty.
__device__ __forceinline__ int row_of(const int* q_start, int rows, int t) {
  int low = 0, high = rows;  // q_start[low] <= t < q_start[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (q_start[middle] <= t ? low : high) = middle;
  }
  return low;
}

// Sampled rows in row order, by one thread block: a running count over chunks of 1,024 rows.
__device__ __forceinline__ void list_samples(int* sample_tokens, int* sample_rows,
                                             const int* arena, int num_samples, int pad_row) {
  __shared__ int warp_counts[32];
  const int num_rows = arena[H_NUM_ROWS];
  const int *rows = arena + arena[H_ROWS], *q_start = arena + arena[H_Q_START];
  const int* flags = arena + arena[H_FLAGS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  int done = 0;
  for (int base = 0; base < num_rows; base += blockDim.x) {
    const int r = base + threadIdx.x;
    const bool samples = r < num_rows && (flags[r] & F_SAMPLE);
    const u32 votes = __ballot_sync(0xffffffffu, samples);
    if (lane == 0) warp_counts[warp] = __popc(votes);
    __syncthreads();
    int at = done + __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < warps; ++w) {
      if (w < warp) at += warp_counts[w];
      done += warp_counts[w];
    }
    __syncthreads();
    if (samples && at < num_samples) {
      sample_tokens[at] = q_start[r + 1] - 1;
      sample_rows[at] = rows[r];
    }
  }
  for (int s = done + threadIdx.x; s < num_samples; s += blockDim.x) {
    sample_tokens[s] = 0;
    sample_rows[s] = pad_row;
  }
}

// Grid: max(1, ceil(num_tokens / 256)) blocks for the tokens, one for the rows, one for the
// samples. num_tokens, num_rows and num_samples are the padded P, R and S; pad_row is the row of
// padding. Reads the block table: after take_arena.
extern "C" __global__ void __launch_bounds__(256)
expand_batch(int* tokens, int* positions, int* slots, int* rows, int* q_start, int* kv_len,
             int* sample_tokens, int* sample_rows, const int* arena,
             const int* block_table, const int* last_token, int max_blocks, int num_tokens,
             int num_rows, int num_samples, int pad_row) {
  let_next_start();
  wait_for_previous();
  const int real_rows = arena[H_NUM_ROWS], real_tokens = arena[H_NUM_TOKENS];
  const int *in_rows = arena + arena[H_ROWS], *in_q_start = arena + arena[H_Q_START];
  const int *in_kv_len = arena + arena[H_KV_LEN], *in_flags = arena + arena[H_FLAGS];
  if (blockIdx.x == gridDim.x - 1) {
    list_samples(sample_tokens, sample_rows, arena, num_samples, pad_row);
    return;
  }
  if (blockIdx.x == gridDim.x - 2) {
    for (int r = threadIdx.x; r <= num_rows; r += 256) {
      const bool real = r < real_rows;
      q_start[r] = real ? in_q_start[r] : real_tokens;
      if (r == num_rows) break;
      rows[r] = real ? in_rows[r] : pad_row;
      kv_len[r] = real ? in_kv_len[r] : 0;
    }
    return;
  }
  const int t = blockIdx.x * 256 + threadIdx.x;
  if (t >= num_tokens) return;
  int token = 0, position = 0, slot = 0;
  if (t < real_tokens) {
    const int r = row_of(in_q_start, real_rows, t);
    const int row = in_rows[r];
    token = in_flags[r] & F_TOKEN_ON_DEVICE ? last_token[row] : arena[arena[H_TOKENS] + t];
    position = in_kv_len[r] + t - in_q_start[r];
    slot = block_table[i64(row) * max_blocks + position / kBlockTokens] * kBlockTokens +
           position % kBlockTokens;
  }
  tokens[t] = token;
  positions[t] = position;
  slots[t] = slot;
}
