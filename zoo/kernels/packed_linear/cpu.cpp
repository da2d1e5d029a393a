// packed_linear on CPU: products of x with weights of 1 to 8 bits, straight from the packed codes, in integers.
//
// x becomes a fixed-point number per chunk of 32 inputs: x ~ xscale (d0 + d1/256 + ...) with signed 8-bit digits,
// 2 for 16-bit floats (15 bits) and 3 for fp32 (23 bits): more than the float's own rounding, relative to the largest x of
// the chunk. Then with integer dots D = sum code x over a chunk, and X = sum x over it,
//     y_i = sum_chunks scale_i xscale (D_i - zero_i X).
// AVX-512 multiplies 64 codes by one digit in one instruction. Per 64 bytes of 4-bit codes, i.e. 128 weights: 3 to unpack,
// 4 products and 6 to shift, convert and scale: about 13 cycles for 64 + 3 to 8 bytes, 18 GB/s per core at 3.6 GHz.
// x is laid out in the order in which unpacking yields the codes, so that no code is ever shuffled.
#include <omp.h>

#include "simd.hpp"

enum Zeros : int { NONE = 0, INTEGER = 1, FLOAT = 2 };

static const int PLANES[9][3] = {{0}, {1}, {2}, {2, 1}, {4}, {4, 1}, {4, 2}, {0}, {8}};  // widths from the low bits up

static const int64_t CHUNK = 32;  // inputs of one fixed-point scale; groups are multiples of it

struct Weight {
  const uint8_t* codes;
  const void *scales, *zeros;
  int64_t d_in, groups;
  int bits, zeros_kind, dtype;
  int64_t chunks() const { return d_in / CHUNK; }
  int64_t row_bytes() const { return d_in * bits / 8; }
  // scale and zero of every chunk of row i
  void row(int64_t i, float* scale, float* zero) const {
    int64_t repeat = chunks() / groups;
    for (int64_t g = 0; g < groups; g++) {
      float s = load_float(scales, i * groups + g, dtype), z = 1 << (bits - 1);
      if (zeros_kind == INTEGER) z = ((const uint8_t*)zeros)[i * groups + g];
      if (zeros_kind == FLOAT) z = load_float(zeros, i * groups + g, dtype);
      for (int64_t r = 0; r < repeat; r++) scale[g * repeat + r] = s, zero[g * repeat + r] = z;
    }
  }
};

static const int TILE = 16;  // floats that a vector of scales may read past the last chunk

// x in fixed point, in the layout of one plane: digit d of the code that unpacking step s, shift k, byte i yields.
// The digits of x in the order in which a plane's codes are unpacked: for every step of 16 or 64 bytes, every shift and every
// digit, as many digits as bytes.
struct Digits {
  std::vector<int8_t> bytes;   // for AVX-512
  std::vector<int16_t> words;  // for AVX2, which multiplies 16 bits: one digit of 16, or two for fp32
};

// Where the groups of 16 chunks at a time are: chunk c is of group first[c / 16] + inside[c].
struct Groups {
  std::vector<int32_t> inside, first;
  Groups(int64_t chunks, int64_t groups) : inside((chunks + 15) / 16 * 16), first((chunks + 15) / 16) {
    int64_t repeat = chunks / groups;
    for (int64_t c = 0; c < chunks; c++) {
      if (c % 16 == 0) first[c / 16] = (int32_t)(c / repeat);
      inside[c] = (int32_t)(c / repeat - first[c / 16]);
    }
  }
};

struct FixedPoint {
  int64_t n, d_in, chunks;
  int digits;
  std::vector<float> scale, scale_sum;  // n x (chunks + TILE): xscale, and xscale X
  std::vector<int32_t> value;           // n x d_in
  bool finite = true;

