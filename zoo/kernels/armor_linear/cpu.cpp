// ARMOR's whole layer y = A'(S(B' x)) + bias on CPU for few rows of x, in one parallel region: B' x block by block, a
// barrier, then each block row of A' with the rows of S that feed it. What passes between the products stays in cache.
//
// Bytes at batch 1, bf16: 9/16 of the dense weight for S, and 2 (b_out d_out + b_in d_in) for the wrappers.

#include "simd.hpp"

// y (n, d_out); all floats of one dtype. Not 0, and y is not to be used, when a row of the mask does not keep per_row columns.
EXPORT int slimzoo_armor_linear(const void* x, const void* wrap_in, const void* values, const uint8_t* mask,
                                     const void* wrap_out, const void* bias, void* y, int64_t n, int64_t d_out,
                                     int64_t d_in, int64_t b_out, int64_t b_in, int64_t per_row, int dtype, int level,
                                     int threads) {
  int64_t item = item_size(dtype), bytes = (d_in + 7) / 8;
  int misfits = 0;
  Vectors vectors(n, d_in), u(n, d_in);
  vectors.fill(x, dtype);
#pragma omp parallel num_threads(threads) reduction(| : misfits)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < d_in; i++)
      for (int64_t r = 0; r < n; r++)
        u.set(r, i, dense_dot(level, (const uint8_t*)wrap_in + i * b_in * item, dtype,
                              &vectors.f32[r * vectors.stride + i / b_in * b_in], b_in));
    std::vector<float> v(n * b_out);
#pragma omp for schedule(static)
    for (int64_t m = 0; m < d_out / b_out; m++) {
      for (int64_t i = 0; i < b_out; i += ROWS_AT_ONCE) {
        int rows = (int)std::min<int64_t>(ROWS_AT_ONCE, b_out - i);
        Row group[ROWS_AT_ONCE];
        int64_t kept[ROWS_AT_ONCE];
        bool fits = true;
        for (int r = 0; r < rows; r++) {
          int64_t row = m * b_out + i + r;
          group[r] = {(const uint8_t*)values + row * per_row * item, mask + row * bytes, bytes};
          kept[r] = per_row;
          fits &= keeps(level, group[r].mask, d_in, per_row);
        }
        if (!fits) {
          misfits = 1;
          continue;
        }
        float out[ROWS_AT_ONCE * MAX_VECTORS];
        for (int64_t first = 0; first < n; first += MAX_VECTORS) {
          int count = (int)std::min<int64_t>(MAX_VECTORS, n - first);
          sparse_dots(level, group, kept, rows, dtype, u, first, count, out);
          for (int r = 0; r < rows; r++)
            for (int j = 0; j < count; j++) v[(first + j) * b_out + i + r] = out[r * MAX_VECTORS + j];
        }
      }
      for (int64_t i = 0; i < b_out; i++) {
        int64_t row = m * b_out + i;
        float add = bias ? load_float(bias, row, dtype) : 0;
        for (int64_t r = 0; r < n; r++)
          store_float(y, r * d_out + row,
                      add + dense_dot(level, (const uint8_t*)wrap_out + row * b_out * item, dtype, &v[r * b_out], b_out),
                      dtype);
      }
    }
  }
  return misfits;
}
