// RMSNorm (Zhang & Sennrich 2019) between two products without a kernel of its own. Who writes the
// residual h leaves h * gains beside it and, of its columns, each row's sum of h^2; who needs
// rmsnorm(h) W^T multiplies (h * gains) W^T by each row's 1 / sqrt(mean(h^2) + eps).
#pragma once
#include "early_loads.cuh"
#include "linear_tile.cuh"

template <typename T> struct ScaledResidual {
  T* out;             // [m, n]
  const T* residual;  // [m, n], perhaps `out` itself
  T* scaled;          // [m, n]: out * gains
  const T* gains;     // [n]
  float* squares;     // [m]: of these columns, each row's sum of out^2
  int m, n;
};

// Ends the `count` columns from `first` on, a multiple of 8: adds the partial sums of the cluster's
// Split blocks, [Rows][Columns + 4] each, and the residual. The block of this rank has every
// Split-th row, of 8 lanes. Called by the block's first Threads threads.
template <int Rows, int Columns, int Split, int Threads, typename T> class ScaledEnd {
  static constexpr int kLanes = 8, kVectors = Columns / 4, kAtOnce = Threads / kLanes;
  static constexpr int kEach = (kVectors + kLanes - 1) / kLanes;
  static constexpr int kRounds = (Rows + kAtOnce * Split - 1) / (kAtOnce * Split);

 public:
  // Registers that hold what was there.
  static constexpr int kRegisters = 2 * kEach * (kRounds + 1);

  __device__ ScaledEnd(int first, int count, u32 rank)
      : first_(first), count_(count), row_(threadIdx.x / kLanes * Split + rank),
        column_(threadIdx.x % kLanes * 4) {}

  // Asks for what was there, before the sums are waited for.
  __device__ __forceinline__ void ask(const ScaledResidual<T>& to) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int o = column_ + j * kLanes * 4;
      gains_[j] = load_if(to.gains + first_ + o, o < count_);
#pragma unroll
      for (int i = 0; i < kRounds; ++i)
        old_[i][j] = load_if(to.residual + place(to, i, o), o < count_ && row(i) < to.m);
    }
  }
  // Begins and ends with a barrier among the threads, or, with Split, of the whole cluster.
  __device__ __forceinline__ void finish(const ScaledResidual<T>& to, const float* partials) {
    sync_split<Split, Threads>();
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      float squares = 0.f;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int o = column_ + j * kLanes * 4;
        if (row(i) >= to.m || o >= count_) continue;
        const float4 sum = sum_of_parts<Split, 1, 0>(partials + row(i) * (Columns + 4) + o);
        const float2 low = unpack<T>(arrived(old_[i][j].x)), high = unpack<T>(arrived(old_[i][j].y));
        const uint2 h = {pack<T>(sum.x + low.x, sum.y + low.y),
                         pack<T>(sum.z + high.x, sum.w + high.y)};
        squares += sum_of_squares<T>(h);  // of what is stored, as the next layer will see it
        const uint2 gains = {arrived(gains_[j].x), arrived(gains_[j].y)};
        *reinterpret_cast<uint2*>(to.out + place(to, i, o)) = h;
        *reinterpret_cast<uint2*>(to.scaled + place(to, i, o)) = product<T>(h, gains);
      }
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset >>= 1)
        squares += __shfl_xor_sync(0xffffffffu, squares, offset);
      if (column_ == 0 && row(i) < to.m) to.squares[row(i)] = squares;
    }
    sync_split_relaxed<Split, Threads>();
  }

 private:
  __device__ __forceinline__ int row(int round) const { return row_ + round * Split * kAtOnce; }
  __device__ __forceinline__ i64 place(const ScaledResidual<T>& to, int round, int o) const {
    return static_cast<i64>(row(round)) * to.n + first_ + o;
  }
  // load_here<uint2>, or zeros.
  static __device__ __forceinline__ uint2 load_if(const void* from, bool exists) {
    uint2 x;
    asm volatile(
        "{\n.reg .pred exists;\nsetp.ne.b32 exists, %3, 0;\n"
        "mov.b32 %0, 0;\nmov.b32 %1, 0;\n"
        "@exists ld.global.v2.b32 {%0, %1}, [%2];\n}"
        : "=&r"(x.x), "=&r"(x.y)
        : "l"(from), "r"(static_cast<int>(exists))
        : "memory");
    return x;
  }

  int first_, count_, row_, column_;
  uint2 old_[kRounds][kEach], gains_[kEach];
};

// What rows [0, rows) of the x that a product takes are multiplied with, to `factors`, by Threads
// threads, of which this is number `thread`. squares: [parts][stride]; k: columns of x.
template <int Threads>
__device__ __forceinline__ void norm_factors(float* factors, const float* squares, int parts,
                                             int stride, int rows, int k, float eps, int thread) {
  const float mean = 1.f / k;
#pragma unroll 1
  for (int row = thread; row < rows; row += Threads) {
    float sum = 0.f;
#pragma unroll 16
    for (int p = 0; p < parts; ++p) sum += __ldcg(squares + p * stride + row);
    factors[row] = rsqrtf(sum * mean + eps);
  }
}
