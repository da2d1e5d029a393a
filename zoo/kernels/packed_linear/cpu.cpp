// packed_linear on CPU: products of x with weights of 1 to 8 bits, straight from the packed codes, in integers.
//
// x becomes a fixed-point number per chunk of 32 inputs: x ~ xscale (d0 + d1/256 + ...) with signed 8-bit digits,
// 2 for 16-bit floats (15 bits) and 3 for fp32 (23 bits): more than the float's own rounding, relative to the largest x of
// the chunk. Then with integer dots D = sum code x over a chunk, and X = sum x over it,
//     y_i = sum_chunks scale_i xscale (D_i - zero_i X).
// AVX-512 multiplies 64 codes by one digit in one instruction. Per 64 bytes of 4-bit codes, i.e. 128 weights: 3 to unpack,
// 4 products and 4 to shift, convert and scale; the six that only two of four pipes take are the bound: 6 cycles, 39 GB/s
// per core at 3.7 GHz (8 measured, from the second-level cache). Four rows at a time share the loads of x, and what comes
// next is fetched in the order of memory, three such blocks ahead: rows fetched each for itself reached half the speed.
// x is laid out in the order in which unpacking yields the codes, so that no code is ever shuffled.

#include <new>

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

static const int64_t BLOCK = 16;  // rows whose scales are converted together
#define INLINE inline __attribute__((always_inline))

// Zeros that begin at a cache line: a load of 64 bytes that straddles two lines costs two.
template <typename T>
struct Lines {
  using value_type = T;
  T* allocate(size_t n) { return (T*)::operator new(n * sizeof(T), std::align_val_t(64)); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  template <typename U> bool operator==(const Lines<U>&) const { return true; }
};
template <typename T> using Aligned = std::vector<T, Lines<T>>;

static const int TILE = 16;  // floats that a vector of scales may read past the last chunk

// x in fixed point, in the layout of one plane: digit d of the code that unpacking step s, shift k, byte i yields.
// The digits of x in the order in which a plane's codes are unpacked: for every step of 16 or 64 bytes, every shift and every
// digit, as many digits as bytes.
struct Digits {
  Aligned<int8_t> bytes;       // for AVX-512
  Aligned<float> scale;        // for AVX-512: xscale of every lane of a step, n x steps x 16
  std::vector<int16_t> words;  // for AVX2, which multiplies 16 bits: one digit of 16, or two for fp32
};

// Which group's scale each of the 16 lanes of a step takes: lane l of step s that of group first[s] + inside[16 s + l]. In a
// plane of `width` bits a lane holds 32 / width columns.
struct Groups {
  Aligned<int32_t> inside;
  std::vector<int32_t> first;
  bool one = true;  // no step reaches into a second group
  Groups() = default;
  Groups(int64_t d_in, int64_t groups, int width) {
    int64_t lanes = d_in * width / 32, in_group = lanes / groups, steps = (lanes + 15) / 16;
    inside.resize(16 * steps), first.resize(steps);
    int32_t group = 0;
    for (int64_t l = 0, left = in_group; l < lanes; l++, left--) {
      if (left == 0) group++, left = in_group;
      if (l % 16 == 0) first[l / 16] = group;
      inside[l] = group - first[l / 16];
      one = one && inside[l] == 0;
    }
  }
};

struct FixedPoint {
  int64_t n, d_in, chunks;
  int digits;
  std::vector<float> scale, scale_sum;  // n x (chunks + TILE): xscale, and xscale X
  std::vector<int32_t> value;           // n x d_in
  bool finite = true;

  FixedPoint(int64_t n, int64_t d_in, int digits)
      : n(n), d_in(d_in), chunks(d_in / CHUNK), digits(digits), scale(n * (chunks + TILE)),
        scale_sum(n * (chunks + TILE)), value(n * d_in) {}

