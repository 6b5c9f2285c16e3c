// Samples one token a row: greedy, or Gumbel-max (argmax of logit / T + noise) over the tokens
// that top-k, top-p and min-p allow.
//
// `scan_logits` reads each row once, in `splits` slices, and leaves a number for each chunk of 64
// logits. What `choose_tokens` does with them depends on the row:
// - Greedy: the slices' best tokens are all it needs.
// - Nothing filtered: the largest of logit / T + noise over a chunk is distributed as the chunk's
//   log-sum-exp + one noise. So one noise a chunk picks the chunk, still in the scan, and the
//   tokens' own noise, independent of it, picks among its 64 tokens.
// - Filtered: the chunks' largest logits bound the cut, so that in nearly every row only a few
//   chunks are read again. Filters compose as min-p, then top-k, then top-p, each on what the one
//   before left; tokens of equal logit are allowed or not together.
//
// A row whose logits hold NaN or +inf, or nothing but -inf, gives token -1.
#include "sampling.cuh"
#include "threshold.cuh"

constexpr int kScanThreads = 256;
constexpr int kChooseThreads = 1024;

struct alignas(16) Partial {
  u64 best;      // packed (logit, id); where nothing is filtered (log-sum-exp + noise, chunk)
  float weight;  // sum of exp((logit - slice's best) / T); where top-p needs it
  int bad;       // a NaN or +inf
};

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
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
static_assert(kDepth <= kLanes, "see draw_chunk");

// The vectors of a slice, kDepth at a time: f(first id of the first, logits, each one's largest);
// the ids of the others are each kStep further. Every thread takes part in every visit; past
// `end` logits are -inf. Whether this thread saw a NaN or +inf.
template <typename F>
__device__ __forceinline__ bool visit_slice(const SCALAR* row, int begin, int end, F f) {
  bool bad = false;
  for (int base = begin; base < end; base += kDepth * kStep) {
    const int id = base + threadIdx.x * kVec;
    float x[kDepth][kVec], top[kDepth];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) load_logits(row, id + d * kStep, end, x[d]);
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      top[d] = x[d][0];
#pragma unroll
      for (int j = 1; j < kVec; ++j) top[d] = max_or_nan(top[d], x[d][j]);
      bad |= !(top[d] < kInfinity);
    }
    f(id, x, top);
  }
  return bad;
}

// Over the lanes of a chunk, which all get it: in one order, wherever slices begin.
__device__ __forceinline__ float chunk_max(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset >>= 1)
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}
__device__ __forceinline__ float chunk_sum(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset >>= 1)
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// A slice's best token; where filtered, also its chunks' largest logits.
template <bool Filtered>
__device__ __forceinline__ Partial find_best(const SCALAR* row, int begin, int end,
                                             const Params& params, float* chunks) {
  const float scale = Filtered ? kLog2E / params.temperature : 0.f;
  // Where top-k or min-p come first, top-p is of what they leave.
  const bool weigh =
      Filtered && params.limits_mass() && !params.limits_count() && !(params.min_p > 0.f);
  float best = -kInfinity, weight = 0.f;
  int best_id = begin;
  const bool bad = visit_slice(
      row, begin, end, [&](int first, const float (&x)[kDepth][kVec], const float (&top)[kDepth]) {
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
          const int id = first + d * kStep;
          if (Filtered) {
            const float chunk = chunk_max(top[d]);
            if (threadIdx.x % kLanes == 0 && id < end) chunks[id / kChunk] = chunk;
          }
          if (top[d] > best) {
            if (weigh) weight *= fast_exp2((best - top[d]) * scale);
            best = top[d];
#pragma unroll
            for (int j = kVec - 1; j >= 0; --j)
              if (x[d][j] == best) best_id = id + j;
          }
          if (weigh && best > -kInfinity) {
#pragma unroll
            for (int j = 0; j < kVec; ++j) weight += fast_exp2((x[d][j] - best) * scale);
          }
        }
      });
  return {pack(best, best_id), weight, bad};
}

