// Samples one token a row: greedy, or Gumbel-max (argmax of logit / T + noise) over the tokens
// that top-k, top-p and min-p allow.
//
// `scan_logits` reads each row once, in `splits` slices, for its best token, its normalizer, the
// best noisy token where nothing is filtered, and the largest logit of each chunk of 64.
// `choose_tokens` cuts filtered rows: the chunks' largest bound the cut, so that in nearly every
// row only a few chunks are read again. Filters compose as min-p, then top-k, then top-p, each on
// what the one before left; tokens of equal logit are allowed or not together.
//
// A row whose logits hold NaN or +inf, or nothing but -inf, gives token -1.
#include "sampling.cuh"
#include "threshold.cuh"

constexpr int kScanThreads = 256;
constexpr int kChooseThreads = 1024;

struct Partial {
  u64 best;    // packed (logit, id)
  u64 sample;  // packed (logit / T + noise, id); where nothing is filtered
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

template <bool Greedy, bool Filtered>
__device__ __forceinline__ Partial scan_slice(const SCALAR* row, int begin, int end,
                                              const Params& params, float* chunk_max) {
  constexpr int kDepth = 4;  // loads in flight
  constexpr int kLanes = kChunk / kVec;
  const float inverse = Greedy ? 0.f : 1.f / params.temperature;
  const float scale = inverse * 1.4426950408889634f;
  // Where top-k or min-p come first, top-p is of what they leave.
  const bool weigh =
      Filtered && params.limits_mass() && !params.limits_count() && !(params.min_p > 0.f);
  float best = -kInfinity, sample = -kInfinity, weight = 0.f;
  int best_id = begin, sample_id = begin;
  bool bad = false;
  for (int base = begin; base < end; base += kDepth * kScanThreads * kVec) {
    float x[kDepth][kVec];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int id = base + (d * kScanThreads + threadIdx.x) * kVec;
      if (id < end) {
        load_logits(row, id, x[d]);
      } else {
#pragma unroll
        for (int j = 0; j < kVec; ++j) x[d][j] = -kInfinity;
      }
    }
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int id = base + (d * kScanThreads + threadIdx.x) * kVec;
      float top = x[d][0];
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        bad |= !(x[d][j] < kInfinity);
        top = fmaxf(top, x[d][j]);
      }
      if (Filtered) {
        float chunk = top;
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset >>= 1)
          chunk = fmaxf(chunk, __shfl_xor_sync(0xffffffffu, chunk, offset));
        if (threadIdx.x % kLanes == 0 && id < end) chunk_max[id / kChunk] = chunk;
      }
      if (top > best) {
        if (weigh) weight *= fast_exp2((best - top) * scale);
        best = top;
#pragma unroll
        for (int j = kVec - 1; j >= 0; --j)
          if (x[d][j] == top) best_id = id + j;
      }
      if (weigh && best > -kInfinity) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) weight += fast_exp2((x[d][j] - best) * scale);
      }
      if (!Greedy && !Filtered && id < end)
        draw(params, id, x[d], top, inverse, sample, sample_id, [](float) { return true; });
    }
    // What one lane has reached is the bar for all of them.
    if (!Greedy && !Filtered) {
      const u64 reached = warp_max(pack(sample, sample_id));
      sample = packed_value(reached);
      sample_id = packed_id(reached);
    }
  }
  return {pack(best, best_id), pack(sample, sample_id), weight, bad};
}

// Grid: (splits, S). logits [S, VOCAB]; partials [S, splits]; chunk_max [S, kChunks].
extern "C" __global__ void __launch_bounds__(kScanThreads)
scan_logits(Partial* partials, float* chunk_max, const SCALAR* __restrict__ logits,
            const int* __restrict__ table, const int* __restrict__ sample_rows,
            const int* __restrict__ sample_tokens, const int* __restrict__ positions) {
  __shared__ u64 packed[kScanThreads / 32];
  __shared__ float sums[kScanThreads / 32];
  let_next_start();
  wait_for_previous();
  const int s = blockIdx.y, splits = gridDim.x;
  const Params params(table + i64(sample_rows[s]) * PARAM_WORDS, positions[sample_tokens[s]] + 1);
  const int share = (kChunks + splits - 1) / splits * kChunk;
  const int begin = min(VOCAB, int(blockIdx.x) * share), end = min(VOCAB, begin + share);
  const SCALAR* row = logits + i64(s) * VOCAB;
  float* chunks = chunk_max + i64(s) * kChunks;
  Partial mine;
  if (params.greedy())
    mine = scan_slice<true, false>(row, begin, end, params, chunks);
  else if (params.filtered())
    mine = scan_slice<false, true>(row, begin, end, params, chunks);
  else
    mine = scan_slice<false, false>(row, begin, end, params, chunks);
  Partial all;
  all.best = block_max<kScanThreads>(mine.best, packed);
  all.sample = block_max<kScanThreads>(mine.sample, packed);
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

// The token of a filtered row; all threads get it.
__device__ __forceinline__ int choose_filtered(Shared& shared, const SCALAR* row,
                                               const float* chunk_max, const Params& params) {
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
    nearest[i] = c < kChunks ? distance(best, chunk_max[c], inverse) : 0xffffffffu;
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

// Grid: S. tokens [S]; last_token [rows + 1]; counts [rows + 1, VOCAB] or null: its low 15 bits
// count the tokens that a row has sampled.
extern "C" __global__ void __launch_bounds__(kChooseThreads)
choose_tokens(int* tokens, int* last_token, u16* counts, const Partial* __restrict__ partials,
              const float* chunk_max, const SCALAR* logits, const int* __restrict__ table,
              const int* __restrict__ sample_rows, const int* __restrict__ sample_tokens,
              const int* __restrict__ positions, int splits) {
  extern __shared__ __align__(16) char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  let_next_start();
  wait_for_previous();
  const int s = blockIdx.x, device_row = sample_rows[s];
  const Params params(table + i64(device_row) * PARAM_WORDS, positions[sample_tokens[s]] + 1);
  if (threadIdx.x < 32) {
    Partial all = {0, 0, 0.f, 0};
    for (int i = threadIdx.x; i < splits; i += 32) {
      const Partial p = partials[i64(s) * splits + i];
      all.best = p.best > all.best ? p.best : all.best;
      all.sample = p.sample > all.sample ? p.sample : all.sample;
      all.bad |= p.bad;
    }
    all.best = warp_max(all.best);
    all.sample = warp_max(all.sample);
    all.bad = __any_sync(0xffffffffu, all.bad);
    for (int i = threadIdx.x; i < splits; i += 32) {
      const Partial p = partials[i64(s) * splits + i];
      const float gap = packed_value(p.best) - packed_value(all.best);
      if (p.weight > 0.f) all.weight += p.weight * expf(gap / params.temperature);
    }
    all.weight = warp_sum(all.weight);
    if (threadIdx.x == 0) shared.row = all;
  }
  __syncthreads();
  int token;
  if (shared.row.bad || packed_value(shared.row.best) == -kInfinity)
    token = -1;
  else if (params.greedy())
    token = packed_id(shared.row.best);
  else if (!params.filtered())
    token = packed_id(shared.row.sample);
  else
    token = choose_filtered(shared, logits + i64(s) * VOCAB, chunk_max + i64(s) * kChunks, params);
  if (threadIdx.x == 0) {
    tokens[s] = token;
    last_token[device_row] = token;
    if (counts != nullptr && token >= 0) {
      u16& count = counts[i64(device_row) * VOCAB + token];
      if ((count & 0x7fff) < 0x7fff) ++count;
    }
  }
}