  // Loops that compilers vectorise for whatever machine the caller is compiled for: this runs once a call, on one core.
  INLINE void fill(const void* x, int dtype) {
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
          uint32_t power = (uint32_t)((normal ? exponent : 0) + 127) << 23;
          std::memcpy(&step, &power, 4);
          inverse = normal ? 1 / step : 0;
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
  template <int SHIFTS, int PARTS, int STEP_BYTES, typename Out>
  INLINE void lay_out(Out& out) const {
    using Digit = typename Out::value_type;
    struct Quad { Digit digit[4]; };
    constexpr int64_t in_step = STEP_BYTES / 4;
    int64_t quads = d_in / 4 / SHIFTS, steps = (quads + in_step - 1) / in_step, row = steps * SHIFTS * PARTS * in_step;
    out.resize(n * row * 4);
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
      for (int64_t s = 0; s < steps; s++) {
        int64_t here = std::min(in_step, quads - s * in_step);
        for (int k = 0; k < SHIFTS; k++)
          for (int d = 0; d < PARTS; d++) {
            Quad* to = (Quad*)out.data() + r * row + ((s * SHIFTS + k) * PARTS + d) * in_step;
            const Quad* from = (const Quad*)&split[d * d_in] + s * in_step * SHIFTS + k;
            if (here == in_step)  // a loop of known length, which compilers vectorise
              for (int64_t q = 0; q < in_step; q++) to[q] = from[q * SHIFTS];
            else
              for (int64_t q = 0; q < here; q++) to[q] = from[q * SHIFTS];
          }
      }
    }
  }

  template <int SHIFTS>
  INLINE void lay_out(bool as_words, Digits& out) const {
    if (as_words && digits == 3) lay_out<SHIFTS, 2, 16>(out.words);
    else if (as_words) lay_out<SHIFTS, 1, 16>(out.words);
    else if (digits == 1) lay_out<SHIFTS, 1, 64>(out.bytes);
    else if (digits == 2) lay_out<SHIFTS, 2, 64>(out.bytes);
    else lay_out<SHIFTS, 3, 64>(out.bytes);
    if (as_words) return;
    int64_t lanes = d_in / 4 / SHIFTS, padded = (lanes + 15) / 16 * 16;
    out.scale.resize(n * padded);
    for (int64_t r = 0; r < n; r++)
      for (int64_t c = 0; c < chunks; c++)
        for (int64_t l = 0; l < 8 / SHIFTS; l++)
          out.scale[r * padded + c * (8 / SHIFTS) + l] = scale[r * (chunks + TILE) + c];
  }

  INLINE void laid_out(int width, bool as_words, Digits& out) const {
    if (width == 1) lay_out<8>(as_words, out);
    else if (width == 2) lay_out<4>(as_words, out);
    else if (width == 4) lay_out<2>(as_words, out);
    else lay_out<1>(as_words, out);
  }

