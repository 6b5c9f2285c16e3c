// Rows of a matrix by index: the embedding, and the rows that sample. Type does not matter here:
// a row is a number of 16-byte vectors.
#include "common.cuh"

// Grid: (indices, parts of a row). An index outside [0, num_rows) gives zeros: the row of a
// sequence whose last sample failed (-1) must not stop the batch.
extern "C" __global__ void take_rows(uint4* out, const uint4* table, const int* index,
                                     int num_rows, int row_vecs) {
  let_next_start();
  wait_for_previous();
  const int row = index[blockIdx.x];
  const bool known = row >= 0 && row < num_rows;
  for (int v = blockIdx.y * blockDim.x + threadIdx.x; v < row_vecs; v += gridDim.y * blockDim.x) {
    const uint4 zero = {0, 0, 0, 0};
    out[size_t(blockIdx.x) * row_vecs + v] = known ? table[size_t(row) * row_vecs + v] : zero;
  }
}
