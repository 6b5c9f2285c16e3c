// Samples one token a row: greedy, or Gumbel-max (argmax of logit / T + noise) over the tokens
// that top-k, top-p and min-p allow.
//
// Of each chunk of 64 logits the largest and the sum of weights are left by the product that made them
// (linear_wgmma.cu) or by `scan_logits`, which reads each row once, in slices. What `choose_tokens` does
// with them depends on the row:
// - Greedy: the best chunk has the best token.
// - Nothing filtered: the largest of logit / T + noise over a chunk is distributed as the chunk's
//   log-sum-exp + one noise. So one noise a chunk picks the chunk, and the tokens' own noise,
//   independent of it, picks among its 64 tokens.
// - Filtered: the chunks' largest logits bound the cut, so that in nearly every row only a few
//   chunks are read again. Filters compose as min-p, then top-k, then top-p, each on what the one
//   before left; tokens of equal logit are allowed or not together.
//
// A row whose logits hold NaN or +inf, or nothing but -inf, gives token -1.
#include "sampling.cuh"
#include "threshold.cuh"

constexpr int kScanThreads = 256;
constexpr int kChooseThreads = 1024;

// Adds a vector's noisy scores to (sample, sample_id): of kVec logits from `id` on, those that
// `allowed(logit)` picks and whose noise can still win.
template <typename F>
__device__ __forceinline__ void draw(const Params& params, int id, const float* x, float top,
                                     float inverse, float& sample, int& sample_id, F allowed) {
  // Noise is bounded, so that most vectors cannot win and need none.
  if (!(top * inverse + kMaxNoise > sample)) return;
  const u32 least = least_bits(sample - top * inverse);
#pragma unroll
  for (int j = 0; j < kVec; j += 4) {
    const uint4 bits = params.noise.bits((id + j) / 4);
    const u32 random[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (random[i] < least || !allowed(x[j + i])) continue;
      const float score = x[j + i] / params.temperature + gumbel(random[i]);
      if (score > sample) {
        sample = score;
        sample_id = id + j + i;
      }
    }
  }
}

constexpr int kDepth = 4;                // vectors that a thread loads at a time
constexpr int kLanes = kChunk / kVec;    // threads of a chunk
constexpr int kStep = kScanThreads * kVec;
constexpr int kGroups = (kChunks + 3) / 4;  // of the four chunks whose noise is made at once
static_assert(kDepth <= kLanes, "each lane of a chunk finishes another of the kDepth chunks");
static_assert(kGroups <= kChooseThreads, "a thread has a group of chunks");

// Over the lanes of a chunk, which all get it: in one order, wherever slices begin.
__device__ __forceinline__ float chunk_max(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset >>= 1)
    x = max_or_nan(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}
__device__ __forceinline__ float chunk_sum(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset >>= 1)
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// Grid: (splits, S). logits [S, VOCAB]; chunks [S, 4 * kGroups].
extern "C" __global__ void __launch_bounds__(kScanThreads)
scan_logits(Chunk* chunks, const SCALAR* logits, const int* table, const int* sample_rows,
            const int* sample_tokens, const int* positions) {
  let_next_start();
  wait_for_previous();
  const int s = blockIdx.y, splits = gridDim.x;
  const Params params(table + i64(sample_rows[s]) * PARAM_WORDS, positions[sample_tokens[s]] + 1);
  const int share = (kGroups + splits - 1) / splits * 4 * kChunk;
  const int begin = blockIdx.x * share, end = min(VOCAB, begin + share);
  const SCALAR* row = logits + i64(s) * VOCAB;
  chunks += i64(s) * (4 * kGroups);
  const bool weighs = params.needs_weights();
  const float scale = weight_scale(params.temperature);
  const int lane = threadIdx.x % kLanes;
  // Every thread takes part in every round; past `end` logits are -inf.
  for (int base = begin; base < end; base += kDepth * kStep) {
    const int id = base + threadIdx.x * kVec;
    float x[kDepth][kVec];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) load_logits(row, id + d * kStep, end, x[d]);
    Chunk mine = {};
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      float top = x[d][0];
#pragma unroll
      for (int j = 1; j < kVec; ++j) top = max_or_nan(top, x[d][j]);
      top = chunk_max(top);
      float weight = 0.f;
      if (weighs) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) weight += weight_of(x[d][j], top, scale);
        weight = chunk_sum(weight);
      }
      if (lane == d) mine = {top, weight};
    }
    // By where the chunk begins: of the last one, this lane's own logits may be past the end.
    const int chunk = (id + lane * kStep) / kChunk;
    if (lane < kDepth && chunk * kChunk < end) chunks[chunk] = mine;
  }
}

constexpr int kFew = 256;  // listed tokens that are rather compared each with each