  // xscale X summed over every group: n x (groups + TILE)
  std::vector<float> group_sums(int64_t groups) const {
    std::vector<float> sums(n * (groups + TILE));
    int64_t repeat = chunks / groups;
    for (int64_t r = 0; r < n; r++)
      for (int64_t g = 0; g < groups; g++)
        for (int64_t c = g * repeat; c < (g + 1) * repeat; c++)
          sums[r * (groups + TILE) + g] += scale_sum[r * (chunks + TILE) + c];
    return sums;
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
// The scales of row i in fp32, and for COUNT vectors the sum of scale zero X over the groups, which is to be taken off.
template <int COUNT>
TARGET_VNNI inline void row_scales(const Weight& w, int64_t i, const float* sums, float* scale, float* offset) {
  __m512 total[COUNT];
  for (int b = 0; b < COUNT; b++) total[b] = _mm512_setzero_ps();
  for (int64_t g = 0; g < w.groups; g += 16) {
    __mmask16 m = w.groups - g >= 16 ? 0xffff : (1u << (w.groups - g)) - 1;
    __m512 z = _mm512_set1_ps((float)(1 << (w.bits - 1)));
    if (w.zeros_kind == INTEGER)
      z = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(m, (const uint8_t*)w.zeros + i * w.groups + g)));
    if (w.zeros_kind == FLOAT) z = load16(w.zeros, i * w.groups + g, w.dtype, m);
    __m512 s = load16(w.scales, i * w.groups + g, w.dtype, m);
    _mm512_storeu_ps(scale + g, s);
    for (int b = 0; b < COUNT; b++)
      total[b] = _mm512_fmadd_ps(_mm512_mul_ps(s, z), _mm512_loadu_ps(sums + b * (w.groups + TILE) + g), total[b]);
  }
  for (int b = 0; b < COUNT; b++) offset[b] = _mm512_reduce_add_ps(total[b]);
}

// Keeps a vector in its register: read again from memory by every row, x would cost more than the products.
TARGET_VNNI inline __m512i kept(__m512i v) {
  asm("" : "+v"(v));
  return v;
}

// One step of ROWS rows: acc += scale xscale D. `of` bytes are there, 64 unless TAIL. ONE: all lanes are of one group.
template <int WIDTH, int DIGITS, int ROWS, int COUNT, bool ONE, bool TAIL>
TARGET_VNNI inline void step_dots(const uint8_t* const* planes, const uint8_t* ahead, int64_t s, int64_t of,
                                  int64_t steps, const int8_t* digits, const float* xscale, const Groups& groups, const float* const* scales,
                                  __m512 (*acc)[COUNT]) {
  constexpr int SHIFTS = 8 / WIDTH;
  const __m512i mask = _mm512_set1_epi8((char)((1 << WIDTH) - 1));
  __m512i codes[ROWS][SHIFTS];
  __m512 scale[ROWS];
  for (int r = 0; r < ROWS; r++) {
    const uint8_t* at = planes[r] + 64 * s;
    __m512i packed = TAIL ? _mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, of), at) : _mm512_loadu_si512(at);
    _mm_prefetch((const char*)ahead + 64 * (ROWS * s + r), _MM_HINT_T1);
    for (int k = 0; k < SHIFTS; k++)
      codes[r][k] = WIDTH == 8 ? packed : _mm512_and_si512(k ? _mm512_srli_epi16(packed, k * WIDTH) : packed, mask);
    const float* from = scales[r] + groups.first[s];
    scale[r] = ONE ? _mm512_set1_ps(*from)
                   : _mm512_permutexvar_ps(_mm512_load_si512(&groups.inside[16 * s]), _mm512_loadu_ps(from));
  }
  for (int b = 0; b < COUNT; b++) {
    const int8_t* d = digits + (b * steps + s) * SHIFTS * DIGITS * 64;
    __m512i sum[ROWS];
    __m512 dot[ROWS];
    for (int r = 0; r < ROWS; r++) sum[r] = _mm512_setzero_si512();
    for (int j = 0; j < DIGITS; j++) {
      for (int k = 0; k < SHIFTS; k++) {
        __m512i digit = _mm512_load_si512(d + (k * DIGITS + j) * 64);
        if (ROWS > 1) digit = kept(digit);
        for (int r = 0; r < ROWS; r++) sum[r] = _mm512_dpbusd_epi32(sum[r], codes[r][k], digit);
      }
      for (int r = 0; r < ROWS; r++) {
        if (j == 0 && DIGITS > 1) {
          sum[r] = _mm512_slli_epi32(sum[r], 8);
        } else if (j == 1 && DIGITS > 2) {
          dot[r] = _mm512_cvtepi32_ps(sum[r]), sum[r] = _mm512_setzero_si512();
        } else {
          __m512 last = _mm512_cvtepi32_ps(sum[r]);
          dot[r] = DIGITS > 2 ? _mm512_fmadd_ps(dot[r], _mm512_set1_ps(256), last) : last;
        }
      }
    }
    const __m512 x = _mm512_load_ps(xscale + (b * steps + s) * 16);
    for (int r = 0; r < ROWS; r++) acc[r][b] = _mm512_fmadd_ps(dot[r], _mm512_mul_ps(x, scale[r]), acc[r][b]);
  }
}

template <int WIDTH, int DIGITS, int ROWS, int COUNT, bool ONE>
TARGET_VNNI inline void plane_dots(const uint8_t* const* planes, const uint8_t* ahead, int64_t d_in,
                                   const Digits& laid, int64_t first, const Groups& groups, const float* const* scales, __m512 (*totals)[COUNT]) {
  const int64_t bytes = d_in * WIDTH / 8, steps = (bytes + 63) / 64, whole = bytes / 64;
  const int8_t* digits = &laid.bytes[first * steps * (8 / WIDTH) * DIGITS * 64];
  const float* xscale = &laid.scale[first * steps * 16];
  __m512 acc[ROWS][COUNT];  // in registers
  for (int r = 0; r < ROWS; r++)
    for (int b = 0; b < COUNT; b++) acc[r][b] = totals[r][b];
  for (int64_t s = 0; s < whole; s++)
    step_dots<WIDTH, DIGITS, ROWS, COUNT, ONE, false>(planes, ahead, s, 64, steps, digits, xscale, groups, scales, acc);
  if (whole < steps)
    step_dots<WIDTH, DIGITS, ROWS, COUNT, ONE, true>(planes, ahead, whole, bytes - 64 * whole, steps, digits, xscale, groups,
                                                     scales, acc);
  for (int r = 0; r < ROWS; r++)
    for (int b = 0; b < COUNT; b++) totals[r][b] = acc[r][b];
}

// What one call's rows share.
struct Call {
  const Weight& w;
  const Digits* laid;    // by plane
  const Groups* groups;  // by plane
  const std::vector<float>& sums;
};