  // Loops that compilers vectorise for the least machine: this runs once a call, on one core.
  FixedPoint(const void* x, int64_t n, int64_t d_in, int digits, int dtype)
      : n(n), d_in(d_in), chunks(d_in / CHUNK), digits(digits), scale(n * (chunks + TILE)),
        scale_sum(n * (chunks + TILE)), value(n * d_in) {
    std::vector<float> row(d_in);
    for (int64_t r = 0; r < n; r++) {
      if (dtype == BF16)
        for (int64_t j = 0; j < d_in; j++) row[j] = bf16_to_float(((const uint16_t*)x)[r * d_in + j]);
      else
        for (int64_t j = 0; j < d_in; j++) row[j] = load_float(x, r * d_in + j, dtype);
      for (int64_t c = 0; c < chunks; c++) {
        uint32_t bits[CHUNK], peak_bits = 0;
        std::memcpy(bits, &row[c * CHUNK], sizeof bits);
        for (uint32_t b : bits) peak_bits = std::max(peak_bits, b & 0x7fffffffu);
        finite = finite && peak_bits < 0x7f800000u;
        float peak, step, inverse;
        std::memcpy(&peak, &peak_bits, 4);
        if (digits == 1) {
          step = peak / 127, inverse = peak > 1e-30f ? 127 / peak : 0;
        } else {  // a power of two with |x| / step < 2^(8 digits - 2): x of few bits, as bf16, is kept whole
          int exponent = (int)(peak_bits >> 23) - 126 - (8 * digits - 2);
          bool normal = exponent > -126 && exponent < 126;  // what is smaller counts as 0
          step = std::ldexp(1.0f, normal ? exponent : 0), inverse = normal ? 1 / step : 0;
        }
        if (!finite) inverse = 0;
        int32_t sum = 0, *v = &value[r * d_in + c * CHUNK];
        for (int64_t j = 0; j < CHUNK; j++) {  // adding 1.5 x 2^23 rounds to the nearest integer
          float shifted = row[c * CHUNK + j] * inverse + 12582912.0f;
          int32_t rounded;
          std::memcpy(&rounded, &shifted, 4);
          v[j] = inverse != 0 ? rounded - 0x4b400000 : 0;
          sum += v[j];
        }
        scale[r * (chunks + TILE) + c] = step;
        scale_sum[r * (chunks + TILE) + c] = step * (float)sum;
      }
    }
  }

  // Four bytes of a plane hold 32 / width consecutive columns, column j in byte j % 4: so quadruples of columns move together.
  template <typename Digit, int PARTS>
  void lay_out(int width, int64_t step_bytes, std::vector<Digit>& out) const {
    struct Quad { Digit digit[4]; };
    int64_t quads = d_in * width / 32, in_step = step_bytes / 4, steps = (quads + in_step - 1) / in_step;
    int64_t shifts = 8 / width, row = steps * shifts * PARTS * in_step;
    out.resize(n * row * 4);
    Quad* to = (Quad*)out.data();
    std::vector<Digit> split(PARTS * d_in);
    for (int64_t r = 0; r < n; r++) {
      for (int64_t j = 0; j < d_in; j++) {  // the lowest digit first, each but the top one in [-half, half)
        int32_t rest = value[r * d_in + j];
        for (int d = PARTS - 1; d > 0; d--) {
          Digit low = (Digit)rest;
          split[d * d_in + j] = low, rest = (rest - low) >> (8 * sizeof(Digit));
        }
        split[j] = (Digit)rest;
      }
      for (int64_t q = 0; q < quads; q++)
        for (int64_t k = 0; k < shifts; k++)
          for (int d = 0; d < PARTS; d++)
            std::memcpy(&to[r * row + ((q / in_step * shifts + k) * PARTS + d) * in_step + q % in_step],
                        &split[d * d_in + (q * shifts + k) * 4], sizeof(Quad));
    }
  }

  Digits laid_out(int width, bool as_words) const {
    Digits out;
    if (as_words && digits == 3) lay_out<int16_t, 2>(width, 16, out.words);
    else if (as_words) lay_out<int16_t, 1>(width, 16, out.words);
    else if (digits == 1) lay_out<int8_t, 1>(width, 64, out.bytes);
    else if (digits == 2) lay_out<int8_t, 2>(width, 64, out.bytes);
    else lay_out<int8_t, 3>(width, 64, out.bytes);
    return out;
  }
};