struct Shared {
  Histogram<kChooseThreads> histogram;
  TokenList list;
  u64 weights[kFew];
  u16 chunks[kChunks];
  int num_chunks;
  u64 packed[kChooseThreads / 32];
  float sums[kChooseThreads / 32];
  float best, weight;  // the row's largest logit, and all its weight relative to it
};

// Whether this thread's token, number threadIdx.x of the few that are listed, is allowed. Weights
// are integers, so that the order of the list does not matter.
__device__ __forceinline__ bool among_few(Shared& shared, const Params& params, int listed) {
  const uint2* list = shared.list.tokens;
  const bool mine = threadIdx.x < listed;
  const u32 q = mine ? list[threadIdx.x].x : 0;
  const int most = params.limits_count() ? params.top_k : VOCAB;
  int nearer = 0;
  if (mine)
    for (int i = 0; i < listed; ++i) nearer += list[i].x < q;
  const bool kept = mine && nearer < most;
  if (!params.limits_mass()) return kept;
  if (mine) shared.weights[threadIdx.x] = kept ? u64(expf(-float(q) * 0x1p-27f) * 0x1p40f) : 0;
  __syncthreads();
  u64 total = 0, before = 0;
  if (kept) {
    for (int i = 0; i < listed; ++i) {
      total += shared.weights[i];
      before += list[i].x < q ? shared.weights[i] : 0;
    }
  }
  const bool of_the_whole = !params.limits_count() && !(params.min_p > 0.f);
  const float share = params.top_p * (of_the_whole ? shared.weight * 0x1p40f : float(total));
  return kept && float(before) < share;
}

// The token of a filtered row; all threads get it.
__device__ __forceinline__ int choose_filtered(Shared& shared, const SCALAR* row,
                                               const Chunk* chunks, const Params& params) {
  constexpr int kShare = (kChunks + kChooseThreads - 1) / kChooseThreads;
  auto& histogram = shared.histogram;
  const float best = shared.best, inverse = 1.f / params.temperature;
  const bool by_count = params.limits_count(), by_weight = params.limits_mass();
  const bool by_share = params.min_p > 0.f;
  const u32 cut = by_share ? distance(0.f, logf(fminf(params.min_p, 1.f)), 1.f) : 0xffffffffu;

  u32 nearest[kShare];  // of each chunk
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    const int c = threadIdx.x + i * kChooseThreads;
    nearest[i] = c < kChunks ? distance(best, chunks[c].top, inverse) : 0xffffffffu;
  }
  // A bound: k chunks reach it, so k tokens do; likewise for weight, where top-p is of the whole.
  u32 last_bin = cut >> kDigitShift;
  if (by_count || (by_weight && !by_share)) {
    histogram.clear();
#pragma unroll
    for (int i = 0; i < kShare; ++i)
      if (threadIdx.x + i * kChooseThreads < kChunks) histogram.add(nearest[i]);
    const float target = by_count ? float(params.top_k) : params.top_p * shared.weight * 1.0001f;
    const Crossing at = histogram.find(!by_count, target, 0, 0.f, 0, kDigitShift);
    if (at.found) last_bin = min(last_bin, at.bin);
  }
  if (threadIdx.x == 0) shared.num_chunks = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    const int c = threadIdx.x + i * kChooseThreads;
    if (c < kChunks && nearest[i] >> kDigitShift <= last_bin)
      shared.chunks[atomicAdd(&shared.num_chunks, 1)] = u16(c);
  }
  __syncthreads();

  const u32 bound = min(cut, last_bin << kDigitShift | ((1u << kDigitShift) - 1));
  Tokens<kChooseThreads> tokens{row, best, inverse, bound, shared.chunks, shared.num_chunks};
  if (last_bin < kLastBin)
    tokens = tokens.collect(shared.list.tokens, kListed, &shared.list.counter,
                            [](u32) { return true; });

  float sample = -kInfinity;
  int sample_id = 0;
  const bool few = tokens.list != nullptr && tokens.listed <= kFew;
  if (!few) {
    float weight = shared.weight;
    if (by_count || (by_weight && by_share)) {
      const Cut found = find_cut(histogram, tokens, shared.list, false,
                                 by_count ? float(params.top_k) : kInfinity);
      tokens.cut = min(tokens.cut, found.q);
      weight = found.weight;
    }
    if (by_weight) {
      const Cut found = find_cut(histogram, tokens, shared.list, true, params.top_p * weight);
      tokens.cut = min(tokens.cut, found.q);
    }
  }
  if (tokens.list == nullptr) {
    tokens.visit_vectors([&](int id, const float* x) {
      float top = x[0];
#pragma unroll
      for (int j = 1; j < kVec; ++j) top = fmaxf(top, x[j]);
      draw(params, id, x, top, inverse, sample, sample_id,
           [&](float logit) { return distance(best, logit, inverse) <= tokens.cut; });
    });
  } else {
    const bool allowed = !few || among_few(shared, params, tokens.listed);
    tokens.visit([&](u32, int id) {
      const float score = to_float(row[id]) / params.temperature + params.noise(id);
      if (allowed && score > sample) {
        sample = score;
        sample_id = id;
      }
    });
  }
  return packed_id(block_max<kChooseThreads>(pack(sample, sample_id), shared.packed));
}

