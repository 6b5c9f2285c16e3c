// Words that travel between the thread blocks of one resident grid without a barrier: 4 bytes of
// data and the tag of the moment that they belong to, written and read as one. Who waits for a word
// reads it until its tag is right, so a value costs one way to the L2 and one back, where a barrier
// would cost a fence, an atomic, a flag and only then the value (NCCL's LL protocol).
//
// A word may be written again once everybody has read it. That is the caller's to see to; in a
// chain of steps where every thread block needs all words of a step before it writes any of the
// next, the words of one step are free two steps later.
#pragma once
#include "common.cuh"

constexpr int kMostPolls = 1 << 24;  // many seconds: a lost thread block must not hang the device

__device__ __forceinline__ void post(u64* to, u32 data, u32 tag) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to),
               "l"(static_cast<u64>(tag) << 32 | data)
               : "memory");
}
// Two words that lie side by side, aligned to 16 bytes.
__device__ __forceinline__ void post_pair(u64* to, u32 first, u32 second, u32 tag) {
  asm volatile("st.relaxed.gpu.global.v2.u64 [%0], {%1, %2};" ::"l"(to),
               "l"(static_cast<u64>(tag) << 32 | first), "l"(static_cast<u64>(tag) << 32 | second)
               : "memory");
}

// What one read brings: a word, or two that lie side by side, each of them whole.
struct One {
  u64 word;

  __device__ __forceinline__ void read(const u64* from) {
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
  }
  __device__ __forceinline__ bool has(u32 tag) const { return word >> 32 == tag; }
  __device__ __forceinline__ u32 data() const { return static_cast<u32>(word); }
};
struct alignas(16) Two {
  u64 first, second;

  __device__ __forceinline__ void read(const u64* from) {
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
                 : "=l"(first), "=l"(second)
                 : "l"(from)
                 : "memory");
  }
  __device__ __forceinline__ bool has(u32 tag) const {
    return first >> 32 == tag && second >> 32 == tag;
  }
  __device__ __forceinline__ uint2 data() const {
    return make_uint2(static_cast<u32>(first), static_cast<u32>(second));
  }
};

// Waits for Count of them, all under way together: at(i) is where, wanted(i) whether at all.
template <int Count, typename Words, typename At, typename Wanted>
__device__ __forceinline__ void receive(Words (&words)[Count], u32 tag, const At& at,
                                        const Wanted& wanted) {
#pragma unroll
  for (int i = 0; i < Count; ++i)
    if (wanted(i)) words[i].read(at(i));
  for (int polls = 0;; ++polls) {
    bool missing = false;
#pragma unroll
    for (int i = 0; i < Count; ++i) missing |= wanted(i) && !words[i].has(tag);
    if (!missing) return;
    if (polls == kMostPolls) __trap();
#pragma unroll
    for (int i = 0; i < Count; ++i)
      if (wanted(i) && !words[i].has(tag)) words[i].read(at(i));
  }
}