// A slice's best chunk by log-sum-exp + noise.
__device__ __forceinline__ Partial draw_chunk(const SCALAR* row, int begin, int end,
                                              const Params& params, float* chunks) {
  const float scale = kLog2E / params.temperature;
  const int lane = threadIdx.x % kLanes;
  const bool bad = visit_slice(
      row, begin, end, [&](int id, const float (&x)[kDepth][kVec], const float (&top)[kDepth]) {
        // Each lane of a chunk finishes another of the kDepth chunks.
        float my_most = 0.f, my_sum = 0.f;
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
          // Finite where all are -inf, whose sum is then 0 and its logarithm -inf.
          const float most = fmaxf(chunk_max(top[d]), -0x1p127f);
          float sum = 0.f;
          // The difference first: of a scaled one, a tiny temperature would scale its rounding too.
#pragma unroll
          for (int j = 0; j < kVec; ++j) sum += fast_exp2((x[d][j] - most) * scale);
          sum = chunk_sum(sum);
          if (lane == d) {
            my_most = most * scale;
            my_sum = sum;
          }
        }
        // By where the chunk begins: of the last one, this lane's own logits may be past the end.
        const int chunk = (id + lane * kStep) / kChunk;
        if (lane < kDepth && chunk * kChunk < end)
          chunks[chunk] = (my_most + fast_log2(my_sum)) * kLn2;
      });
  __syncthreads();
  // The noise is made here and not above, where few lanes at a time would have any to make.
  const int last = (end + kChunk - 1) / kChunk;
  float sample = -kInfinity;
  int sample_chunk = begin / kChunk;
  for (int c = begin / kChunk + 4 * threadIdx.x; c < last; c += 4 * kScanThreads) {
    const uint4 bits = params.noise.bits(c / 4, kOfChunks);
    const u32 random[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float score = c + i < last ? chunks[c + i] + gumbel(random[i]) : -kInfinity;
      if (score > sample) {
        sample = score;
        sample_chunk = c + i;
      }
    }
  }
  return {pack(sample, sample_chunk), 0.f, bad};
}

// Grid: (splits, S). logits [S, VOCAB]; partials [S, splits]; chunks [S, kChunks]: the largest
// logit of each where the row is filtered, else log-sum-exp of logit / T.
extern "C" __global__ void __launch_bounds__(kScanThreads)
scan_logits(Partial* partials, float* chunks, const SCALAR* logits, const int* table,
            const int* sample_rows, const int* sample_tokens, const int* positions) {
  __shared__ u64 packed[kScanThreads / 32];
  __shared__ float sums[kScanThreads / 32];
  let_next_start();
  wait_for_previous();
  const int s = blockIdx.y, splits = gridDim.x;
  const Params params(table + i64(sample_rows[s]) * PARAM_WORDS, positions[sample_tokens[s]] + 1);
  // Whole groups of the four chunks whose noise is made at once.
  constexpr int kGroups = (kChunks + 3) / 4;
  const int share = (kGroups + splits - 1) / splits * 4 * kChunk;
  const int begin = blockIdx.x * share, end = min(VOCAB, begin + share);
  const SCALAR* row = logits + i64(s) * VOCAB;
  chunks += i64(s) * kChunks;
  Partial mine;
  if (params.greedy())
    mine = find_best<false>(row, begin, end, params, chunks);
  else if (params.filtered())
    mine = find_best<true>(row, begin, end, params, chunks);
  else
    mine = draw_chunk(row, begin, end, params, chunks);
  Partial all;
  all.best = block_max<kScanThreads>(mine.best, packed);
  const float gap = packed_value(mine.best) - packed_value(all.best);  // NaN where both are -inf
  const float weight = gap <= 0.f ? mine.weight * expf(gap / params.temperature) : 0.f;
  all.weight = block_sum<kScanThreads>(mine.weight > 0.f ? weight : 0.f, sums);
  all.bad = __syncthreads_or(mine.bad);
  if (threadIdx.x == 0) partials[i64(s) * splits + blockIdx.x] = all;
}

constexpr int kFew = 256;  // listed tokens that are rather compared each with each