// ------------------------------------------------------------------------------------------------------- portable

namespace portable {
inline void unpack(const Weight& w, int64_t i, uint8_t* codes) {
  const uint8_t* plane = w.codes + i * w.row_bytes();
  std::memset(codes, 0, w.d_in);
  for (int p = 0, shift = 0; PLANES[w.bits][p]; p++) {
    int width = PLANES[w.bits][p];
    int64_t bytes = w.d_in * width / 8;
    for (int64_t q = 0; q < bytes / 4; q++) {
      uint32_t quad;
      std::memcpy(&quad, plane + 4 * q, 4);
      for (int k = 0; k < 8 / width; k++) {
        uint32_t code = (quad >> (k * width) & ((1u << width) - 1) * 0x01010101u) << shift, old;
        std::memcpy(&old, codes + (q * 8 / width + k) * 4, 4);
        code |= old;
        std::memcpy(codes + (q * 8 / width + k) * 4, &code, 4);
      }
    }
    plane += bytes;
    shift += width;
  }
}

inline void dots(const Weight& w, int64_t i, const FixedPoint& x, int64_t first, int count, const float* scale,
                 uint8_t* codes, float* out) {
  unpack(w, i, codes);
  for (int b = 0; b < count; b++) {
    const int32_t* value = &x.value[(first + b) * x.d_in];
    const float* xscale = &x.scale[(first + b) * (x.chunks + TILE)];
    float total = 0;
    for (int64_t c = 0; c < x.chunks; c++) {
      int64_t dot = 0;
      for (int64_t j = c * CHUNK; j < (c + 1) * CHUNK; j++) dot += (int64_t)codes[j] * value[j];
      total += scale[c] * xscale[c] * (float)dot;
    }
    out[b] = total;
  }
}
}  // namespace portable

#ifdef X86
// ----------------------------------------------------------------------------------------------------------- AVX2
// 16 bytes a step; codes are widened to 16 bits and multiplied in pairs: a lane of the sum stands for two bytes.

namespace avx2 {
TARGET_AVX2 inline void plane_dots(const uint8_t* plane, int width, int parts, const FixedPoint& x, const Digits& laid,
                                   int64_t first, int count, const float* t, __m256* acc) {
  int64_t bytes = x.d_in * width / 8, steps = (bytes + 15) / 16, shifts = 8 / width;
  const __m128i mask = _mm_set1_epi8((char)((1 << width) - 1));
  alignas(32) int32_t lane[8];
  for (int l = 0; l < 8; l++) lane[l] = l / 2 / width;
  const __m256i at = _mm256_load_si256((const __m256i*)lane);
  for (int64_t s = 0; s < steps; s++) {
    __m128i packed;
    if (16 * s + 16 <= bytes) {
      packed = _mm_loadu_si128((const __m128i*)(plane + 16 * s));
    } else {
      alignas(16) uint8_t tail[16] = {};
      std::memcpy(tail, plane + 16 * s, bytes - 16 * s);
      packed = _mm_load_si128((const __m128i*)tail);
    }
    for (int b = 0; b < count; b++) {
      __m256i high = _mm256_setzero_si256(), low = high;
      const int16_t* digits = &laid.words[((first + b) * steps + s) * shifts * parts * 16];
      for (int k = 0; k < shifts; k++) {
        __m256i codes = _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srl_epi16(packed, _mm_cvtsi32_si128(k * width)), mask));
        high = _mm256_add_epi32(high, _mm256_madd_epi16(codes, _mm256_loadu_si256((const __m256i*)(digits + k * parts * 16))));
        if (parts == 2)
          low = _mm256_add_epi32(low, _mm256_madd_epi16(codes, _mm256_loadu_si256((const __m256i*)(digits + k * 32 + 16))));
      }
      __m256 dot = _mm256_cvtepi32_ps(high);
      if (parts == 2) dot = _mm256_fmadd_ps(dot, _mm256_set1_ps(65536), _mm256_cvtepi32_ps(low));
      __m256 scale = _mm256_permutevar8x32_ps(_mm256_loadu_ps(t + b * (x.chunks + TILE) + 4 * s / width), at);
      acc[b] = _mm256_fmadd_ps(dot, scale, acc[b]);
    }
  }
}

