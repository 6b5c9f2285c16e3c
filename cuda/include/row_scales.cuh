// What an RMSNorm (Zhang & Sennrich 2019) without gains scales rows by, 1 / sqrt(mean(x^2) + eps), made
// by the grid that multiplies them: warps that are free for it share the rows out among all blocks.
//
// Macro: PATIENCE, how many looks in vain a warp takes before it makes a tile's scales itself; optional.
#pragma once
#include "common.cuh"

#ifndef PATIENCE
#define PATIENCE (1 << 14)
#endif

template <typename T> struct Norm {
  const T* x;     // [m, k]
  float* scales;  // [m] zeros, which become the scales: none is 0, so each tells that it is there
  float eps;
};

// What Threads threads of each thread block do for tiles of Rows rows, in whole warps. Rows are made in
// their order, `until` before anyone asks for them: nobody waits for a row whose warp waits for a later
// one. Another process may keep some of the blocks from running. Then those that wait help themselves.
template <typename T, int Rows, int Threads> struct RowScales {
  static constexpr int kVec = Vec<T>::size, kAtOnce = 4, kStep = 32 * kVec;
  static constexpr int kEach = (Rows + Threads - 1) / Threads;
  static_assert(Rows % 32 == 0 && Threads % 32 == 0, "in whole warps");

  const Norm<T>& norm;
  int m, k, thread;
  int mine;                // the next row that this warp makes
  float seen[kEach] = {};  // of this thread's rows of a tile; 0 for those that were not there yet

  __device__ __forceinline__ RowScales(const Norm<T>& norm, int m, int k, int thread)
      : norm(norm), m(m), k(k), thread(thread), mine((blockIdx.x * Threads + thread) / 32) {}

  // Those of the Rows rows from `row` on to shared memory, `to`, once all rows before `until` are made.
  __device__ __forceinline__ void take(int row, int until, float* to) {
    int next = mine, end = min(until, m), apart = gridDim.x * (Threads / 32);
    for (bool helps = false;; helps = true) {
      for (; next < end; next += 2 * apart) make(next, next + apart < m ? next + apart : next);
      if (!helps) mine = next;
      if (all_seen(row)) break;
      next = min(row, m - 1), end = min(row + Rows, m), apart = 1;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (exists(i)) to[thread + i * Threads] = seen[i];
    asm volatile("bar.sync 1, %0;" ::"n"(Threads) : "memory");
  }

  // A first look, without waiting, at those from `row` on, which are taken next.
  __device__ __forceinline__ void look_for(int row) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) seen[i] = exists(i) ? look(row, i) : 1.f;
  }

 private:
  __device__ __forceinline__ bool exists(int i) const { return thread + i * Threads < Rows; }

  __device__ __forceinline__ float look(int row, int i) const {
    const float* const at = norm.scales + min(row + thread + i * Threads, m - 1);
    float scale;
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(scale) : "l"(at) : "memory");
    return scale;
  }

  __device__ __forceinline__ bool all_seen(int row) {
    for (int looks = 0; looks < PATIENCE; ++looks) {
      bool missing = false;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (exists(i) && seen[i] == 0.f) seen[i] = look(row, i);
        missing |= exists(i) && seen[i] == 0.f;
      }
      if (!__any_sync(0xffffffffu, missing)) return true;
    }
    return false;
  }

  // By a warp, of two rows at once, since each waits for memory; they may be the same.
  __device__ __forceinline__ void make(int one, int two) const {
    const int rows[2] = {one, two};
    float squares[2] = {};
#pragma unroll 1
    for (int first = threadIdx.x % 32 * kVec; first < k; first += kAtOnce * kStep) {
      Vec<T> part[2][kAtOnce] = {};
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
          if (first + i * kStep < k)
            part[r][i] = load_vec_from_l2(norm.x + i64(rows[r]) * k + first + i * kStep);
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
          for (int j = 0; j < kVec; ++j) squares[r] += part[r][i][j] * part[r][i][j];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float scale = rsqrtf(warp_sum(squares[r]) / static_cast<float>(k) + norm.eps);
      // The least instead of 0, which squares beyond float32 would give.
      const float known = scale == 0.f ? 1.17549435e-38f : scale;
      if (threadIdx.x % 32 == 0) __stcg(norm.scales + rows[r], known);
    }
  }
};
