// The order of one head's tokens inside a block of the paged cache (16 rows of D elements).
//
// The run is cut into columns of 128 bytes; a column holds its 16 rows one after the other, and
// inside a row the 16-byte chunks are permuted by an exclusive or with row % 8:
//
//     [row_bytes / 128][16 rows][8 chunks ^ (row % 8)][16 bytes]
//
// This is the 128-byte swizzle of wgmma and TMA, so a contiguous bulk copy into shared memory
// (aligned to 1,024 bytes) lands the tile ready for wgmma and, without bank conflicts, for
// ldmatrix. What a row has left over fills a column of 64 bytes with the 64-byte swizzle,
// chunk ^ (row / 2 % 4), and then one of 32 bytes with the 32-byte swizzle, chunk ^ (row / 4 % 2).
// Row sizes are multiples of 32 bytes.
//
// `zllm.cuda.rope_cache.permute_cache` states the same for tests.
#pragma once

namespace kv_layout {

constexpr int kBlockTokens = 16;

// Byte offset of the 16-byte chunk `chunk` (of RowBytes / 16) of row `row`, within the run.
template <int RowBytes> __host__ __device__ __forceinline__ constexpr int offset(int row, int chunk) {
  static_assert(RowBytes % 32 == 0, "a row must be a multiple of 32 bytes");
  constexpr int kWide = RowBytes / 128;       // columns of 128 bytes
  constexpr int kMiddle = RowBytes / 64 % 2;  // then one of 64 bytes, then one of 32
  constexpr int kAfterWide = kWide * kBlockTokens * 128;
  const int column = chunk / 8;
  if (column < kWide)
    return column * (kBlockTokens * 128) + row * 128 + (((chunk & 7) ^ (row & 7)) << 4);
  if (kMiddle == 1 && (chunk & 7) < 4)
    return kAfterWide + row * 64 + (((chunk & 3) ^ ((row >> 1) & 3)) << 4);
  return kAfterWide + kMiddle * kBlockTokens * 64 + row * 32 +
         (((chunk & 1) ^ ((row >> 2) & 1)) << 4);
}

template <int RowBytes> constexpr int run_bytes() { return kBlockTokens * RowBytes; }

// The columns of a run. The first rows of one are its first bytes, whatever the permutation.
template <int RowBytes> constexpr int num_columns() {
  return RowBytes / 128 + RowBytes / 64 % 2 + RowBytes / 32 % 2;
}
// Bytes of a row in column `column`.
template <int RowBytes> __device__ __forceinline__ int column_width(int column) {
  if (column < RowBytes / 128) return 128;
  return RowBytes / 64 % 2 == 1 && column == RowBytes / 128 ? 64 : 32;
}
// Where column `column` begins.
template <int RowBytes> __device__ __forceinline__ int column_offset(int column) {
  constexpr int kWide = RowBytes / 128;
  return kBlockTokens * (min(column, kWide) * 128 + (column > kWide ? 64 : 0));
}

}  // namespace kv_layout