TARGET_AVX2 inline void dots(const Weight& w, int64_t i, const FixedPoint& x, const Digits* laid, int64_t first, int count,
                             const float* t, float* out) {
  __m256 acc[MAX_VECTORS];
  for (int b = 0; b < count; b++) acc[b] = _mm256_setzero_ps();
  const uint8_t* end = w.codes + (i + 1) * w.row_bytes();
  int planes = PLANES[w.bits][1] ? 2 : 1;
  for (int p = planes - 1; p >= 0; p--) {  // the high plane first: then its sums are worth 2^(bits below)
    int width = PLANES[w.bits][p];
    end -= w.d_in * width / 8;
    plane_dots(end, width, x.digits == 3 ? 2 : 1, x, laid[p], first, count, t, acc);
    if (p)
      for (int b = 0; b < count; b++) acc[b] = _mm256_mul_ps(acc[b], _mm256_set1_ps((float)(1 << PLANES[w.bits][0])));
  }
  for (int b = 0; b < count; b++) out[b] = sum(acc[b]);
}
}  // namespace avx2

// -------------------------------------------------------------------------------------------------------- AVX-512
// 64 bytes a step; a lane of the sum stands for four bytes.

#define TARGET_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512vnni,popcnt,bmi2")))
namespace avx512 {
// For row i and COUNT vectors: t = scale xscale of every chunk, and the sum of scale zero xscale X, which is to be taken off.
template <int COUNT>
TARGET_VNNI inline void row_scales(const Weight& w, int64_t i, const FixedPoint& x, int64_t first, const Groups& groups,
                                   float* t, float* gathered, float* offset) {
  float *scale = gathered, *zero = gathered + w.groups + 16;
  for (int64_t g = 0; g < w.groups; g += 16) {
    __mmask16 m = w.groups - g >= 16 ? 0xffff : (1u << (w.groups - g)) - 1;
    __m512 z = _mm512_set1_ps((float)(1 << (w.bits - 1)));
    if (w.zeros_kind == INTEGER)
      z = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(m, (const uint8_t*)w.zeros + i * w.groups + g)));
    if (w.zeros_kind == FLOAT) z = load16(w.zeros, i * w.groups + g, w.dtype, m);
    __m512 s = load16(w.scales, i * w.groups + g, w.dtype, m);
    _mm512_storeu_ps(scale + g, s);
    _mm512_storeu_ps(zero + g, _mm512_mul_ps(s, z));
  }
  const int64_t stride = x.chunks + TILE;
  __m512 total[COUNT];
  for (int b = 0; b < COUNT; b++) total[b] = _mm512_setzero_ps();
  for (int64_t c = 0; c < x.chunks; c += 16) {
    __m512i inside = _mm512_loadu_si512(&groups.inside[c]);
    __m512 s = _mm512_permutexvar_ps(inside, _mm512_loadu_ps(scale + groups.first[c / 16]));
    __m512 z = _mm512_permutexvar_ps(inside, _mm512_loadu_ps(zero + groups.first[c / 16]));
    for (int b = 0; b < COUNT; b++) {  // beyond the last chunk xscale and X are 0
      _mm512_storeu_ps(t + b * stride + c, _mm512_mul_ps(s, _mm512_loadu_ps(&x.scale[(first + b) * stride + c])));
      total[b] = _mm512_fmadd_ps(z, _mm512_loadu_ps(&x.scale_sum[(first + b) * stride + c]), total[b]);
    }
  }
  for (int b = 0; b < COUNT; b++) offset[b] = _mm512_reduce_add_ps(total[b]);
}

