// block_diagonal_linear on CPU for few rows of x: every block is read once, b^2 weights for b outputs.

#include "simd.hpp"

// y (rows, n b): y_mi = sum_j blocks[m, i, j] x_mj + bias_mi, all of one dtype.
EXPORT void slimzoo_block_diagonal_linear(const void* x, const void* blocks, const void* bias, void* y,
                                              int64_t rows, int64_t n, int64_t b, int dtype, int level, int threads) {
  Vectors vectors(rows, n * b);
  vectors.fill(x, dtype);
  const uint8_t* w = (const uint8_t*)blocks;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n * b; i++) {
    float add = bias ? load_float(bias, i, dtype) : 0;
    for (int64_t r = 0; r < rows; r++) {
      const float* segment = &vectors.f32[r * vectors.stride + i / b * b];
      store_float(y, r * n * b + i, add + dense_dot(level, w + i * b * item_size(dtype), dtype, segment, b), dtype);
    }
  }
}