// ROWS rows from row i on times COUNT vectors: out[r * MAX_VECTORS + b], from which the sums of the zeros are taken off;
// x is loaded once for all rows. scale: ROWS x (groups + TILE).
template <int DIGITS, int ROWS, int COUNT>
TARGET_VNNI inline void dots(const Call& call, int64_t i, int64_t first, const float* scale, float* out) {
  const Weight& w = call.w;
  __m512 acc[ROWS][COUNT];
  const uint8_t* planes[ROWS];
  const float* scales[ROWS];
  const uint8_t* ahead = w.codes + (i + 3 * ROWS) * w.row_bytes();  // fetched meanwhile, in the order of memory
  for (int r = 0; r < ROWS; r++) {
    for (int b = 0; b < COUNT; b++) acc[r][b] = _mm512_setzero_ps();
    planes[r] = w.codes + (i + r + 1) * w.row_bytes();
    scales[r] = scale + r * (w.groups + TILE);
  }
  for (int p = PLANES[w.bits][1] ? 1 : 0; p >= 0; p--) {  // the high plane first: its sums are worth 2^(bits below)
    int width = PLANES[w.bits][p];
    for (int r = 0; r < ROWS; r++) planes[r] -= w.d_in * width / 8;
    const Digits& x = call.laid[p];
    const Groups& g = call.groups[p];
#define PLANE(width)                                                                                        \
  if (COUNT == 1 && g.one)                                                                                  \
    plane_dots<width, DIGITS, ROWS, COUNT, COUNT == 1>(planes, ahead, w.d_in, x, first, g, scales, acc);    \
  else                                                                                                      \
    plane_dots<width, DIGITS, ROWS, COUNT, false>(planes, ahead, w.d_in, x, first, g, scales, acc)
    if (width == 1) PLANE(1);
    else if (width == 2) PLANE(2);
    else if (width == 4) PLANE(4);
    else PLANE(8);
#undef PLANE
    ahead += ROWS * w.d_in * width / 8;
    if (p)
      for (int r = 0; r < ROWS; r++)
        for (int b = 0; b < COUNT; b++)
          acc[r][b] = _mm512_mul_ps(acc[r][b], _mm512_set1_ps((float)(1 << PLANES[w.bits][0])));
  }
  for (int r = 0; r < ROWS; r++)
    for (int b = 0; b < COUNT; b++)
      out[r * MAX_VECTORS + b] = _mm512_reduce_add_ps(acc[r][b]) - out[r * MAX_VECTORS + b];
}

// A block of rows: first all their scales, so that no load waits for a store, then the products.
template <int DIGITS, int COUNT>
TARGET_VNNI inline void block_dots(const Call& call, int64_t i, int rows, int64_t first, float* scale, float* out) {
  const int64_t stride = call.w.groups + TILE;
  for (int r = 0; r < rows; r++)
    row_scales<COUNT>(call.w, i + r, &call.sums[first * stride], scale + r * stride, out + r * MAX_VECTORS);
  constexpr int AT_ONCE = COUNT < 4 ? 4 : 2;  // rows that share each load of x: as many as registers allow
  int r = 0;
  for (; r + AT_ONCE <= rows; r += AT_ONCE)
    dots<DIGITS, AT_ONCE, COUNT>(call, i + r, first, scale + r * stride, out + r * MAX_VECTORS);
  for (; r < rows; r++) dots<DIGITS, 1, COUNT>(call, i + r, first, scale + r * stride, out + r * MAX_VECTORS);
}

template <int DIGITS>
TARGET_VNNI inline void block_dots(const Call& call, int64_t i, int rows, int64_t first, int count, float* scale,
                                   float* out) {
  if (count == 8) block_dots<DIGITS, 8>(call, i, rows, first, scale, out);
  else if (count == 4) block_dots<DIGITS, 4>(call, i, rows, first, scale, out);
  else if (count == 2) block_dots<DIGITS, 2>(call, i, rows, first, scale, out);
  else block_dots<DIGITS, 1>(call, i, rows, first, scale, out);
}

TARGET_VNNI inline void block_dots(const Call& call, int digits, int64_t i, int rows, int64_t first, int count,
                                   float* scale, float* out) {
  if (digits == 1) block_dots<1>(call, i, rows, first, count, scale, out);
  else if (digits == 3) block_dots<3>(call, i, rows, first, count, scale, out);
  else block_dots<2>(call, i, rows, first, count, scale, out);
}

