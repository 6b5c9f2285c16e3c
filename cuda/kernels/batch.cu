// Takes a step's arena over from pinned memory and expands it into the tensors that kernels read.
// Real sizes come from the arena's header on the device, so that the kernel lives in a CUDA graph.
//
// One thread block does it all, in one launch, since every step waits for it: the way to pinned memory
// is long and is gone once, and what comes from there is at hand in shared memory. Thousands of tokens
// take it 20 us, of a step of 30 ms.
//
// The layout's numbers (H_, P_, F_ and PARAM_WORDS) are macros, given by the one who packs it.
#include "common.cuh"

constexpr int kBlockTokens = 16;
constexpr int kThreads = 1024;

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

// Sampled rows in row order: a running count over chunks of as many rows as there are threads.
__device__ __forceinline__ void list_samples(int* sample_tokens, int* sample_rows,
                                             const int* header, const int* arena,
                                             int num_samples, int pad_row) {
  __shared__ int warp_counts[kThreads / 32];
  const int num_rows = header[H_NUM_ROWS];
  const int *rows = arena + header[H_ROWS], *q_start = arena + header[H_Q_START];
  const int* flags = arena + header[H_FLAGS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int done = 0;
  for (int base = 0; base < num_rows; base += kThreads) {
    const int r = base + threadIdx.x;
    const bool samples = r < num_rows && (flags[r] & F_SAMPLE);
    const u32 votes = __ballot_sync(0xffffffffu, samples);
    if (lane == 0) warp_counts[warp] = __popc(votes);
    __syncthreads();
    int at = done + __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w < warp) at += warp_counts[w];
      done += warp_counts[w];
    }
    __syncthreads();
    if (samples && at < num_samples) {
      sample_tokens[at] = q_start[r + 1] - 1;
      sample_rows[at] = rows[r];
    }
  }
  for (int s = done + threadIdx.x; s < num_samples; s += kThreads) {
    sample_tokens[s] = 0;
    sample_rows[s] = pad_row;
  }
}

// Grid: 1. `own` has the last step's arena. Copies to it that of the step after it, from the one of two
// pinned arenas that holds it, and brings the device's tables up to date; where neither does, `own` is
// used as it is. Each (row, index) and each row is named once. Then fills the padded tensors: num_tokens,
// num_rows and num_samples are P, R and S; pad_row is the row of padding. sample_positions and sample_slots
// may be null; padding of theirs is position 0 of slot 0.
//
// The first `ahead` vectors of both pinned arenas are asked for before it is known which one is due; the
// other may be written to right now. An L1 may hold what stood there two steps ago: they are read past
// it.
extern "C" __global__ void __launch_bounds__(kThreads)
take_batch(int* tokens, int* positions, int* slots, int* rows, int* q_start, int* kv_len,
           int* sample_tokens, int* sample_rows, int* sample_positions, int* sample_slots, int* own,
           int* block_table, int* params, const int* last_token, const int* first,
           const int* second, int ahead, int max_blocks, int num_tokens, int num_rows,
           int num_samples, int pad_row) {
  __shared__ uint4 near[kThreads];
  __shared__ int which;
  static_assert(H_STEP == 0, "the first thread has both steps' numbers");
  const auto vectors_of = [](const int* arena) { return reinterpret_cast<const uint4*>(arena); };
  const int thread = threadIdx.x;
  let_next_start();
  wait_for_previous();

  uint4 one{}, two{};
  u32 last = 0;
  if (thread == 0) last = __ldcg(own + H_STEP);
  if (thread < ahead) {
    one = __ldcg(vectors_of(first) + thread);
    two = __ldcg(vectors_of(second) + thread);
  }
  if (thread == 0) {
    const u32 due = (last + 1) & 0x7fffffff;
    which = one.x == due ? 1 : two.x == due ? 2 : 0;
  }
  __syncthreads();
  if (thread < ahead)
    near[thread] = which == 0 ? __ldcg(vectors_of(own) + thread) : which == 1 ? one : two;
  __syncthreads();
  const int* const header = reinterpret_cast<const int*>(near);
  const int num_vectors = (header[H_NUM_WORDS] + 3) / 4;
  if (which != 0) {
    const uint4* const from = vectors_of(which == 1 ? first : second);
    for (int i = thread; i < num_vectors; i += kThreads)
      reinterpret_cast<uint4*>(own)[i] = i < ahead ? near[i] : __ldcg(from + i);
  }
  const int* const arena = num_vectors > ahead ? own : header;
  __syncthreads();

  const int* const table = arena + header[H_TABLE_UPDATES];
  for (int i = thread; i < header[H_NUM_TABLE_UPDATES]; i += kThreads)
    block_table[i64(table[3 * i]) * max_blocks + table[3 * i + 1]] = table[3 * i + 2];
  const int* const updates = arena + header[H_PARAM_UPDATES];
  for (int i = thread; i < header[H_NUM_PARAM_UPDATES] * PARAM_WORDS; i += kThreads) {
    const int row = updates[i / PARAM_WORDS * PARAM_WORDS + P_ROW];
    params[i64(row) * PARAM_WORDS + i % PARAM_WORDS] = updates[i];
  }
  list_samples(sample_tokens, sample_rows, header, arena, num_samples, pad_row);
  const int real_rows = header[H_NUM_ROWS], real_tokens = header[H_NUM_TOKENS];
  const int *in_rows = arena + header[H_ROWS], *in_q_start = arena + header[H_Q_START];
  const int *in_kv_len = arena + header[H_KV_LEN], *in_flags = arena + header[H_FLAGS];
  const int* const in_tokens = arena + header[H_TOKENS];
  for (int r = thread; r <= num_rows; r += kThreads) {
    const bool real = r < real_rows;
    q_start[r] = real ? in_q_start[r] : real_tokens;
    if (r == num_rows) break;
    rows[r] = real ? in_rows[r] : pad_row;
    kv_len[r] = real ? in_kv_len[r] : 0;
  }
  __syncthreads();  // the table is complete
  for (int t = thread; t < num_tokens; t += kThreads) {
    int token = 0, position = 0, slot = 0;
    if (t < real_tokens) {
      const int r = row_of(in_q_start, real_rows, t);
      const int row = in_rows[r];
      position = in_kv_len[r] + t - in_q_start[r];
      const int* const blocks = block_table + i64(row) * max_blocks;
      slot = __ldcg(blocks + position / kBlockTokens) * kBlockTokens + position % kBlockTokens;
      const bool on_device = in_flags[r] & F_TOKEN_ON_DEVICE;
      token = on_device ? __ldcg(last_token + row) : in_tokens[t];
    }
    tokens[t] = token;
    positions[t] = position;
    slots[t] = slot;
  }
  if (sample_positions == nullptr) return;
  __syncthreads();  // positions and slots are there
  for (int s = thread; s < num_samples; s += kThreads) {
    const bool real = sample_rows[s] != pad_row;
    const int t = sample_tokens[s];
    sample_positions[s] = real ? positions[t] : 0;
    sample_slots[s] = real ? slots[t] : 0;
  }
}