// A token of the chunk by the tokens' noise; for one warp, whose threads all get it.
__device__ __forceinline__ int draw_token(const SCALAR* row, int chunk, const Params& params) {
  float sample = -kInfinity;
  int sample_id = chunk * kChunk;
#pragma unroll
  for (int i = 0; i < kChunk; i += 32) {
    const int id = chunk * kChunk + i + threadIdx.x;
    const float logit = id < VOCAB ? to_float(row[id]) : -kInfinity;
    const float score = logit / params.temperature + params.noise(id);
    if (score > sample) {
      sample = score;
      sample_id = id;
    }
  }
  return packed_id(warp_max(pack(sample, sample_id)));
}

// A group's chunks; of the last one, some may not exist.
__device__ __forceinline__ void load_chunks(Chunk (&to)[4], const Chunk* from) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const float4 two = *reinterpret_cast<const float4*>(from + i);
    to[i] = {two.x, two.y};
    to[i + 1] = {two.z, two.w};
  }
}

// The best token of the chunk, the lowest of several; for one warp, whose threads all get it.
__device__ __forceinline__ int best_token(const SCALAR* row, int chunk) {
  u64 best = 0;
#pragma unroll
  for (int i = 0; i < kChunk; i += 32) {
    const int id = chunk * kChunk + i + threadIdx.x;
    const u64 mine = pack(id < VOCAB ? to_float(row[id]) : -kInfinity, id);
    best = mine > best ? mine : best;
  }
  return packed_id(warp_max(best));
}

// Grid: S. tokens [S]; last_token [rows + 1]; counts [rows + 1, VOCAB] or null: its low 15 bits
// count the tokens that a row has sampled; chunks as scan_logits leaves them; host
// [2, host_capacity], in pinned memory, or null: even steps' tokens and odd steps'.
extern "C" __global__ void __launch_bounds__(kChooseThreads)
choose_tokens(int* tokens, int* last_token, u16* counts, const Chunk* chunks,
              const SCALAR* logits, const int* table, const int* sample_rows,
              const int* sample_tokens, const int* positions, int* host, const int* step,
              int host_capacity) {
  extern __shared__ __align__(16) char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  let_next_start();
  wait_for_previous();
  const int s = blockIdx.x, device_row = sample_rows[s];
  chunks += i64(s) * (4 * kGroups);
  Chunk mine[4] = {};
  const int group = threadIdx.x;
  if (group < kGroups) load_chunks(mine, chunks + 4 * group);
  const Params params(table + i64(device_row) * PARAM_WORDS, positions[sample_tokens[s]] + 1);
  const bool filtered = params.filtered(), plain = !filtered && !params.greedy();
  const SCALAR* row = logits + i64(s) * VOCAB;

  const float scale = weight_scale(params.temperature);
  uint4 bits{};
  if (plain && group < kGroups) bits = params.noise.bits(group, kOfChunks);
  const u32 random[4] = {bits.x, bits.y, bits.z, bits.w};
  bool bad = false;
  u64 most = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int chunk = 4 * group + i;
    if (chunk >= kChunks) continue;
    const auto [top, weight] = mine[i];
    bad |= !(top < kInfinity);
    const float score = plain ? log_of_sum(top, weight, scale) + gumbel(random[i]) : top;
    const u64 packed = pack(score, chunk);
    most = packed > most ? packed : most;
  }
  most = block_max<kChooseThreads>(most, shared.packed);
  bad = __syncthreads_or(bad);
  const bool fails = bad || packed_value(most) == -kInfinity;
  if ((fails || !filtered) && threadIdx.x >= 32) return;  // a warp is enough
  int token = -1;
  if (!fails && plain) {
    token = draw_token(row, packed_id(most), params);
  } else if (!fails && !filtered) {
    token = best_token(row, packed_id(most));
  } else if (!fails) {
    const float best = packed_value(most);
    float weight = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (4 * group + i < kChunks) weight += mine[i].weight * weight_of(mine[i].top, best, scale);
    weight = block_sum<kChooseThreads>(weight, shared.sums);
    if (threadIdx.x == 0) shared.best = best, shared.weight = weight;
    __syncthreads();
    token = choose_filtered(shared, row, chunks, params);
  }
  if (threadIdx.x == 0) {
    tokens[s] = token;
    last_token[device_row] = token;
    if (host != nullptr) host[(*step & 1) * host_capacity + s] = token;
    if (counts != nullptr && token >= 0) {
      u16& count = counts[i64(device_row) * VOCAB + token];
      if ((count & 0x7fff) < 0x7fff) ++count;
    }
  }
}
