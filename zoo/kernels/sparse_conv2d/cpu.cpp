// sparse_conv2d on CPU: a direct convolution that multiplies by the kept weights only, without unfolding the image.
//
// The image is padded once, and for a stride s cut into s x s phases, so that the pixels that one weight meets lie side by
// side. A plane's rows are then taken as one long line: the output is computed on that line, with a few columns too many
// between two rows that nobody reads. TILE vectors of it stay in registers while all kept weights of the output channel
// pass: one load and one multiply-add a vector and weight. So the work is the dense one's times its MAC ratio; lines come
// from the first two cache levels, weights are read once for each tile.

#include "simd.hpp"

static const int TILE = 8;
static const int64_t CHUNK = 1 << 20;  // floats of padded image prepared together

struct Shape {
  int64_t images, channels, height, width, d_out, kh, kw, sy, sx, py, px, dy, dx, groups;
  int64_t lines() const { return (height + 2 * py + sy - 1) / sy; }   // height of a phase
  int64_t line() const { return (width + 2 * px + sx - 1) / sx; }     // width of a phase
  int64_t plane() const { return lines() * line(); }
  int64_t phases() const { return sy * sx; }
  int64_t image() const { return channels * phases() * plane(); }
  int64_t out_height() const { return (height + 2 * py - dy * (kh - 1) - 1) / sy + 1; }
  int64_t out_width() const { return (width + 2 * px - dx * (kw - 1) - 1) / sx + 1; }
  int64_t length() const { return (out_height() - 1) * line() + out_width(); }
  bool reads(int64_t phase_y, int64_t phase_x) const {
    bool row = false, column = false;
    for (int64_t k = 0; k < kh; k++) row |= k * dy % sy == phase_y;
    for (int64_t k = 0; k < kw; k++) column |= k * dx % sx == phase_x;
    return row && column;
  }
};

// Rows are often shorter than what a call of memcpy costs: pieces of known size are copied in line.
static inline void copy(float* to, const float* from, int64_t n) {
  for (; n >= 8; n -= 8, to += 8, from += 8) std::memcpy(to, from, 32);
  if (n & 4) std::memcpy(to, from, 16), to += 4, from += 4;
  if (n & 2) std::memcpy(to, from, 8), to += 2, from += 2;
  if (n & 1) *to = *from;
}

// One channel of one image, fp32, padded with zeros, phase after phase.
static void pad_channel(const Shape& s, const void* x, int64_t first, int dtype, float* out) {
  for (int64_t fy = 0; fy < s.sy; fy++)
    for (int64_t fx = 0; fx < s.sx; fx++) {
      float* to = out + (fy * s.sx + fx) * s.plane();
      if (!s.reads(fy, fx)) continue;
      for (int64_t r = 0; r < s.lines(); r++, to += s.line()) {
        int64_t y = r * s.sy + fy - s.py;
        if (y < 0 || y >= s.height) {
          std::fill(to, to + s.line(), 0.0f);
          continue;
        }
        const int64_t row = first + y * s.width;
        int64_t begin = std::min(s.line(), std::max<int64_t>(0, (s.px - fx + s.sx - 1) / s.sx));  // where pixels start,
        int64_t end = std::max(begin, std::min(s.line(), (s.width + s.px - fx + s.sx - 1) / s.sx));  // and end
        for (int64_t c = 0; c < begin; c++) to[c] = 0;
        if (dtype == F32 && s.sx == 1)
          copy(to + begin, (const float*)x + row + begin - s.px, end - begin);
        else
          for (int64_t c = begin; c < end; c++) to[c] = load_float(x, row + c * s.sx + fx - s.px, dtype);
        for (int64_t c = end; c < s.line(); c++) to[c] = 0;
      }
    }
}

// out[t] = bias + sum_i values[i] image[offsets[i] + t] for `count` vectors of t.
#define LINE(NAME, TARGET, VECTOR, LANES, LOAD, STORE, SET, MULTIPLY_ADD)                                               \
  template <int N>                                                                                                      \
  TARGET static inline void NAME##_tile(const float* image, const int32_t* offsets, const float* values, int64_t kept,  \
                                        float bias, float* out) {                                                       \
    VECTOR sum[N];                                                                                                      \
    _Pragma("GCC unroll 8") for (int n = 0; n < N; n++) sum[n] = SET(bias);                                             \
    for (int64_t i = 0; i < kept; i++) {                                                                                \
      const float* from = image + offsets[i];                                                                           \
      VECTOR value = SET(values[i]);                                                                                    \
      _Pragma("GCC unroll 8") for (int n = 0; n < N; n++)                                                               \
          sum[n] = MULTIPLY_ADD(value, LOAD(from + n * LANES), sum[n]);                                                 \
    }                                                                                                                   \
    _Pragma("GCC unroll 8") for (int n = 0; n < N; n++) STORE(out + n * LANES, sum[n]);                                 \
  }                                                                                                                     \
  TARGET static void NAME(const float* image, const int32_t* offsets, const float* values, int64_t kept, float bias,    \
                          float* out, int64_t length) {                                                                 \
    int64_t vectors = (length + LANES - 1) / LANES, v = 0;                                                              \
    for (; v + TILE <= vectors; v += TILE)                                                                              \
      NAME##_tile<TILE>(image + v * LANES, offsets, values, kept, bias, out + v * LANES);                               \
    if (vectors - v >= 4) {                                                                                             \
      NAME##_tile<4>(image + v * LANES, offsets, values, kept, bias, out + v * LANES);                                  \
      v += 4;                                                                                                           \
    }                                                                                                                   \
    if (vectors - v >= 2) {                                                                                             \
      NAME##_tile<2>(image + v * LANES, offsets, values, kept, bias, out + v * LANES);                                  \
      v += 2;                                                                                                           \
    }                                                                                                                   \
    if (v < vectors) NAME##_tile<1>(image + v * LANES, offsets, values, kept, bias, out + v * LANES);                   \
  }