template <int WIDTH, int DIGITS, int ROWS, int COUNT>
TARGET_VNNI inline void plane_dots(const uint8_t* const* planes, const FixedPoint& x, const Digits& laid, int64_t first,
                                   const float* t, __m512 (*totals)[COUNT]) {
  constexpr int SHIFTS = 8 / WIDTH;
  const int64_t bytes = x.d_in * WIDTH / 8, steps = (bytes + 63) / 64;
  const __m512i mask = _mm512_set1_epi8((char)((1 << WIDTH) - 1));
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i at = _mm512_srli_epi32(lane, WIDTH == 8 ? 3 : WIDTH / 2);  // WIDTH lanes to a chunk
  const int64_t stride = x.chunks + TILE, x_stride = steps * SHIFTS * DIGITS * 64;
  const int8_t* digits = &laid.bytes[first * x_stride];
  __m512 acc[ROWS][COUNT];  // in registers
  for (int r = 0; r < ROWS; r++)
    for (int b = 0; b < COUNT; b++) acc[r][b] = totals[r][b];
  for (int64_t s = 0; s < steps; s++) {
    __m512i codes[ROWS][SHIFTS];
    for (int r = 0; r < ROWS; r++) {
      const uint8_t* at_byte = planes[r] + 64 * s;
      __m512i packed = 64 * s + 64 <= bytes ? _mm512_loadu_si512(at_byte)
                                            : _mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, bytes - 64 * s), at_byte);
      _mm_prefetch((const char*)at_byte + PREFETCH, _MM_HINT_T0);
      for (int k = 0; k < SHIFTS; k++)
        codes[r][k] = WIDTH == 8 ? packed : _mm512_and_si512(k ? _mm512_srli_epi16(packed, k * WIDTH) : packed, mask);
    }
    for (int b = 0; b < COUNT; b++) {
      const int8_t* d = digits + b * x_stride + s * SHIFTS * DIGITS * 64;
      __m512i sum[ROWS][DIGITS];
      for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < DIGITS; j++) sum[r][j] = _mm512_setzero_si512();
      for (int k = 0; k < SHIFTS; k++)
        for (int j = 0; j < DIGITS; j++) {
          __m512i digit = _mm512_loadu_si512(d + (k * DIGITS + j) * 64);
          for (int r = 0; r < ROWS; r++) sum[r][j] = _mm512_dpbusd_epi32(sum[r][j], codes[r][k], digit);
        }
      for (int r = 0; r < ROWS; r++) {
        __m512i top = sum[r][0];
        if (DIGITS > 1) top = _mm512_add_epi32(_mm512_slli_epi32(top, 8), sum[r][DIGITS > 1]);
        __m512 dot = _mm512_cvtepi32_ps(top);
        if (DIGITS > 2) dot = _mm512_fmadd_ps(dot, _mm512_set1_ps(256), _mm512_cvtepi32_ps(sum[r][DIGITS - 1]));
        const float* scales = t + (r * MAX_VECTORS + b) * stride + 16 / WIDTH * s;
        acc[r][b] = _mm512_fmadd_ps(dot, _mm512_permutexvar_ps(at, _mm512_loadu_ps(scales)), acc[r][b]);
      }
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int b = 0; b < COUNT; b++) totals[r][b] = acc[r][b];
}

// ROWS rows from row i on times COUNT vectors: out[r * MAX_VECTORS + b]; x is loaded once for all rows.
template <int DIGITS, int ROWS, int COUNT>
TARGET_VNNI inline void dots(const Weight& w, int64_t i, const FixedPoint& x, const Digits* laid, int64_t first,
                             const Groups& groups, float* t, float* gathered, float* out) {
  __m512 acc[ROWS][COUNT];
  const uint8_t* planes[ROWS];
  for (int r = 0; r < ROWS; r++) {
    row_scales<COUNT>(w, i + r, x, first, groups, t + r * MAX_VECTORS * (x.chunks + TILE), gathered,
                      out + r * MAX_VECTORS);
    for (int b = 0; b < COUNT; b++) acc[r][b] = _mm512_setzero_ps();
    planes[r] = w.codes + (i + r + 1) * w.row_bytes();
  }
  for (int p = PLANES[w.bits][1] ? 1 : 0; p >= 0; p--) {  // the high plane first: its sums are worth 2^(bits below)
    int width = PLANES[w.bits][p];
    for (int r = 0; r < ROWS; r++) planes[r] -= w.d_in * width / 8;
    if (width == 1) plane_dots<1, DIGITS, ROWS, COUNT>(planes, x, laid[p], first, t, acc);
    else if (width == 2) plane_dots<2, DIGITS, ROWS, COUNT>(planes, x, laid[p], first, t, acc);
    else if (width == 4) plane_dots<4, DIGITS, ROWS, COUNT>(planes, x, laid[p], first, t, acc);
    else plane_dots<8, DIGITS, ROWS, COUNT>(planes, x, laid[p], first, t, acc);
    if (p)
      for (int r = 0; r < ROWS; r++)
        for (int b = 0; b < COUNT; b++)
          acc[r][b] = _mm512_mul_ps(acc[r][b], _mm512_set1_ps((float)(1 << PLANES[w.bits][0])));
  }
  for (int r = 0; r < ROWS; r++)
    for (int b = 0; b < COUNT; b++)
      out[r * MAX_VECTORS + b] = _mm512_reduce_add_ps(acc[r][b]) - out[r * MAX_VECTORS + b];
}

