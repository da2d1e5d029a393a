// What the CPU kernels share: dtypes, the choice of SIMD level at run time, and the dot products of a dense row and of
// a bitmask row with up to eight vectors. Accumulation is in fp32 throughout.
//
// Memory traffic of a bitmask row: 1 bit per column plus the kept values; x stays in the first-level cache. On AVX-512
// a step of 32 columns is one 4-byte mask, one load of the next values, one expand and one dot product per vector:
// for 2:4 in bf16 36 bytes per four instructions, so memory, not the core, is the bound.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#define X86 1
#endif

// Without OpenMP, as with Apple's compiler alone, its pragmas count as comments and everything runs on one thread. Its
// header is not needed, and not there where only its library is.
#ifdef _OPENMP
extern "C" int omp_get_thread_num(void);
#else
static inline int omp_get_thread_num() { return 0; }
#endif

#ifdef _WIN32
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C"
#endif

enum Dtype : int { F32 = 0, BF16 = 1, F16 = 2 };
enum Level : int { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3 };

static const int MAX_VECTORS = 8;  // rows of x that share one pass over the weights
static const int64_t PREFETCH = 8192;  // bytes of values ahead: two rows of 4096; at 1 KB a quarter of the speed was lost
static const int64_t PAD = 64;     // x is padded with zeros to a multiple of this

inline int64_t item_size(int dtype) { return dtype == F32 ? 4 : 2; }

inline float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {
    float value = std::ldexp((float)mantissa, -24);
    return sign ? -value : value;
  }
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t float_to_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;     // NaN
  if (magnitude >= 0x477ff000) return sign | 0x7c00;    // rounds to infinity
  if (magnitude < 0x38800000) {                         // subnormal: round to a multiple of 2^-24
    float scaled = std::nearbyint(std::fabs(f) * 16777216.0f);
    return sign | (uint16_t)scaled;
  }
  uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return sign | (uint16_t)((rounded >> 13) - (112 << 10));
}