// x in fixed point, laid out for every plane of the weight.
TARGET_VNNI inline void prepare(FixedPoint& fixed, const void* x, int dtype, int bits, Digits* laid) {
  fixed.fill(x, dtype);
  for (int p = 0; p < 2 && PLANES[bits][p] && fixed.finite; p++) fixed.laid_out(PLANES[bits][p], false, laid[p]);
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

struct Matrix {
  const uint8_t* codes;
  const void *scales, *zeros, *bias;
  void* y;  // (n, d_out)
  int64_t d_out;
  int64_t blocks() const { return (d_out + BLOCK - 1) / BLOCK; }
};

// y (n, d_out) = x (n, d_in) W^T + bias of `count` matrices that read the same x and are of one format; x, scales, float
// zeros, biases and y of one dtype. Returns 0, or 1 with y untouched when x holds NaN or Inf, which have no fixed-point form.
EXPORT int slimzoo_packed_linear(const void* x, const Matrix* matrices, int64_t count, int64_t n, int64_t d_in,
                                     int64_t groups, int bits, int zeros_kind, int digits, int dtype, int level,
                                     int threads) {
  FixedPoint fixed(n, d_in, digits);
  Digits laid[2];
#ifdef X86
  if (level >= AVX512) avx512::prepare(fixed, x, dtype, bits, laid);
#endif
  if (level < AVX512) fixed.fill(x, dtype);
  if (!fixed.finite) return 1;
  int64_t chunks = fixed.chunks, stride = chunks + TILE;
  if (level == AVX2)
    for (int p = 0; p < 2 && PLANES[bits][p]; p++) fixed.laid_out(PLANES[bits][p], true, laid[p]);
#ifdef X86
  Groups where[2];
  std::vector<float> sums;
  if (level >= AVX512) {
    for (int p = 0; p < 2 && PLANES[bits][p]; p++) where[p] = Groups(d_in, groups, PLANES[bits][p]);
    sums = fixed.group_sums(groups);
  }
#endif
  int64_t blocks = 0;
  for (int64_t m = 0; m < count; m++) blocks += matrices[m].blocks();
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scale(std::max(stride, BLOCK * (groups + TILE))), zero(stride), t(MAX_VECTORS * stride);
    std::vector<uint8_t> codes(level >= AVX2 ? 0 : d_in);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
      const Matrix* m = matrices;
      int64_t before = 0;
      while (block >= before + m->blocks()) before += m++->blocks();
      const Weight w{m->codes, m->scales, m->zeros, d_in, groups, bits, zeros_kind, dtype};
#ifdef X86
      const avx512::Call call{w, laid, where, sums};
#endif
      int64_t i = (block - before) * BLOCK, d_out = m->d_out;
      int rows = (int)std::min<int64_t>(BLOCK, d_out - i);
      float out[BLOCK * MAX_VECTORS];
      for (int64_t first = 0, some; first < n; first += some) {
        for (some = MAX_VECTORS; some > n - first;) some /= 2;  // 8, 4, 2 or 1 at a time
#ifdef X86
        if (level >= AVX512) avx512::block_dots(call, digits, i, rows, first, (int)some, scale.data(), out);
#endif
        if (level < AVX512)
          for (int r = 0; r < rows; r++) {
            float* to = out + r * MAX_VECTORS;
            w.row(i + r, scale.data(), zero.data());
#ifdef X86
            if (level == AVX2) {
              for (int64_t b = 0; b < some; b++)
                for (int64_t c = 0; c < chunks; c++) t[b * stride + c] = scale[c] * fixed.scale[(first + b) * stride + c];
              avx2::dots(w, i + r, fixed, laid, first, (int)some, t.data(), to);
            }
#endif
            if (level < AVX2) portable::dots(w, i + r, fixed, first, (int)some, scale.data(), codes.data(), to);
            for (int b = 0; b < some; b++)
              for (int64_t c = 0; c < chunks; c++) to[b] -= scale[c] * zero[c] * fixed.scale_sum[(first + b) * stride + c];
          }
        for (int r = 0; r < rows; r++)
          for (int b = 0; b < some; b++) {
            float add = m->bias ? load_float(m->bias, i + r, dtype) : 0;
            store_float(m->y, (first + b) * d_out + i + r, out[r * MAX_VECTORS + b] + add, dtype);
          }
      }
    }
  }
  return 0;
}

// Rows [first, last) of the dense weight, in the dtype of the scales.
EXPORT void slimzoo_packed_expand(const uint8_t* qweight, const void* scales, const void* zeros, void* out, int64_t first,
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