template <int DIGITS, int ROWS>
TARGET_VNNI inline void dots(const Weight& w, int64_t i, const FixedPoint& x, const Digits* laid, int64_t first, int count,
                             const Groups& groups, float* t, float* gathered, float* out) {
  switch (count) {
    case 1: return dots<DIGITS, ROWS, 1>(w, i, x, laid, first, groups, t, gathered, out);
    case 2: return dots<DIGITS, ROWS, 2>(w, i, x, laid, first, groups, t, gathered, out);
    case 3: return dots<DIGITS, ROWS, 3>(w, i, x, laid, first, groups, t, gathered, out);
    case 4: return dots<DIGITS, ROWS, 4>(w, i, x, laid, first, groups, t, gathered, out);
    case 5: return dots<DIGITS, ROWS, 5>(w, i, x, laid, first, groups, t, gathered, out);
    case 6: return dots<DIGITS, ROWS, 6>(w, i, x, laid, first, groups, t, gathered, out);
    case 7: return dots<DIGITS, ROWS, 7>(w, i, x, laid, first, groups, t, gathered, out);
    default: return dots<DIGITS, ROWS, 8>(w, i, x, laid, first, groups, t, gathered, out);
  }
}

template <int ROWS>
TARGET_VNNI inline void dots(const Weight& w, int64_t i, const FixedPoint& x, const Digits* laid, int64_t first, int count,
                             const Groups& groups, float* t, float* gathered, float* out) {
  if (x.digits == 1) dots<1, ROWS>(w, i, x, laid, first, count, groups, t, gathered, out);
  else if (x.digits == 2) dots<2, ROWS>(w, i, x, laid, first, count, groups, t, gathered, out);
  else dots<3, ROWS>(w, i, x, laid, first, count, groups, t, gathered, out);
}

// codes (d_in,) -> (code - zero) scale in the dtype of the weight
TARGET_AVX512 inline void scale_codes(const Weight& w, const uint8_t* codes, const float* scale, const float* zero,
                                      uint8_t* out) {
  for (int64_t j = 0; j < w.d_in; j += 16) {
    __m512 s = _mm512_set1_ps(scale[j / CHUNK]), z = _mm512_set1_ps(zero[j / CHUNK]);
    __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + j))));
    __m512 v = _mm512_mul_ps(_mm512_sub_ps(code, z), s);
    if (w.dtype == F32) {
      _mm512_storeu_ps(out + 4 * j, v);
    } else if (w.dtype == F16) {
      _mm256_storeu_si256((__m256i*)(out + 2 * j), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    } else {
      __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      bits = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
      _mm256_storeu_si256((__m256i*)(out + 2 * j), _mm512_cvtepi32_epi16(bits));
    }
  }
}
}  // namespace avx512
#endif

// ------------------------------------------------------------------------------------------------------ entry points

