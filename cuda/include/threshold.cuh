// Top-k, top-p and min-p as one number a row: the largest distance below the best logit that is
// still allowed. Found by a radix search over histograms, never by a sort.
//
// A token's distance (best - logit) / temperature is held as a fixed-point number q of 5.27 bits
// (32 and beyond saturate: such tokens weigh less than 1e-13). A search fixes 11, 11 and 10 bits
// of the cut in turn, each by a histogram of the counts of tokens that agree on the bits so far.
// A token weighs exp(-distance). Within a bin of the first digit, 1/64 wide, weights differ by up
// to 1.6%, so that histogram also sums what each token lacks of its bin's largest weight, in
// units of 2^-20: integers, so the result does not depend on the order of the atomics.
#pragma once
#include "sampling.cuh"

constexpr int kChunks = (VOCAB + kChunk - 1) / kChunk;
constexpr int kBins = 2048;
constexpr int kDigitShift = 21;  // the first digit of q
constexpr u32 kLastBin = kBins - 1;

__device__ __forceinline__ u32 distance(float best, float x, float inverse_temperature) {
  const float y = (best - x) * inverse_temperature;
  return y < 32.f ? u32(y * 0x1p27f) : 0xffffffffu;
}

// Tokens to search among: a list in shared memory, or chunks of the row.
template <int Threads> struct Tokens {
  const SCALAR* row;
  float best, inverse_temperature;
  u32 cut;            // tokens farther from the best are not visited
  const u16* chunks;  // which chunks, and how many
  int num_chunks;
  const uint2* list;  // (q, id); null: read the row
  int listed;

  template <typename F> __device__ __forceinline__ void visit(F f) const {
    if (list != nullptr) {
      for (int i = threadIdx.x; i < listed; i += Threads)
        if (list[i].x <= cut) f(list[i].x, int(list[i].y));
      return;
    }
    visit_vectors([&](int id, const float* x) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const u32 q = distance(best, x[j], inverse_temperature);
        if (id + j < VOCAB && q <= cut) f(q, id + j);
      }
    });
  }

  // The vectors of the row's chunks: f(first id, logits).
  template <typename F> __device__ __forceinline__ void visit_vectors(F f) const {
    constexpr int kDepth = 2, kLanes = kChunk / kVec;  // loads in flight; lanes a chunk
    const int vectors = num_chunks * kLanes;
    for (int base = threadIdx.x; base < vectors; base += Threads * kDepth) {
      float x[kDepth][kVec];
      int ids[kDepth];
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        const int v = base + d * Threads;
        ids[d] = v < vectors ? chunks[v / kLanes] * kChunk + v % kLanes * kVec : VOCAB;
        load_logits(row, ids[d], VOCAB, x[d]);
      }
#pragma unroll
      for (int d = 0; d < kDepth; ++d) f(ids[d], x[d]);
    }
  }

  // A copy that lists the tokens that `keep` picks, if `space` holds them all; else *this.
  // `counter` is shared memory.
  template <typename F>
  __device__ __forceinline__ Tokens collect(uint2* space, int capacity, int* counter, F keep) const {
    __syncthreads();
    if (threadIdx.x == 0) *counter = 0;
    __syncthreads();
    visit([&](u32 q, int id) {
      if (!keep(q)) return;
      const int at = atomicAdd(counter, 1);
      if (at < capacity) space[at] = make_uint2(q, u32(id));
    });
    __syncthreads();
    Tokens out = *this;
    if (*counter <= capacity) {
      out.list = space;
      out.listed = *counter;
    }
    return out;
  }
};

// Where a target falls among the bins.
struct Crossing {
  u32 bin;
  bool found;  // else bin is the last one that holds a token
  int count_before, count;
  float weight_before, weight;
};

