// bitmask_linear on CPU: skinny products straight from the packed weight, and its expansion for wide ones.
//
// Bytes per output row at batch 1: d_in / 8 of mask + kept x item of values; 2:4 in bf16 is 9/16 of the dense row.

#include "simd.hpp"

struct Weight {
  const uint8_t *values, *mask;
  const int64_t* row_offsets;  // null when every row keeps per_row values
  int64_t nnz, per_row, d_in;
  int dtype, level;
  int64_t begin(int64_t i) const { return row_offsets ? row_offsets[i] : i * per_row; }
  int64_t kept(int64_t i) const { return row_offsets ? row_offsets[i + 1] - row_offsets[i] : per_row; }
  Row row(int64_t i) const {
    int64_t bytes = (d_in + 7) / 8;
    return {values + begin(i) * item_size(dtype), mask + i * bytes, bytes};
  }
  bool offsets_fit(int64_t d_out) const { return row_offsets ? rises(row_offsets, d_out, nnz) : nnz == d_out * per_row; }
  bool row_fits(int64_t i) const { return keeps(level, mask + i * ((d_in + 7) / 8), d_in, kept(i)); }
};

// y (n, d_out) = x (n, d_in) W^T + bias, x, values, bias and y of one dtype. Not 0, and y is not to be used, when mask,
// values (nnz) and offsets do not belong together.
EXPORT int slimzoo_bitmask_linear(const void* x, const void* values, const uint8_t* mask,
                                       const int64_t* row_offsets, const void* bias, void* y, int64_t n, int64_t d_out,
                                       int64_t d_in, int64_t nnz, int64_t per_row, int dtype, int level, int threads) {
  Weight w{(const uint8_t*)values, mask, row_offsets, nnz, per_row, d_in, dtype, level};
  if (!w.offsets_fit(d_out)) return 1;
  int misfits = 0;
  Vectors vectors(n, d_in);
  vectors.fill(x, dtype);
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : misfits)
  for (int64_t g = 0; g < (d_out + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE; g++) {
    int64_t i = g * ROWS_AT_ONCE, kept[ROWS_AT_ONCE];
    int rows = (int)std::min<int64_t>(ROWS_AT_ONCE, d_out - i);
    Row group[ROWS_AT_ONCE];
    bool fits = true;
    for (int r = 0; r < rows; r++) group[r] = w.row(i + r), kept[r] = w.kept(i + r), fits &= w.row_fits(i + r);
    if (!fits) {
      misfits = 1;
      continue;
    }
    float out[ROWS_AT_ONCE * MAX_VECTORS];
    for (int64_t first = 0; first < n; first += MAX_VECTORS) {
      int count = (int)std::min<int64_t>(MAX_VECTORS, n - first);
      sparse_dots(level, group, kept, rows, dtype, vectors, first, count, out);
      for (int r = 0; r < rows; r++)
        for (int j = 0; j < count; j++)
          store_float(y, (first + j) * d_out + i + r,
                      out[r * MAX_VECTORS + j] + (bias ? load_float(bias, i + r, dtype) : 0), dtype);
    }
  }
  return misfits;
}

// Rows [first, last) of the d_out of the dense weight, in the dtype of the values; the result as above.
EXPORT int slimzoo_bitmask_expand(const void* values, const uint8_t* mask, const int64_t* row_offsets, void* out,
                                  int64_t first, int64_t last, int64_t d_out, int64_t d_in, int64_t nnz, int64_t per_row,
                                  int dtype, int level, int threads) {
  Weight w{(const uint8_t*)values, mask, row_offsets, nnz, per_row, d_in, dtype, level};
  if (!w.offsets_fit(d_out)) return 1;
  int misfits = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : misfits)
  for (int64_t i = first; i < last; i++)
    if (w.row_fits(i)) expand_row(level, w.row(i), dtype, d_in, (uint8_t*)out + (i - first) * d_in * item_size(dtype));
    else misfits = 1;
  return misfits;
}