// y (n, d_out) = x (n, d_in) W^T + bias; x, scales, float zeros, bias and y of one dtype. Returns 0, or 1 with y untouched
// when x holds NaN or Inf, which have no fixed-point form.
extern "C" int slimzoo_packed_linear(const void* x, const uint8_t* qweight, const void* scales, const void* zeros,
                                     const void* bias, void* y, int64_t n, int64_t d_out, int64_t d_in, int64_t groups,
                                     int bits, int zeros_kind, int digits, int dtype, int level,
                                     int threads) {
  Weight w{qweight, scales, zeros, d_in, groups, bits, zeros_kind, dtype};
  FixedPoint fixed(x, n, d_in, digits, dtype);
  if (!fixed.finite) return 1;
  Digits laid[2];
  int64_t chunks = fixed.chunks, stride = chunks + TILE;
  if (level >= AVX2)
    for (int p = 0; p < 2 && PLANES[bits][p]; p++)
      laid[p] = fixed.laid_out(PLANES[bits][p], level == AVX2);
  Groups where(chunks, groups);
  const int at_once = level >= AVX512 && n > 1 ? 2 : 1;  // rows that share each load of x; alone, one stream is faster
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scale(stride), zero(stride), t(2 * MAX_VECTORS * stride), gathered(2 * (groups + 16));
    std::vector<uint8_t> codes(level >= AVX2 ? 0 : d_in);
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < (d_out + at_once - 1) / at_once; pair++) {
      int64_t i = pair * at_once;
      int rows = (int)std::min<int64_t>(at_once, d_out - i);
      float out[2 * MAX_VECTORS];
      if (level < AVX512) w.row(i, scale.data(), zero.data());
      for (int64_t first = 0; first < n; first += MAX_VECTORS) {
        int count = (int)std::min<int64_t>(MAX_VECTORS, n - first);
#ifdef X86
        if (level >= AVX512) {
          if (rows == 2) avx512::dots<2>(w, i, fixed, laid, first, count, where, t.data(), gathered.data(), out);
          else avx512::dots<1>(w, i, fixed, laid, first, count, where, t.data(), gathered.data(), out);
        } else if (level == AVX2) {
          for (int b = 0; b < count; b++)
            for (int64_t c = 0; c < chunks; c++) t[b * stride + c] = scale[c] * fixed.scale[(first + b) * stride + c];
          avx2::dots(w, i, fixed, laid, first, count, t.data(), out);
        }
#endif
        if (level < AVX2) portable::dots(w, i, fixed, first, count, scale.data(), codes.data(), out);
        if (level < AVX512)
          for (int b = 0; b < count; b++)
            for (int64_t c = 0; c < chunks; c++) out[b] -= scale[c] * zero[c] * fixed.scale_sum[(first + b) * stride + c];
        for (int r = 0; r < rows; r++)
          for (int b = 0; b < count; b++) {
            float add = bias ? load_float(bias, i + r, dtype) : 0;
            store_float(y, (first + b) * d_out + i + r, out[r * MAX_VECTORS + b] + add, dtype);
          }
      }
    }
  }
  return 0;
}

// Rows [first, last) of the dense weight, in the dtype of the scales.
extern "C" void slimzoo_packed_expand(const uint8_t* qweight, const void* scales, const void* zeros, void* out, int64_t first,
                                      int64_t last, int64_t d_in, int64_t groups, int bits, int zeros_kind,
                                      int dtype, int level, int threads) {
  Weight w{qweight, scales, zeros, d_in, groups, bits, zeros_kind, dtype};
  int64_t item = item_size(dtype);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scale(w.chunks()), zero(w.chunks());
    std::vector<uint8_t> codes(d_in);
#pragma omp for schedule(static)
    for (int64_t i = first; i < last; i++) {
      w.row(i, scale.data(), zero.data());
      portable::unpack(w, i, codes.data());
      uint8_t* to = (uint8_t*)out + (i - first) * d_in * item;
#ifdef X86
      if (level >= AVX512) {
        avx512::scale_codes(w, codes.data(), scale.data(), zero.data(), to);
        continue;
      }
#endif
      for (int64_t j = 0; j < d_in; j++) store_float(to, j, (codes[j] - zero[j / CHUNK]) * scale[j / CHUNK], dtype);
    }
  }
}