template <int Threads> struct Histogram {
  u32 counts[kBins];
  u32 lacks[kBins];
  int warp_counts[Threads / 32];
  float warp_weights[Threads / 32];
  u32 first_crossing, last_held;
  Crossing crossing;

  __device__ __forceinline__ void clear() {
    __syncthreads();
    for (int i = threadIdx.x; i < kBins; i += Threads) counts[i] = lacks[i] = 0;
    if (threadIdx.x == 0) {
      first_crossing = kBins;
      last_held = 0;
    }
    __syncthreads();
  }

  // Count q in its first digit.
  __device__ __forceinline__ void add(u32 q) {
    const u32 bin = q >> kDigitShift;
    const float d = float(q & ((1u << kDigitShift) - 1)) * 0x1p-27f;
    atomicAdd(&counts[bin], 1u);
    // 1 - exp(-d) for d < 1/64.
    atomicAdd(&lacks[bin], u32((d - d * d * (0.5f - d * (1.f / 6.f))) * 0x1p20f + 0.5f));
  }

  __device__ __forceinline__ float weight(u32 bin, u32 prefix, int shift) const {
    if (shift == kDigitShift)
      return expf(-float(bin) * (1.f / 64.f)) * (float(counts[bin]) - float(lacks[bin]) * 0x1p-20f);
    const u32 middle = prefix | bin << shift | (1u << shift) / 2;
    return counts[bin] ? float(counts[bin]) * expf(-float(middle) * 0x1p-27f) : 0.f;
  }

  // The first bin at whose end the count (or the weight) reaches the target, given what lies
  // before the bins. All threads call it and get the same answer.
  __device__ __noinline__ Crossing find(bool by_weight, float target, int count_before, float weight_before,
                           u32 prefix, int shift) {
    constexpr int kShare = kBins / Threads;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();
    int count = 0;
    float sum = 0.f, weights[kShare];
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      count += counts[threadIdx.x * kShare + i];
      weights[i] = weight(threadIdx.x * kShare + i, prefix, shift);
      sum += weights[i];
    }
    int count_end = count;
    float weight_end = sum;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
      const int c = __shfl_up_sync(0xffffffffu, count_end, offset);
      const float w = __shfl_up_sync(0xffffffffu, weight_end, offset);
      if (lane >= offset) {
        count_end += c;
        weight_end += w;
      }
    }
    if (lane == 31) {
      warp_counts[warp] = count_end;
      warp_weights[warp] = weight_end;
    }
    __syncthreads();
    int c = count_before + count_end - count;
    float w = weight_before + weight_end - sum;
#pragma unroll 8
    for (int i = 0; i < warp; ++i) {
      c += warp_counts[i];
      w += warp_weights[i];
    }
    Crossing mine[2] = {};  // a crossing here, and the last bin here that holds a token
    mine[0].bin = kBins;
    mine[1].bin = kBins;
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const u32 bin = threadIdx.x * kShare + i;
      const int n = counts[bin];
      if (n > 0) {
        const bool reaches = by_weight ? w + weights[i] >= target : float(c + n) >= target;
        mine[1] = {bin, false, c, n, w, weights[i]};
        if (reaches && mine[0].bin == kBins) mine[0] = {bin, true, c, n, w, weights[i]};
      }
      c += n;
      w += weights[i];
    }
    if (mine[0].bin < kBins) atomicMin(&first_crossing, mine[0].bin);
    if (mine[1].bin < kBins) atomicMax(&last_held, mine[1].bin);
    __syncthreads();
    if (first_crossing < kBins) {
      if (mine[0].bin == first_crossing) crossing = mine[0];
    } else if (mine[1].bin == last_held) {
      crossing = mine[1];
    }
    __syncthreads();
    return crossing;
  }
};

struct Cut {
  u32 q;         // the largest distance allowed
  float weight;  // of all tokens within it
};

// Room for tokens in shared memory.
constexpr int kListed = 4096;
struct TokenList {
  uint2 tokens[kListed];
  int counter;
};

// The smallest cut whose tokens number `target` (or weigh it, by_weight); all tokens where they
// fall short. `list` is free where `tokens` are not listed in it.
template <int Threads>
__device__ __noinline__ Cut find_cut(Histogram<Threads>& histogram, const Tokens<Threads>& tokens,
                                     TokenList& list, bool by_weight, float target) {
  histogram.clear();
  tokens.visit([&](u32 q, int) { histogram.add(q); });
  Crossing at = histogram.find(by_weight, target, 0, 0.f, 0, kDigitShift);
  if (!at.found) return {0xffffffffu, at.weight_before + at.weight};
  u32 prefix = at.bin << kDigitShift;
  int shift = kDigitShift;
  Tokens<Threads> among = tokens;
  while (shift > 0) {
    // One token in the bin, or a count that ends with it: the rest of the digits do not matter.
    const bool whole = at.count == 1 || (!by_weight && float(at.count_before + at.count) == target);
    if (whole) break;
    const int bits_above = shift;
    if (among.list == nullptr && at.count <= kListed)
      among = among.collect(list.tokens, kListed, &list.counter, [&](u32 q) {
        return q >> bits_above == prefix >> bits_above;
      });
    shift = shift == kDigitShift ? 10 : 0;
    const u32 mask = (1u << (bits_above - shift)) - 1;
    histogram.clear();
    among.visit([&](u32 q, int) {
      if (q >> bits_above == prefix >> bits_above)
        atomicAdd(&histogram.counts[(q >> shift) & mask], 1u);
    });
    at = histogram.find(by_weight, target, at.count_before, at.weight_before, prefix, shift);
    prefix |= at.bin << shift;
  }
  return {prefix | ((1u << shift) - 1), at.weight_before + at.weight};
}