inline float bf16_to_float(uint16_t h) {
  uint32_t bits = (uint32_t)h << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t float_to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (bits >> 16) | 0x40;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline float load_float(const void* p, int64_t i, int dtype) {
  if (dtype == F32) return ((const float*)p)[i];
  uint16_t h = ((const uint16_t*)p)[i];
  return dtype == BF16 ? bf16_to_float(h) : half_to_float(h);
}

inline void store_float(void* p, int64_t i, float f, int dtype) {
  if (dtype == F32) ((float*)p)[i] = f;
  else ((uint16_t*)p)[i] = dtype == BF16 ? float_to_bf16(f) : float_to_half(f);
}

// 32 mask bits at column 32 k; the last word of a row may be shorter than 4 bytes.
inline uint32_t mask_word(const uint8_t* mask, int64_t k, int64_t bytes) {
  uint32_t word = 0;
  std::memcpy(&word, mask + 4 * k, std::min<int64_t>(4, bytes - 4 * k));
  return word;
}

inline int detect_level() {
#ifdef X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("avx512vpopcntdq"))
    return __builtin_cpu_supports("avx512bf16") ? AVX512_BF16 : AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return AVX2;
#endif
  return PORTABLE;
}

EXPORT int slimzoo_level() { return detect_level(); }

// x as the dot products want it: (n, stride) fp32 and, for AVX512_BF16 with bf16 weights, bf16; zero-padded.
struct Vectors {
  int64_t n, size, stride;
  std::vector<float> f32;
  std::vector<uint16_t> bf16;
  Vectors(int64_t n, int64_t size)
      : n(n), size(size), stride((size + PAD - 1) / PAD * PAD), f32(n * stride), bf16(n * stride) {}
  void set(int64_t row, int64_t column, float value) {
    f32[row * stride + column] = value;
    bf16[row * stride + column] = float_to_bf16(value);
  }
  void fill(const void* x, int dtype) {
    for (int64_t r = 0; r < n; r++)
      for (int64_t c = 0; c < size; c++) set(r, c, load_float(x, r * size + c, dtype));
  }
};

// A bitmask row: its values start at `values`, `mask` holds `bytes` bytes.
struct Row {
  const uint8_t* values;
  const uint8_t* mask;
  int64_t bytes;
};

// ------------------------------------------------------------------------------------------- before a mask is followed
//
// A mask and offsets say where a kernel reads, and a file may be damaged: they are proved before they are used, at every
// call, because tensors may be other ones at every call. `keeps` reads the row of the mask that the product reads next,
// so no byte more comes from memory; per 64 columns it loads and counts once (AVX-512: per 512), and the product loads,
// expands and multiplies two to eight times. `rises` reads 8 bytes a row. In all: under 1 % of the bytes of a row of 4096,
// and about 3 instructions to 20.

static inline __attribute__((always_inline)) int64_t count_bits(const uint8_t* mask, int64_t bytes) {
  int64_t count = 0, whole = bytes / 8;
  for (int64_t k = 0; k < whole; k++) {
    uint64_t word;
    std::memcpy(&word, mask + 8 * k, 8);
    count += __builtin_popcountll(word);
  }
  uint64_t rest = 0;
  std::memcpy(&rest, mask + 8 * whole, bytes - 8 * whole);
  return count + __builtin_popcountll(rest);
}
#ifdef X86
__attribute__((target("popcnt"))) static int64_t count_bits_by_word(const uint8_t* mask, int64_t bytes) {
  return count_bits(mask, bytes);
}
__attribute__((target("avx512f,avx512vpopcntdq,popcnt"))) static int64_t count_bits_by_vector(const uint8_t* mask,
                                                                                              int64_t bytes) {
  return count_bits(mask, bytes);
}
#endif

// Whether a row of a mask keeps `kept` of its d_in columns, and nothing beyond them.
inline bool keeps(int level, const uint8_t* mask, int64_t d_in, int64_t kept) {
  int64_t bytes = (d_in + 7) / 8;
  if (d_in % 8 && mask[bytes - 1] >> d_in % 8) return false;
#ifdef X86
  if (level >= AVX512) return count_bits_by_vector(mask, bytes) == kept;
  if (level == AVX2) return count_bits_by_word(mask, bytes) == kept;
#endif
  return count_bits(mask, bytes) == kept;
}

// Whether offsets (rows + 1,) rise from 0 to `end`.
inline bool rises(const int64_t* offsets, int64_t rows, int64_t end) {
  bool fits = offsets[0] == 0 && offsets[rows] == end;
  for (int64_t i = 0; i < rows; i++) fits &= offsets[i] <= offsets[i + 1];
  return fits;
}

// ------------------------------------------------------------------------------------------------------- portable

namespace portable {
inline void sparse_dot(const Row& row, int dtype, const Vectors& x, int64_t first, int count, float* out) {
  float acc[MAX_VECTORS] = {};
  int64_t at = 0;
  for (int64_t k = 0; 4 * k < row.bytes; k++) {
    for (uint32_t m = mask_word(row.mask, k, row.bytes); m; m &= m - 1) {
      float w = load_float(row.values, at++, dtype);
      int64_t column = 32 * k + __builtin_ctz(m);
      for (int b = 0; b < count; b++) acc[b] += w * x.f32[(first + b) * x.stride + column];
    }
  }
  for (int b = 0; b < count; b++) out[b] = acc[b];
}

inline float dense_dot(const void* w, int dtype, const float* x, int64_t n) {
  float acc = 0;
  for (int64_t j = 0; j < n; j++) acc += load_float(w, j, dtype) * x[j];
  return acc;
}

inline void expand(const Row& row, int dtype, int64_t d_in, uint8_t* out) {
  int64_t item = item_size(dtype), at = 0;
  std::memset(out, 0, d_in * item);
  for (int64_t k = 0; 4 * k < row.bytes; k++)
    for (uint32_t m = mask_word(row.mask, k, row.bytes); m; m &= m - 1)
      std::memcpy(out + (32 * k + __builtin_ctz(m)) * item, row.values + item * at++, item);
}
}  // namespace portable

#ifdef X86
// ----------------------------------------------------------------------------------------------------------- AVX2
// No expand instruction: eight columns at a time, the values are moved to their places by a permutation from a table.

struct ExpandTable {
  alignas(32) int32_t index[256][8];
  alignas(32) int32_t keep[256][8];
  ExpandTable() {
    for (int m = 0; m < 256; m++)
      for (int j = 0, at = 0; j < 8; j++) {
        bool set = m >> j & 1;
        index[m][j] = set ? at++ : 0;
        keep[m][j] = set ? -1 : 0;
      }
  }
};
inline const ExpandTable& expand_table() {
  static const ExpandTable table;
  return table;
}

#define TARGET_AVX2 __attribute__((target("avx2,fma,f16c,popcnt")))
namespace avx2 {
TARGET_AVX2 inline __m256 load8(const void* p, int64_t i, int dtype) {
  if (dtype == F32) return _mm256_loadu_ps((const float*)p + i);
  __m128i h = _mm_loadu_si128((const __m128i*)((const uint16_t*)p + i));
  if (dtype == F16) return _mm256_cvtph_ps(h);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

TARGET_AVX2 inline float sum(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

TARGET_AVX2 inline void sparse_dot(const Row& row, int64_t kept, int dtype, const Vectors& x, int64_t first, int count,
                                   float* out) {
  const ExpandTable& table = expand_table();
  __m256 acc[MAX_VECTORS];
  for (int b = 0; b < count; b++) acc[b] = _mm256_setzero_ps();
  float tail[8];
  int64_t at = 0;
  for (int64_t k = 0; k < row.bytes; k++) {
    int m = row.mask[k];
    if (!m) continue;
    __m256 w;
    if (at + 8 <= kept) {
      w = load8(row.values, at, dtype);
    } else {  // never read past the values
      for (int64_t j = 0; j < 8; j++) tail[j] = at + j < kept ? load_float(row.values, at + j, dtype) : 0;
      w = _mm256_loadu_ps(tail);
    }
    at += __builtin_popcount(m);
    w = _mm256_permutevar8x32_ps(w, _mm256_load_si256((const __m256i*)table.index[m]));
    w = _mm256_and_ps(w, _mm256_castsi256_ps(_mm256_load_si256((const __m256i*)table.keep[m])));
    for (int b = 0; b < count; b++)
      acc[b] = _mm256_fmadd_ps(w, _mm256_loadu_ps(&x.f32[(first + b) * x.stride + 8 * k]), acc[b]);
  }
  for (int b = 0; b < count; b++) out[b] = sum(acc[b]);
}

TARGET_AVX2 inline float dense_dot(const void* w, int dtype, const float* x, int64_t n) {
  __m256 acc = _mm256_setzero_ps();
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) acc = _mm256_fmadd_ps(load8(w, j, dtype), _mm256_loadu_ps(x + j), acc);
  float rest = 0;
  for (; j < n; j++) rest += load_float(w, j, dtype) * x[j];
  return sum(acc) + rest;
}
}  // namespace avx2

// -------------------------------------------------------------------------------------------------------- AVX-512

#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt,bmi2")))
#define TARGET_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,popcnt,bmi2")))
namespace avx512 {
TARGET_AVX512 inline __m512 widen(__m256i h, int dtype) {
  if (dtype == F16) return _mm512_cvtph_ps(h);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

// The next popcount(m) 16-bit values at their 32 columns. A masked load reads nothing past the values.
TARGET_AVX512 inline __m512i expand16(const uint8_t*& values, uint32_t m) {
  int kept = __builtin_popcount(m);
  __m512i packed = kept == 16 ? _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)values))
                              : _mm512_maskz_loadu_epi16(_bzhi_u32(~0u, kept), values);
  values += 2 * kept;
  return _mm512_maskz_expand_epi16(m, packed);
}

TARGET_AVX512 inline __m512 expand32(const uint8_t*& values, __mmask16 m) {
  int kept = __builtin_popcount(m);
  __m512 packed = _mm512_maskz_loadu_ps(_bzhi_u32(0xffff, kept), values);
  values += 4 * kept;
  return _mm512_maskz_expand_ps(m, packed);
}

// The values and, an eighth as many bytes at 50 % in bf16, the mask that will be needed.
TARGET_AVX512 inline void prefetch(const Row& row, const uint8_t* values, int64_t byte) {
  _mm_prefetch((const char*)values + PREFETCH, _MM_HINT_T0);
  _mm_prefetch((const char*)row.mask + byte + PREFETCH / 8, _MM_HINT_T0);
}

// ROWS rows share each load of x: eight vectors of 4096 do not fit the first-level cache.
template <int ROWS, int COUNT>
TARGET_AVX512 inline void sparse_dots(const Row* rows, int dtype, const Vectors& x, int64_t first, float* out) {
  __m512 acc[ROWS][COUNT];
  const uint8_t* values[ROWS];
  for (int r = 0; r < ROWS; r++) {
    values[r] = rows[r].values;
    for (int b = 0; b < COUNT; b++) acc[r][b] = _mm512_setzero_ps();
  }
  const float* x0 = &x.f32[first * x.stride];
  int64_t bytes = rows[0].bytes;
  for (int64_t k = 0; 4 * k < bytes; k++) {
    __m512 low[ROWS], high[ROWS];
    for (int r = 0; r < ROWS; r++) {
      uint32_t m;
      if (4 * k + 4 <= bytes) std::memcpy(&m, rows[r].mask + 4 * k, 4);
      else m = mask_word(rows[r].mask, k, bytes);
      if (dtype == F32) {
        low[r] = expand32(values[r], (__mmask16)m);
        high[r] = expand32(values[r], (__mmask16)(m >> 16));
      } else {
        __m512i w = expand16(values[r], m);
        low[r] = widen(_mm512_castsi512_si256(w), dtype);
        high[r] = widen(_mm512_extracti64x4_epi64(w, 1), dtype);
      }
      prefetch(rows[r], values[r], 4 * k);
    }
    for (int b = 0; b < COUNT; b++) {
      __m512 x_low = _mm512_loadu_ps(x0 + b * x.stride + 32 * k);
      __m512 x_high = _mm512_loadu_ps(x0 + b * x.stride + 32 * k + 16);
      for (int r = 0; r < ROWS; r++)
        acc[r][b] = _mm512_fmadd_ps(high[r], x_high, _mm512_fmadd_ps(low[r], x_low, acc[r][b]));
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int b = 0; b < COUNT; b++) out[r * MAX_VECTORS + b] = _mm512_reduce_add_ps(acc[r][b]);
}

// bf16 weights and bf16 x, multiplied in pairs. x, which for eight vectors comes from the second-level cache at half a
// register a cycle, is loaded once for ROWS rows.
template <int ROWS, int COUNT>
TARGET_BF16 inline void sparse_dots_bf16(const Row* rows, const Vectors& x, int64_t first, float* out) {
  constexpr int SUMS = ROWS * COUNT > 8 ? 1 : 2;  // a second sum hides latency where registers allow
  __m512 acc[ROWS][COUNT][SUMS];
  const uint8_t* values[ROWS];
  for (int r = 0; r < ROWS; r++) {
    values[r] = rows[r].values;
    for (int b = 0; b < COUNT; b++)
      for (int j = 0; j < SUMS; j++) acc[r][b][j] = _mm512_setzero_ps();
  }
  const uint16_t* x0 = &x.bf16[first * x.stride];
  int64_t bytes = rows[0].bytes;
  for (int64_t at = 0; at < bytes; at += 8) {
    __m512i low[ROWS], high[ROWS];
    for (int r = 0; r < ROWS; r++) {
      uint64_t m = 0;
      if (at + 8 <= bytes) std::memcpy(&m, rows[r].mask + at, 8);
      else std::memcpy(&m, rows[r].mask + at, bytes - at);
      low[r] = expand16(values[r], (uint32_t)m), high[r] = expand16(values[r], (uint32_t)(m >> 32));
      prefetch(rows[r], values[r], at);
    }
    for (int b = 0; b < COUNT; b++) {
      const uint16_t* here = x0 + b * x.stride + 8 * at;
      __m512bh x_low = (__m512bh)_mm512_loadu_si512(here), x_high = (__m512bh)_mm512_loadu_si512(here + 32);
      for (int r = 0; r < ROWS; r++) {
        acc[r][b][0] = _mm512_dpbf16_ps(acc[r][b][0], (__m512bh)low[r], x_low);
        acc[r][b][SUMS - 1] = _mm512_dpbf16_ps(acc[r][b][SUMS - 1], (__m512bh)high[r], x_high);
      }
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int b = 0; b < COUNT; b++) {
      __m512 total = SUMS == 1 ? acc[r][b][0] : _mm512_add_ps(acc[r][b][0], acc[r][b][SUMS - 1]);
      out[r * MAX_VECTORS + b] = _mm512_reduce_add_ps(total);
    }
}

TARGET_AVX512 inline __m512 load16(const void* p, int64_t i, int dtype, __mmask16 m) {
  if (dtype == F32) return _mm512_maskz_loadu_ps(m, (const float*)p + i);
  return widen(_mm256_maskz_loadu_epi16(m, (const uint16_t*)p + i), dtype);
}

TARGET_AVX512 inline float dense_dot(const void* w, int dtype, const float* x, int64_t n) {
  __m512 acc = _mm512_setzero_ps();
  for (int64_t j = 0; j < n; j += 16) {
    __mmask16 m = n - j >= 16 ? 0xffff : (1u << (n - j)) - 1;
    acc = _mm512_fmadd_ps(load16(w, j, dtype, m), _mm512_maskz_loadu_ps(m, x + j), acc);
  }
  return _mm512_reduce_add_ps(acc);
}

TARGET_AVX512 inline void expand(const Row& row, int dtype, int64_t d_in, uint8_t* out) {
  const uint8_t* values = row.values;
  for (int64_t k = 0; 32 * k < d_in; k++) {
    uint32_t m = mask_word(row.mask, k, row.bytes);
    int64_t left = d_in - 32 * k;
    if (dtype == F32) {
      __m512 w0 = expand32(values, (__mmask16)m), w1 = expand32(values, (__mmask16)(m >> 16));
      if (left >= 32) {
        _mm512_storeu_ps(out + 128 * k, w0);
        _mm512_storeu_ps(out + 128 * k + 64, w1);
      } else {
        _mm512_mask_storeu_ps(out + 128 * k, left >= 16 ? 0xffff : (1u << left) - 1, w0);
        if (left > 16) _mm512_mask_storeu_ps(out + 128 * k + 64, (1u << (left - 16)) - 1, w1);
      }
    } else {
      __m512i w = expand16(values, m);
      if (left >= 32) _mm512_storeu_si512(out + 64 * k, w);  // a masked store is much slower
      else _mm512_mask_storeu_epi16(out + 64 * k, (1u << left) - 1, w);
    }
  }
}
}  // namespace avx512
#endif

// ------------------------------------------------------------------------------------------------- choice by level

static const int ROWS_AT_ONCE = 4;

// `n` consecutive rows times `count` vectors from `first` on: out[r * MAX_VECTORS + b]. kept[r] values belong to row r.
inline void sparse_dots(int level, const Row* rows, const int64_t* kept, int n, int dtype, const Vectors& x,
                        int64_t first, int count, float* out) {
#ifdef X86
#define BY_COUNT(call)       \
  switch (count) {           \
    case 1: call(1); break;  \
    case 2: call(2); break;  \
    case 3: call(3); break;  \
    case 4: call(4); break;  \
    case 5: call(5); break;  \
    case 6: call(6); break;  \
    case 7: call(7); break;  \
    default: call(8);        \
  }
#define TWO(c) avx512::sparse_dots<2, c>(rows + r, dtype, x, first, out + r * MAX_VECTORS)
#define ONE(c) avx512::sparse_dots<1, c>(rows + r, dtype, x, first, out + r * MAX_VECTORS)
#define TWO_BF16(c) avx512::sparse_dots_bf16<2, c>(rows + r, x, first, out + r * MAX_VECTORS)
#define ONE_BF16(c) avx512::sparse_dots_bf16<1, c>(rows + r, x, first, out + r * MAX_VECTORS)
  if (level == AVX512_BF16 && dtype == BF16) {
    int r = 0;
    if (count > 1)  // for one vector a single stream of values is read faster than two
      for (; r + 2 <= n; r += 2) BY_COUNT(TWO_BF16)
    for (; r < n; r++) BY_COUNT(ONE_BF16)
    return;
  }
  if (level >= AVX512) {
    int r = 0;
    if (count > 2)
      for (; r + 2 <= n; r += 2) BY_COUNT(TWO)
    for (; r < n; r++) BY_COUNT(ONE)
    return;
  }
#undef BY_COUNT
#undef TWO
#undef ONE
#undef TWO_BF16
#undef ONE_BF16
#endif
  for (int r = 0; r < n; r++) {
#ifdef X86
    if (level == AVX2) {
      avx2::sparse_dot(rows[r], kept[r], dtype, x, first, count, out + r * MAX_VECTORS);
      continue;
    }
#endif
    portable::sparse_dot(rows[r], dtype, x, first, count, out + r * MAX_VECTORS);
  }
}

inline float dense_dot(int level, const void* w, int dtype, const float* x, int64_t n) {
#ifdef X86
  if (level >= AVX512) return avx512::dense_dot(w, dtype, x, n);
  if (level == AVX2) return avx2::dense_dot(w, dtype, x, n);
#endif
  return portable::dense_dot(w, dtype, x, n);
}

inline void expand_row(int level, const Row& row, int dtype, int64_t d_in, uint8_t* out) {
#ifdef X86
  if (level >= AVX512) return avx512::expand(row, dtype, d_in, out);
#endif
  portable::expand(row, dtype, d_in, out);
}