struct Shared {
  Histogram<kChooseThreads> histogram;
  TokenList list;
  u64 weights[kFew];
  u16 chunks[kChunks];
  int num_chunks;
  u64 packed[kChooseThreads / 32];
  Partial row;
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
  const float share = params.top_p * (of_the_whole ? shared.row.weight * 0x1p40f : float(total));
  return kept && float(before) < share;
}

// The token of a filtered row, whose chunks have these largest logits; all threads get it.
__device__ __forceinline__ int choose_filtered(Shared& shared, const SCALAR* row,
                                               const float* tops, const Params& params) {
  constexpr int kShare = (kChunks + kChooseThreads - 1) / kChooseThreads;
  auto& histogram = shared.histogram;
  const float best = packed_value(shared.row.best), inverse = 1.f / params.temperature;
  const bool by_count = params.limits_count(), by_weight = params.limits_mass();
  const bool by_share = params.min_p > 0.f;
  const u32 cut = by_share ? distance(0.f, logf(fminf(params.min_p, 1.f)), 1.f) : 0xffffffffu;

  u32 nearest[kShare];  // of each chunk
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    const int c = threadIdx.x + i * kChooseThreads;
    nearest[i] = c < kChunks ? distance(best, tops[c], inverse) : 0xffffffffu;
  }
  // A bound: k chunks reach it, so k tokens do; likewise for weight, where top-p is of the whole.
  u32 last_bin = cut >> kDigitShift;
  if (by_count || (by_weight && !by_share)) {
    histogram.clear();
#pragma unroll
    for (int i = 0; i < kShare; ++i)
      if (threadIdx.x + i * kChooseThreads < kChunks) histogram.add(nearest[i]);
    const float target = by_count ? float(params.top_k) : params.top_p * shared.row.weight * 1.0001f;
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
    float weight = shared.row.weight;
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

// A row's partials as one; for one warp, whose threads all get it.
__device__ __forceinline__ Partial combine(const Partial* partials, int splits, float temperature) {
  Partial all = {0, 0.f, 0};
  for (int i = threadIdx.x; i < splits; i += 32) {
    const Partial p = partials[i];
    all.best = p.best > all.best ? p.best : all.best;
    all.bad |= p.bad;
  }
  all.best = warp_max(all.best);
  all.bad = __any_sync(0xffffffffu, all.bad);
  for (int i = threadIdx.x; i < splits; i += 32) {
    const Partial p = partials[i];
    const float gap = packed_value(p.best) - packed_value(all.best);
    if (p.weight > 0.f) all.weight += p.weight * expf(gap / temperature);
  }
  all.weight = warp_sum(all.weight);
  return all;
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

// Grid: S. tokens [S]; last_token [rows + 1]; counts [rows + 1, VOCAB] or null: its low 15 bits
// count the tokens that a row has sampled; host [2, host_capacity], in pinned memory, or null: even
// steps' tokens and odd steps'.
extern "C" __global__ void __launch_bounds__(kChooseThreads)
choose_tokens(int* tokens, int* last_token, u16* counts, const Partial* partials,
              const float* chunks, const SCALAR* logits, const int* table,
              const int* sample_rows, const int* sample_tokens,
              const int* positions, int splits, int* host,
              const int* step, int host_capacity) {
  extern __shared__ __align__(16) char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  let_next_start();
  wait_for_previous();
  const int s = blockIdx.x, device_row = sample_rows[s];
  const Params params(table + i64(device_row) * PARAM_WORDS, positions[sample_tokens[s]] + 1);
  const bool filtered = params.filtered();
  if (!filtered && threadIdx.x >= 32) return;  // a warp is enough
  const SCALAR* row = logits + i64(s) * VOCAB;
  Partial all;
  if (threadIdx.x < 32) all = combine(partials + i64(s) * splits, splits, params.temperature);
  if (filtered) {
    if (threadIdx.x == 0) shared.row = all;
    __syncthreads();
    all = shared.row;
  }
  int token;
  if (all.bad || packed_value(all.best) == -kInfinity)
    token = -1;
  else if (params.greedy())
    token = packed_id(all.best);
  else if (filtered)
    token = choose_filtered(shared, row, chunks + i64(s) * kChunks, params);
  else
    token = draw_token(row, packed_id(all.best), params);
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