struct Four {
  float lane[4];
};
static inline Four load4(const float* p) { return {p[0], p[1], p[2], p[3]}; }
static inline void store4(float* p, Four a) { std::memcpy(p, a.lane, 16); }
static inline Four set4(float a) { return {a, a, a, a}; }
static inline Four multiply_add4(Four a, Four b, Four c) {
  for (int i = 0; i < 4; i++) c.lane[i] += a.lane[i] * b.lane[i];
  return c;
}
LINE(line_portable, , Four, 4, load4, store4, set4, multiply_add4)
#ifdef X86
LINE(line_avx2, TARGET_AVX2, __m256, 8, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_set1_ps, _mm256_fmadd_ps)
LINE(line_avx512, TARGET_AVX512, __m512, 16, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_set1_ps, _mm512_fmadd_ps)
#endif

// out (images, d_out, H', W') = convolution of x (images, channels, H, W) with a bitmask weight; one dtype, fp32 sums.
// sizes: the members of Shape in their order. Not 0, and nothing is written, when mask, values (nnz) and offsets do not
// belong together.
EXPORT int slimzoo_sparse_conv2d(const void* x, const void* values, const uint8_t* mask,
                                      const int64_t* row_offsets, const void* bias, void* out, const int64_t* sizes,
                                      int64_t nnz, int dtype, int level, int threads) {
  Shape s;
  std::memcpy(&s, sizes, sizeof s);
  if (!rises(row_offsets, s.d_out, nnz)) return 1;
  auto line = line_portable;
#ifdef X86
  if (level >= AVX2) line = line_avx2;
  if (level >= AVX512) line = line_avx512;
#endif
  int64_t channels = s.channels / s.groups, d_in = channels * s.kh * s.kw, bytes = (d_in + 7) / 8;
  int64_t kept = row_offsets[s.d_out], at_once = std::max<int64_t>(1, std::min(s.images, CHUNK / s.image()));
  static thread_local std::vector<int32_t> column, offsets;  // kept for the next call: fresh pages cost more than writing
  static thread_local std::vector<float> numbers, memory;
  column.resize(std::max<size_t>(column.size(), d_in));
  offsets.resize(std::max<size_t>(offsets.size(), kept));
  numbers.resize(std::max<size_t>(numbers.size(), kept));
  memory.resize(std::max<size_t>(memory.size(), at_once * s.image() + 64));  // vectors may read past the last plane
  for (int64_t j = 0; j < d_in; j++) {
    int64_t ky = j / s.kw % s.kh * s.dy, kx = j % s.kw * s.dx, phase = ky % s.sy * s.sx + kx % s.sx;
    column[j] = (j / (s.kh * s.kw) * s.phases() + phase) * s.plane() + ky / s.sy * s.line() + kx / s.sx;
  }
  for (int64_t o = 0; o < s.d_out; o++) {
    if (!keeps(level, mask + o * bytes, d_in, row_offsets[o + 1] - row_offsets[o])) return 1;
    int64_t at = row_offsets[o], base = o / (s.d_out / s.groups) * channels * s.phases() * s.plane();
    for (int64_t k = 0; 4 * k < bytes; k++)
      for (uint32_t m = mask_word(mask + o * bytes, k, bytes); m; m &= m - 1, at++) {
        offsets[at] = base + column[32 * k + __builtin_ctz(m)];
        numbers[at] = load_float(values, at, dtype);
      }
  }
  float *padded = memory.data(), *weights = numbers.data();
  int32_t* places = offsets.data();
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> sums(s.length() + 64);
    for (int64_t first = 0; first < s.images; first += at_once) {
      int64_t count = std::min(at_once, s.images - first);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count * s.channels; i++)
        pad_channel(s, x, (first * s.channels + i) * s.height * s.width, dtype, padded + i * s.phases() * s.plane());
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count * s.d_out; i++) {
        int64_t o = i % s.d_out, begin = row_offsets[o];
        line(padded + i / s.d_out * s.image(), places + begin, weights + begin, row_offsets[o + 1] - begin,
             bias ? load_float(bias, o, dtype) : 0.0f, sums.data(), s.length());
        int64_t to = (first * s.d_out + i) * s.out_height() * s.out_width();
        for (int64_t r = 0; r < s.out_height(); r++, to += s.out_width()) {
          const float* sum = sums.data() + r * s.line();
          if (dtype == F32)
            copy((float*)out + to, sum, s.out_width());
          else
            for (int64_t c = 0; c < s.out_width(); c++) store_float(out, to + c, sum[c], dtype);
        }
      }
    }
  }
  return 0;
}
