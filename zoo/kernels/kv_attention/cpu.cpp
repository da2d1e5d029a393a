// kv_attention on CPU: attention of one query token to keys and values that stay codes of 2, 4 or 8 bits.
//
// By token, k_t = s_t c_t + m_t: q k_t = s_t (q c_t) + m_t sum q, and sum_t p_t v_t = sum_t (p_t s_t) c_t + sum_t p_t m_t.
// By channel (keys), k_td = s_d c_td + m_d in a block: q k_t = (q s) c_t + q m. So codes are only ever multiplied, as integers:
// on AVX-512 what stands before them (q, q s, p s) becomes a fixed-point number of 2 (16-bit floats) or 3 (fp32) signed 8-bit
// digits and one instruction multiplies 64 codes by one digit. Keys: 16 tokens are transposed so that a lane is a token and a
// dword four channels; values: four tokens are interleaved so that a lane is a channel and a dword four tokens. Nothing is
// summed across lanes.
// Per token of 128 numbers in 4 bits, 64 + 4 bytes of keys and as many of values, and G heads in bf16: 4 + 3 + 4 G operations
// for keys, 2 + 3 + 4 G for values. Softmax is online over tiles of 64 tokens; stretches of tokens are attended to by several
// threads and merged.

#include "simd.hpp"

#define INLINE static inline __attribute__((always_inline))

static const int MAX_TILE = 128, MAX_HEAD = 256, MAX_GROUPS = 16;
static const int64_t AHEAD = 16384;  // bytes: the next tiles, into the second-level cache; the first one is full of this one

// The keys or the values of a layer; strides from one (row, head) to the next, in elements.
struct Part {
  const uint8_t* codes;
  const uint16_t *scale, *minimum;
  const void* dense;
  int64_t bits, packed, rest, block, groups, codes_stride, scale_stride, dense_stride;  // block 0: by token
};

struct Shape {
  int64_t tokens, heads, size;  // heads: query heads of one key head
  int dtype, digits;
};

// exp for x <= 0, to 2 units in the last place; a form that compilers vectorise.
INLINE float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : x;
  float n = x * 1.44269504f + 12582912.0f;
  int32_t bits;
  std::memcpy(&bits, &n, 4);
  n -= 12582912.0f;
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  int32_t scale_bits = (bits - 0x4b400000 + 127) << 23;
  float scale;
  std::memcpy(&scale, &scale_bits, 4);
  return x <= -87.0f ? 0.0f : y * scale;
}

// A power of two with |x| / step < 2^(8 digits - 2) for |x| <= peak; 0 for a peak that is 0 or not finite.
INLINE float fixed_step(float peak, int digits) {
  uint32_t bits;
  std::memcpy(&bits, &peak, 4);
  int exponent = (int)(bits >> 23) - 126 - (8 * digits - 2);
  if (exponent <= -126 || exponent >= 126) return 0;
  bits = (uint32_t)(exponent + 127) << 23;
  float step;
  std::memcpy(&step, &bits, 4);
  return step;
}

// What one thread keeps while it goes through a stretch of tokens for the query heads of one key head.
struct State {
  std::vector<float> q, q_sum, peak, total, out, scores;  // (heads, size), (heads,) x 3, (heads, size), (heads, MAX_TILE)
  std::vector<float> row, scaled, shift;                  // (size,), (heads, size), (heads,)
  std::vector<float> packed_out, offset;                  // AVX-512: (heads, lanes), (heads, groups)
  std::vector<int8_t> q_digits, weights;                  // AVX-512: (heads, digits, planes, row bytes padded), (heads, digits, …)
  std::vector<float> q_step, step;                        // AVX-512: (heads,) x 2
  State(const Shape& s, bool packed)  // what only codes need takes 30 KB a head, more than a short dense cache
      : q(s.heads * s.size), q_sum(s.heads), peak(s.heads), total(s.heads), out(s.heads * s.size),
        scores(s.heads * MAX_TILE + 16), row(s.size), scaled(s.heads * s.size), shift(s.heads) {
    if (!packed) return;
    packed_out.resize(s.heads * 4 * MAX_HEAD), offset.resize(s.heads * MAX_GROUPS);
    q_digits.resize(s.heads * 3 * 4 * MAX_HEAD), weights.resize(s.heads * 3 * (MAX_TILE * MAX_GROUPS + 64));
    q_step.resize(s.heads), step.resize(s.heads);
  }
};

// The codes of one token, as floats.
INLINE void token_codes(const uint8_t* codes, int64_t bits, int64_t size, float* out) {
  int64_t bytes = size * bits / 8;
  uint8_t mask = (uint8_t)((1 << bits) - 1);
  for (int64_t plane = 0; plane < 8 / bits; plane++)
#pragma omp simd
    for (int64_t j = 0; j < bytes; j++) out[plane * bytes + j] = (float)(uint8_t)((codes[j] >> (plane * bits)) & mask);
}

INLINE void load_row(const void* p, int64_t at, int64_t size, int dtype, float* out) {
  if (dtype == BF16)
    for (int64_t j = 0; j < size; j++) out[j] = bf16_to_float(((const uint16_t*)p)[at + j]);
  else
    for (int64_t j = 0; j < size; j++) out[j] = load_float(p, at + j, dtype);
}

INLINE float dot(const float* a, const float* b, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; j++) sum += a[j] * b[j];
  return sum;
}

// --------------------------------------------------------------------------------------------- in floats: any machine

INLINE void scores_by_token(const Part& k, const Shape& s, State& state, int64_t pair, int64_t first, int64_t n) {
  for (int64_t t = first; t < first + n; t++) {
    token_codes(k.codes + pair * k.codes_stride + t * s.size * k.bits / 8, k.bits, s.size, state.row.data());
    float scale = half_to_float(k.scale[pair * k.scale_stride + t]);
    float minimum = half_to_float(k.minimum[pair * k.scale_stride + t]);
    for (int64_t h = 0; h < s.heads; h++)
      state.scores[h * MAX_TILE + t - first] =
          scale * dot(&state.q[h * s.size], state.row.data(), s.size) + minimum * state.q_sum[h];
  }
}

// q s of one block in state.scaled, and q m in state.shift.
INLINE void scale_query(const Part& k, const Shape& s, State& state, int64_t pair, int64_t block) {
  float* shift = state.shift.data();
  const uint16_t* scale = k.scale + pair * k.scale_stride + block * s.size;
  const uint16_t* minimum = k.minimum + pair * k.scale_stride + block * s.size;
  for (int64_t h = 0; h < s.heads; h++) shift[h] = 0;
  for (int64_t j = 0; j < s.size; j++) {
    float sj = half_to_float(scale[j]), mj = half_to_float(minimum[j]);
    for (int64_t h = 0; h < s.heads; h++) {
      float q = state.q[h * s.size + j];
      state.scaled[h * s.size + j] = q * sj;
      shift[h] += q * mj;
    }
  }
}

INLINE void scores_by_channel(const Part& k, const Shape& s, State& state, int64_t pair, int64_t first, int64_t n) {
  int64_t rows = k.block * k.bits / 8;
  uint8_t mask = (uint8_t)((1 << k.bits) - 1);
  for (int64_t block = first / k.block; block < (first + n) / k.block; block++) {
    scale_query(k, s, state, pair, block);
    const uint8_t* codes = k.codes + pair * k.codes_stride + block * rows * s.size;
    for (int64_t plane = 0; plane < 8 / k.bits; plane++)
      for (int64_t r = 0; r < rows; r++) {
        for (int64_t j = 0; j < s.size; j++)
          state.row[j] = (float)(uint8_t)((codes[r * s.size + j] >> (plane * k.bits)) & mask);
        int64_t at = block * k.block + plane * rows + r - first;
        for (int64_t h = 0; h < s.heads; h++)
          state.scores[h * MAX_TILE + at] = dot(&state.scaled[h * s.size], state.row.data(), s.size) + state.shift[h];
      }
  }
}

INLINE void values_by_token(const Part& v, const Shape& s, State& state, int64_t pair, int64_t first, int64_t n) {
  int64_t group = s.size / v.groups;
  for (int64_t t = first; t < first + n; t++) {
    token_codes(v.codes + pair * v.codes_stride + t * s.size * v.bits / 8, v.bits, s.size, state.row.data());
    int64_t at = pair * v.scale_stride + t * v.groups;
    for (int64_t g = 0; g < v.groups; g++) {
      float scale = half_to_float(v.scale[at + g]), minimum = half_to_float(v.minimum[at + g]);
      for (int64_t j = g * group; j < (g + 1) * group; j++) state.row[j] = state.row[j] * scale + minimum;
    }
    for (int64_t h = 0; h < s.heads; h++) {
      float p = state.scores[h * MAX_TILE + t - first];
      float* out = &state.out[h * s.size];
      for (int64_t j = 0; j < s.size; j++) out[j] += p * state.row[j];
    }
  }
}

INLINE void dense_scores(const Part& k, const Shape& s, State& state, int64_t pair, int64_t first, int64_t n, int64_t place) {
  for (int64_t t = 0; t < n; t++) {
    load_row(k.dense, pair * k.dense_stride + (first + t) * s.size, s.size, s.dtype, state.row.data());
    for (int64_t h = 0; h < s.heads; h++)
      state.scores[h * MAX_TILE + place + t] = dot(&state.q[h * s.size], state.row.data(), s.size);
  }
}

INLINE void dense_values(const Part& v, const Shape& s, State& state, int64_t pair, int64_t first, int64_t n, int64_t place) {
  for (int64_t t = 0; t < n; t++) {
    load_row(v.dense, pair * v.dense_stride + (first + t) * s.size, s.size, s.dtype, state.row.data());
    for (int64_t h = 0; h < s.heads; h++) {
      float p = state.scores[h * MAX_TILE + place + t];
      float* out = &state.out[h * s.size];
      for (int64_t j = 0; j < s.size; j++) out[j] += p * state.row[j];
    }
  }
}

#ifdef X86
// -------------------------------------------------------------------------------------------------------- AVX-512
#define TARGET_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512vnni,popcnt,bmi2,fma,f16c")))
namespace avx512 {

// Rows of bytes -> dword columns: cols[c] holds bytes 4 c … 4 c + 3 of 16 rows, a row a lane; missing rows are 0.
TARGET_VNNI inline void columns(const uint8_t* base, int64_t stride, int64_t rows, int64_t bytes, __m512i* cols) {
  for (int64_t at = 0; at < bytes; at += 64, cols += 16) {
    __mmask64 m = bytes - at >= 64 ? ~0ull : _bzhi_u64(~0ull, bytes - at);
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) {
      _mm_prefetch((const char*)base + i * stride + at + AHEAD, _MM_HINT_T1);
      r[i] = i < rows ? _mm512_maskz_loadu_epi8(m, base + i * stride + at) : _mm512_setzero_si512();
    }
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
      for (int j = 0; j < 2; j++) {
        r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
        r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
      }
    // r[4 a + b]: rows 4 a … 4 a + 3, dword b of each 128-bit quarter
    for (int b = 0; b < 4; b++) {
      __m512i x = _mm512_shuffle_i32x4(r[b], r[4 + b], 0x88), y = _mm512_shuffle_i32x4(r[8 + b], r[12 + b], 0x88);
      __m512i z = _mm512_shuffle_i32x4(r[b], r[4 + b], 0xdd), w = _mm512_shuffle_i32x4(r[8 + b], r[12 + b], 0xdd);
      cols[b] = _mm512_shuffle_i32x4(x, y, 0x88);
      cols[8 + b] = _mm512_shuffle_i32x4(x, y, 0xdd);
      cols[4 + b] = _mm512_shuffle_i32x4(z, w, 0x88);
      cols[12 + b] = _mm512_shuffle_i32x4(z, w, 0xdd);
    }
  }
}

template <int DIGITS>
TARGET_VNNI inline __m512 digits_to_float(const __m512i* sum) {
  __m512i top = _mm512_add_epi32(_mm512_slli_epi32(sum[0], 8), sum[1]);
  if (DIGITS == 2) return _mm512_cvtepi32_ps(top);
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(top), _mm512_set1_ps(256), _mm512_cvtepi32_ps(sum[DIGITS - 1]));
}

// One plane of `count` dword columns times the digits of HEADS queries: sum[head][digit] += …; digits: the dword of column 0.
template <int DIGITS, int HEADS>
TARGET_VNNI inline void add_dots(const __m512i* cols, int64_t count, int shift, __m512i mask, const int8_t* digits,
                                 int64_t head_stride, int64_t digit_stride, __m512i (*sum)[DIGITS]) {
  constexpr int CHAINS = HEADS * DIGITS >= 8 ? 1 : HEADS * DIGITS >= 4 ? 2 : 4;  // an instruction takes five cycles
  __m512i acc[CHAINS][HEADS][DIGITS];
  for (int u = 0; u < CHAINS; u++)
    for (int h = 0; h < HEADS; h++)
      for (int d = 0; d < DIGITS; d++) acc[u][h][d] = u ? _mm512_setzero_si512() : sum[h][d];
  for (int64_t c = 0; c < count; c += CHAINS)
    for (int u = 0; u < CHAINS; u++) {  // columns beyond the last hold zeros, and their digits are 0
      __m512i codes = _mm512_and_si512(_mm512_srl_epi16(cols[c + u], _mm_cvtsi32_si128(shift)), mask);
      for (int h = 0; h < HEADS; h++)
        for (int d = 0; d < DIGITS; d++) {
          int32_t digit;
          std::memcpy(&digit, digits + h * head_stride + d * digit_stride + 4 * (c + u), 4);
          acc[u][h][d] = _mm512_dpbusd_epi32(acc[u][h][d], codes, _mm512_set1_epi32(digit));
        }
    }
  for (int h = 0; h < HEADS; h++)
    for (int d = 0; d < DIGITS; d++) {
      for (int u = 1; u < CHAINS; u++) acc[0][h][d] = _mm512_add_epi32(acc[0][h][d], acc[u][h][d]);
      sum[h][d] = acc[0][h][d];
    }
}

// x (n,) / step as signed digits, the top one first: out[d * stride + at(i)], at(i) = i. n up to a multiple of 16 is readable.
template <int DIGITS>
TARGET_VNNI inline void to_digits(const float* x, int64_t n, float step, int8_t* out, int64_t stride) {
  __m512 inverse = _mm512_set1_ps(step > 0 ? 1 / step : 0);
  for (int64_t i = 0; i < n; i += 16) {
    __mmask16 m = n - i >= 16 ? 0xffff : (1u << (n - i)) - 1;
    __m512i rest = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(m, x + i), inverse));
    for (int d = DIGITS - 1; d >= 0; d--) {
      _mm_mask_storeu_epi8(out + d * stride + i, m, _mm512_cvtepi32_epi8(rest));
      __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(rest, 24), 24);
      rest = _mm512_srai_epi32(_mm512_sub_epi32(rest, low), 8);
    }
  }
}

TARGET_VNNI inline float largest(const float* x, int64_t n) {
  __m512 peak = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16)
    peak = _mm512_max_ps(peak, _mm512_abs_ps(_mm512_maskz_loadu_ps(n - i >= 16 ? 0xffff : (1u << (n - i)) - 1, x + i)));
  return _mm512_reduce_max_ps(peak);
}

TARGET_VNNI inline __m512 halves(const uint16_t* p, int64_t n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(n >= 16 ? 0xffff : (1u << n) - 1, p));
}

static const int64_t QUERY_STRIDE = 4 * MAX_HEAD;  // of digits: planes times padded bytes of a row

// The digits of q itself, for keys by token: plane p, byte j is channel p bytes + j.
template <int DIGITS>
TARGET_VNNI inline void query_digits(const Part& k, const Shape& s, State& state) {
  int64_t bytes = s.size * k.bits / 8, padded = (bytes + 63) / 64 * 64;
  std::fill(state.q_digits.begin(), state.q_digits.end(), 0);
  for (int64_t h = 0; h < s.heads; h++) {
    const float* q = &state.q[h * s.size];
    state.q_step[h] = fixed_step(largest(q, s.size), DIGITS);
    for (int64_t p = 0; p < 8 / k.bits; p++)
      to_digits<DIGITS>(q + p * bytes, bytes, state.q_step[h], &state.q_digits[h * DIGITS * QUERY_STRIDE + p * padded],
                        QUERY_STRIDE);
  }
}

template <int DIGITS, int HEADS>
TARGET_VNNI inline void token_dots(const Part& k, const Shape& s, State& state, const __m512i* cols, int64_t h,
                                   __m512 scale, __m512 minimum, float* scores, __mmask16 there) {
  int64_t bytes = s.size * k.bits / 8, padded = (bytes + 63) / 64 * 64;
  __m512i mask = _mm512_set1_epi8((char)((1 << k.bits) - 1)), sum[HEADS][DIGITS];
  for (auto& head : sum)
    for (auto& one : head) one = _mm512_setzero_si512();
  for (int p = 0; p < 8 / k.bits; p++)
    add_dots<DIGITS, HEADS>(cols, (bytes + 3) / 4, p * (int)k.bits, mask,
                            &state.q_digits[h * DIGITS * QUERY_STRIDE + p * padded], DIGITS * QUERY_STRIDE, QUERY_STRIDE, sum);
  for (int i = 0; i < HEADS; i++) {
    __m512 product = _mm512_mul_ps(digits_to_float<DIGITS>(sum[i]), _mm512_set1_ps(state.q_step[h + i]));
    product = _mm512_fmadd_ps(product, scale, _mm512_mul_ps(minimum, _mm512_set1_ps(state.q_sum[h + i])));
    _mm512_mask_storeu_ps(scores + (h + i) * MAX_TILE, there, product);
  }
}

template <int DIGITS>
TARGET_VNNI inline void scores_by_token(const Part& k, const Shape& s, State& state, int64_t pair, int64_t first, int64_t n) {
  int64_t bytes = s.size * k.bits / 8;
  __m512i cols[MAX_HEAD / 4 + 4];
  for (int64_t t = 0; t < n; t += 16) {
    int64_t rows = std::min<int64_t>(16, n - t), at = pair * k.scale_stride + first + t;
    columns(k.codes + pair * k.codes_stride + (first + t) * bytes, bytes, rows, bytes, cols);
    __m512 scale = halves(k.scale + at, rows), minimum = halves(k.minimum + at, rows);
    __mmask16 there = rows >= 16 ? 0xffff : (1u << rows) - 1;
    float* scores = &state.scores[t];
    int64_t h = 0;
    for (; h + 4 <= s.heads; h += 4) token_dots<DIGITS, 4>(k, s, state, cols, h, scale, minimum, scores, there);
    if (s.heads - h == 3) token_dots<DIGITS, 3>(k, s, state, cols, h, scale, minimum, scores, there);
    if (s.heads - h == 2) token_dots<DIGITS, 2>(k, s, state, cols, h, scale, minimum, scores, there);
    if (s.heads - h == 1) token_dots<DIGITS, 1>(k, s, state, cols, h, scale, minimum, scores, there);
  }
}

template <int DIGITS, int HEADS>
TARGET_VNNI inline void channel_dots(const Part& k, const Shape& s, State& state, const __m512i* cols, int64_t h,
                                     int64_t rows, float* scores, __mmask16 there) {
  __m512i mask = _mm512_set1_epi8((char)((1 << k.bits) - 1));
  for (int p = 0; p < 8 / k.bits; p++) {
    __m512i sum[HEADS][DIGITS];
    for (auto& head : sum)
      for (auto& one : head) one = _mm512_setzero_si512();
    add_dots<DIGITS, HEADS>(cols, (s.size + 3) / 4, p * (int)k.bits, mask, &state.q_digits[h * DIGITS * QUERY_STRIDE],
                            DIGITS * QUERY_STRIDE, QUERY_STRIDE, sum);
    for (int i = 0; i < HEADS; i++) {
      __m512 product = _mm512_fmadd_ps(digits_to_float<DIGITS>(sum[i]), _mm512_set1_ps(state.q_step[h + i]),
                                       _mm512_set1_ps(state.shift[h + i]));
      _mm512_mask_storeu_ps(scores + (h + i) * MAX_TILE + p * rows, there, product);
    }
  }
}

template <int DIGITS>
TARGET_VNNI inline void scores_by_channel(const Part& k, const Shape& s, State& state, int64_t pair, int64_t first, int64_t n) {
  int64_t rows = k.block * k.bits / 8;
  __m512i cols[MAX_HEAD / 4 + 4];
  for (int64_t block = first / k.block; block < (first + n) / k.block; block++) {
    alignas(64) float scale[MAX_HEAD], minimum[MAX_HEAD];
    for (int64_t j = 0, at = pair * k.scale_stride + block * s.size; j < s.size; j += 16) {
      _mm512_store_ps(scale + j, halves(k.scale + at + j, s.size - j));
      _mm512_store_ps(minimum + j, halves(k.minimum + at + j, s.size - j));
    }
    for (int64_t h = 0; h < s.heads; h++) {
      __m512 off = _mm512_setzero_ps(), peak = off;
      float* scaled = &state.scaled[h * s.size];
      for (int64_t j = 0; j < s.size; j += 16) {
        __mmask16 m = s.size - j >= 16 ? 0xffff : (1u << (s.size - j)) - 1;
        __m512 q = _mm512_maskz_loadu_ps(m, &state.q[h * s.size + j]);
        __m512 product = _mm512_mul_ps(q, _mm512_load_ps(scale + j));
        _mm512_mask_storeu_ps(scaled + j, m, product);
        peak = _mm512_max_ps(peak, _mm512_abs_ps(product));
        off = _mm512_fmadd_ps(q, _mm512_load_ps(minimum + j), off);
      }
      state.shift[h] = _mm512_reduce_add_ps(off);
      state.q_step[h] = fixed_step(_mm512_reduce_max_ps(peak), DIGITS);
      to_digits<DIGITS>(scaled, s.size, state.q_step[h], &state.q_digits[h * DIGITS * QUERY_STRIDE], QUERY_STRIDE);
    }
    const uint8_t* codes = k.codes + pair * k.codes_stride + block * rows * s.size;
    for (int64_t r = 0; r < rows; r += 16) {
      int64_t count = std::min<int64_t>(16, rows - r);
      columns(codes + r * s.size, s.size, count, s.size, cols);
      __mmask16 there = count >= 16 ? 0xffff : (1u << count) - 1;
      float* scores = &state.scores[block * k.block + r - first];
      int64_t h = 0;
      for (; h + 4 <= s.heads; h += 4) channel_dots<DIGITS, 4>(k, s, state, cols, h, rows, scores, there);
      if (s.heads - h == 3) channel_dots<DIGITS, 3>(k, s, state, cols, h, rows, scores, there);
      if (s.heads - h == 2) channel_dots<DIGITS, 2>(k, s, state, cols, h, rows, scores, there);
      if (s.heads - h == 1) channel_dots<DIGITS, 1>(k, s, state, cols, h, rows, scores, there);
    }
  }
}

// How the values' codes fill vectors: rows of up to 16 or 32 bytes share one, four or two quads of tokens side by side.
struct Lanes {
  int64_t bytes, chunks, planes, quads, width, group;  // quads of tokens in a vector, bytes of one of them
  int32_t where[4][MAX_HEAD / 64][16];  // plane, chunk: the quad and group whose weights a lane takes
  Lanes(const Part& v, const Shape& s)
      : bytes(s.size * v.bits / 8), chunks((bytes + 63) / 64), planes(8 / v.bits),
        quads(bytes > 32 ? 1 : bytes > 16 ? 2 : 4), width(64 / quads), group(s.size / v.groups) {
    for (int64_t p = 0; p < planes; p++)
      for (int64_t c = 0; c < chunks; c++)
        for (int l = 0; l < 16; l++) {
          int64_t channel = p * bytes + byte(c, 0, l / 4 * 4);
          where[p][c][l] = (int32_t)(l / 4 * 16 / width * v.groups + std::min(channel / group, v.groups - 1));
        }
  }
  // Lane l of vector j (0 … 3) of chunk c is byte ….
  int64_t byte(int64_t c, int j, int lane) const { return 64 * c + 16 * (lane / 4) % width + 4 * j + lane % 4; }
};

// Whether sums of integers serve: a quarter of a vector must belong to one group.
inline bool fits(const Part& v, const Shape& s) {
  return v.groups == 1 || (16 % v.groups == 0 && s.size / v.groups % 16 == 0 && s.size * v.bits / 8 % 16 == 0);
}

// Four rows of bytes from row 4 q on, chunk `at`, of each quad in the vector -> vectors of dwords of four tokens.
TARGET_VNNI inline void interleave(const uint8_t* base, const Lanes& lanes, int64_t at, int64_t q, int64_t n, __m512i* out) {
  __m512i r[4];
  for (int i = 0; i < 4; i++) {
    if (lanes.quads == 1) {
      __mmask64 m = lanes.bytes - at >= 64 ? ~0ull : _bzhi_u64(~0ull, lanes.bytes - at);
      const uint8_t* row = base + (4 * q + i) * lanes.bytes + at;
      _mm_prefetch((const char*)row + AHEAD, _MM_HINT_T1);
      r[i] = 4 * q + i < n ? _mm512_maskz_loadu_epi8(m, row) : _mm512_setzero_si512();
    } else if (lanes.quads == 2) {
      __mmask32 m = _bzhi_u32(~0u, lanes.bytes);
      const uint8_t *row = base + (4 * q + i) * lanes.bytes, *other = row + 4 * lanes.bytes;
      _mm_prefetch((const char*)row + AHEAD, _MM_HINT_T1);
      __m256i low = 4 * q + i < n ? _mm256_maskz_loadu_epi8(m, row) : _mm256_setzero_si256();
      __m256i high = 4 * q + 4 + i < n ? _mm256_maskz_loadu_epi8(m, other) : _mm256_setzero_si256();
      r[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    } else {
      alignas(64) uint8_t quarter[64] = {};
      for (int k = 0; k < 4; k++)
        if (4 * (q + k) + i < n) std::memcpy(quarter + 16 * k, base + (4 * (q + k) + i) * lanes.bytes, lanes.bytes);
      r[i] = _mm512_load_si512(quarter);
    }
  }
  __m512i a = _mm512_unpacklo_epi8(r[0], r[1]), b = _mm512_unpackhi_epi8(r[0], r[1]);
  __m512i c = _mm512_unpacklo_epi8(r[2], r[3]), d = _mm512_unpackhi_epi8(r[2], r[3]);
  out[0] = _mm512_unpacklo_epi16(a, c);
  out[1] = _mm512_unpackhi_epi16(a, c);
  out[2] = _mm512_unpacklo_epi16(b, d);
  out[3] = _mm512_unpackhi_epi16(b, d);
}

static const int64_t WEIGHTS = MAX_TILE * MAX_GROUPS + 64;  // of one head, or digits of them

// p s of a tile as digits: (digit, quad, group, token of the quad); adds p m to state.offset, a lane for each of 16 numbers
// of the order (token, group), and returns the step.
template <int DIGITS>
TARGET_VNNI inline float weight_digits(const Part& v, State& state, int64_t h, int64_t n, const float* scale,
                                       const float* minimum, int8_t* digits) {
  const int64_t count = n * v.groups;
  alignas(64) float weights[WEIGHTS];
  alignas(64) int32_t lane[16];
  for (int l = 0; l < 16; l++) lane[l] = l / (int)v.groups;
  const __m512i spread = _mm512_load_si512(lane);
  const float* p = &state.scores[h * MAX_TILE];
  float* offset = &state.offset[h * MAX_GROUPS];
  __m512 peak = _mm512_setzero_ps(), off = _mm512_loadu_ps(offset);
  for (int64_t i = 0; i < count; i += 16) {
    __mmask16 there = count - i >= 16 ? 0xffff : (1u << (count - i)) - 1;
    __m512 weight = _mm512_permutexvar_ps(spread, _mm512_loadu_ps(p + i / v.groups));
    off = _mm512_mask3_fmadd_ps(weight, _mm512_loadu_ps(minimum + i), off, there);
    weight = _mm512_maskz_mul_ps(there, weight, _mm512_loadu_ps(scale + i));
    _mm512_store_ps(weights + i, weight);
    peak = _mm512_max_ps(peak, weight);
  }
  _mm512_storeu_ps(offset, off);
  float step = fixed_step(_mm512_reduce_max_ps(peak), DIGITS);
  to_digits<DIGITS>(weights, (count + 15) / 16 * 16, step, digits, WEIGHTS);
  if (v.groups == 1) return step;
  alignas(16) int8_t order[16];  // (token, group) -> (group, token) within a quad
  int64_t size = std::min<int64_t>(4 * v.groups, 16);
  for (int64_t i = 0; i < 16; i++) order[i] = (int8_t)(i / size * size + i % size % 4 * v.groups + i % size / 4);
  for (int d = 0; d < DIGITS; d++)
    for (int64_t i = 0; i < count; i += 4 * std::max<int64_t>(v.groups, 4)) {
      int8_t* at = digits + d * WEIGHTS + i;
      if (v.groups <= 4) {
        __m128i moved = _mm_shuffle_epi8(_mm_loadu_si128((__m128i*)at), _mm_load_si128((const __m128i*)order));
        _mm_storeu_si128((__m128i*)at, moved);
      } else {
        int8_t quad[4 * MAX_GROUPS];
        std::memcpy(quad, at, 4 * v.groups);
        for (int64_t j = 0; j < 4 * v.groups; j++) at[j] = quad[j % 4 * v.groups + j / 4];
      }
    }
  return step;
}

// Chunk c, one plane, of a tile of unpacked codes times the weights of HEADS heads.
template <int DIGITS, int HEADS>
TARGET_VNNI inline void add_values(const Part& v, const Lanes& lanes, const __m512i* codes, int64_t steps, int64_t plane,
                                   int64_t c, const int8_t* digits, const float* step, float* out) {
  __m512i sum[HEADS][4][DIGITS];
  for (int h = 0; h < HEADS; h++)
    for (int j = 0; j < 4; j++)
      for (int d = 0; d < DIGITS; d++) sum[h][j][d] = _mm512_setzero_si512();
  const __m512i place = _mm512_loadu_si512(lanes.where[plane][c]);
  const int64_t stride = lanes.quads * v.groups * 4;
  const bool plain = lanes.quads * v.groups == 1;
  for (int64_t s = 0; s < steps; s++) {
    __m512i code[4];
    for (int j = 0; j < 4; j++) code[j] = codes[(s * lanes.planes + plane) * 4 + j];
    for (int h = 0; h < HEADS; h++)
      for (int d = 0; d < DIGITS; d++) {
        const int8_t* at = digits + (h * DIGITS + d) * WEIGHTS + s * stride;
        __m512i digit;
        if (plain) {
          int32_t dword;
          std::memcpy(&dword, at, 4);
          digit = _mm512_set1_epi32(dword);
        } else {
          digit = _mm512_permutexvar_epi32(place, _mm512_loadu_si512(at));
        }
        for (int j = 0; j < 4; j++) sum[h][j][d] = _mm512_dpbusd_epi32(sum[h][j][d], code[j], digit);
      }
  }
  for (int h = 0; h < HEADS; h++)
    for (int j = 0; j < 4; j++) {
      float* to = out + h * 4 * MAX_HEAD + (plane * lanes.chunks + c) * 64 + 16 * j;
      __m512 part = _mm512_fmadd_ps(digits_to_float<DIGITS>(sum[h][j]), _mm512_set1_ps(step[h]), _mm512_loadu_ps(to));
      _mm512_storeu_ps(to, part);
    }
}

// sum_t p_t v_t of a tile: in state.packed_out (heads, plane, chunk, 4, 16) in the order of `Lanes`, minima in state.offset.
template <int DIGITS>
TARGET_VNNI inline void values_by_token(const Part& v, const Shape& s, const Lanes& lanes, State& state, int64_t pair,
                                        int64_t first, int64_t n) {
  constexpr int TOGETHER = DIGITS == 2 ? 2 : 1;  // heads, by the registers that their sums take
  const int64_t steps = ((n + 3) / 4 + lanes.quads - 1) / lanes.quads, count = n * v.groups;
  const uint8_t* base = v.codes + pair * v.codes_stride + first * lanes.bytes;
  const int64_t at_scale = pair * v.scale_stride + first * v.groups;
  alignas(64) __m512i codes[MAX_TILE / 4 * 16];
  alignas(64) float scale[WEIGHTS], minimum[WEIGHTS];
  for (int64_t i = 0; i < count; i += 16) {
    _mm512_store_ps(scale + i, halves(v.scale + at_scale + i, count - i));
    _mm512_store_ps(minimum + i, halves(v.minimum + at_scale + i, count - i));
  }
  float* step = state.step.data();
  for (int64_t h = 0; h < s.heads; h++)
    step[h] = weight_digits<DIGITS>(v, state, h, n, scale, minimum, &state.weights[h * DIGITS * WEIGHTS]);
  const __m512i mask = _mm512_set1_epi8((char)((1 << v.bits) - 1));
  for (int64_t c = 0; c < lanes.chunks; c++) {
    for (int64_t i = 0; i < steps; i++) {
      __m512i packed[4];
      interleave(base, lanes, 64 * c, i * lanes.quads, n, packed);
      for (int64_t plane = 0; plane < lanes.planes; plane++)
        for (int j = 0; j < 4; j++)
          codes[(i * lanes.planes + plane) * 4 + j] =
              _mm512_and_si512(_mm512_srl_epi16(packed[j], _mm_cvtsi32_si128((int)(plane * v.bits))), mask);
    }
    for (int64_t plane = 0; plane < lanes.planes; plane++) {
      int64_t h = 0;
      for (; h + TOGETHER <= s.heads; h += TOGETHER)
        add_values<DIGITS, TOGETHER>(v, lanes, codes, steps, plane, c, &state.weights[h * DIGITS * WEIGHTS], step + h,
                                     &state.packed_out[h * 4 * MAX_HEAD]);
      for (; h < s.heads; h++)
        add_values<DIGITS, 1>(v, lanes, codes, steps, plane, c, &state.weights[h * DIGITS * WEIGHTS], step + h,
                              &state.packed_out[h * 4 * MAX_HEAD]);
    }
  }
}

// Adds what `values_by_token` gathered to state.out.
inline void collect(const Part& v, const Shape& s, const Lanes& lanes, State& state) {
  for (int64_t h = 0; h < s.heads; h++) {
    float* out = &state.out[h * s.size];
    for (int64_t plane = 0; plane < lanes.planes; plane++)
      for (int64_t c = 0; c < lanes.chunks; c++)
        for (int j = 0; j < 4; j++)
          for (int l = 0; l < 16; l++) {
            int64_t byte = lanes.byte(c, j, l);
            if (byte < lanes.bytes && byte - 64 * c < lanes.width)
              out[plane * lanes.bytes + byte] +=
                  state.packed_out[h * 4 * MAX_HEAD + (plane * lanes.chunks + c) * 64 + 16 * j + l];
          }
    for (int64_t i = 0; i < s.size; i++)
      for (int64_t l = i / lanes.group; l < MAX_GROUPS; l += v.groups) out[i] += state.offset[h * MAX_GROUPS + l];
  }
}
}  // namespace avx512
#endif

// ---------------------------------------------------------------------------------------------------- one stretch

INLINE void rescale(float* x, int64_t n, float by) {
  for (int64_t i = 0; i < n; i++) x[i] *= by;
}

// Scores of n tokens -> weights relative to the largest score so far; what was summed before is rescaled.
INLINE void soften(const Shape& s, State& state, const uint8_t* mask, int64_t n, bool packed) {
  for (int64_t h = 0; h < s.heads; h++) {
    float* score = &state.scores[h * MAX_TILE];
    if (mask)
      for (int64_t t = 0; t < n; t++) score[t] = mask[t] ? score[t] : -INFINITY;
    float peak = state.peak[h];
#pragma omp simd reduction(max : peak)
    for (int64_t t = 0; t < n; t++) peak = score[t] > peak ? score[t] : peak;
    if (peak == -INFINITY) {  // nothing to attend to yet
      for (int64_t t = 0; t < n; t++) score[t] = 0;
      continue;
    }
    if (peak > state.peak[h]) {
      float by = fast_exp(state.peak[h] - peak);
      state.total[h] *= by;
      rescale(&state.out[h * s.size], s.size, by);
      if (packed) {
        rescale(&state.packed_out[h * 4 * MAX_HEAD], 4 * MAX_HEAD, by);
        rescale(&state.offset[h * MAX_GROUPS], MAX_GROUPS, by);
      }
      state.peak[h] = peak;
    }
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t t = 0; t < n; t++) {
      score[t] = fast_exp(score[t] - peak);
      total += score[t];
    }
    state.total[h] += total;
  }
}

// Tokens [first, last) for key head `pair`: weights and sums end up in `state`.
template <int LEVEL, int DIGITS>
INLINE void attend(const Part& k, const Part& v, const Shape& s, State& state, int64_t pair, const uint8_t* mask,
                   int64_t first, int64_t last, int64_t tile) {
#ifdef X86
  const bool integers = LEVEL >= AVX512 && avx512::fits(v, s);
  const avx512::Lanes lanes(v, s);
#endif
  std::fill(state.peak.begin(), state.peak.end(), -INFINITY);
  std::fill(state.total.begin(), state.total.end(), 0.0f);
  std::fill(state.out.begin(), state.out.end(), 0.0f);
  std::fill(state.packed_out.begin(), state.packed_out.end(), 0.0f);
  std::fill(state.offset.begin(), state.offset.end(), 0.0f);
#ifdef X86
  if (LEVEL >= AVX512 && !k.block && k.packed) avx512::query_digits<DIGITS>(k, s, state);
  if (LEVEL >= AVX512 && k.block) std::fill(state.q_digits.begin(), state.q_digits.end(), 0);
#endif
  for (int64_t t = first; t < last; t += tile) {
    int64_t n = std::min(tile, last - t);
    int64_t nk = std::max<int64_t>(0, std::min(n, k.packed - t)), nv = std::max<int64_t>(0, std::min(n, v.packed - t));
#ifdef X86
    if (LEVEL >= AVX512) {
      if (nk && k.block) avx512::scores_by_channel<DIGITS>(k, s, state, pair, t, nk);
      else if (nk) avx512::scores_by_token<DIGITS>(k, s, state, pair, t, nk);
    } else
#endif
    {
      if (nk && k.block) scores_by_channel(k, s, state, pair, t, nk);
      else if (nk) scores_by_token(k, s, state, pair, t, nk);
    }
    if (n > nk) dense_scores(k, s, state, pair, t + nk - k.packed, n - nk, nk);
    soften(s, state, mask ? mask + t : nullptr, n, LEVEL >= AVX512 && v.packed);
#ifdef X86
    if (integers) {
      if (nv) avx512::values_by_token<DIGITS>(v, s, lanes, state, pair, t, nv);
    } else
#endif
    if (nv) values_by_token(v, s, state, pair, t, nv);
    if (n > nv) dense_values(v, s, state, pair, t + nv - v.packed, n - nv, nv);
  }
#ifdef X86
  if (integers && v.packed) avx512::collect(v, s, lanes, state);
#endif
}

typedef void Attend(const Part&, const Part&, const Shape&, State&, int64_t, const uint8_t*, int64_t, int64_t, int64_t);

static void attend_portable(const Part& k, const Part& v, const Shape& s, State& state, int64_t pair, const uint8_t* mask,
                            int64_t first, int64_t last, int64_t tile) {
  attend<PORTABLE, 2>(k, v, s, state, pair, mask, first, last, tile);
}
#ifdef X86
TARGET_AVX2 static void attend_avx2(const Part& k, const Part& v, const Shape& s, State& state, int64_t pair,
                                    const uint8_t* mask, int64_t first, int64_t last, int64_t tile) {
  attend<AVX2, 2>(k, v, s, state, pair, mask, first, last, tile);
}
template <int DIGITS>
TARGET_VNNI static void attend_avx512(const Part& k, const Part& v, const Shape& s, State& state, int64_t pair,
                                      const uint8_t* mask, int64_t first, int64_t last, int64_t tile) {
  attend<AVX512, DIGITS>(k, v, s, state, pair, mask, first, last, tile);
}
#endif

// ------------------------------------------------------------------------------------------------------ entry points

// out (rows, heads, size) = attention of q (rows, heads, size) to `keys` and `values` (kv_heads each); mask (rows, tokens), 1 =
// attended to, or null. The arguments of a part: see `Part`. All floats but scales and minima (fp16) are of one dtype.
EXPORT void slimzoo_kv_attention(const void* q, const uint8_t* k_codes, const uint16_t* k_scale, const uint16_t* k_minimum,
                                     const void* k_dense, const uint8_t* v_codes, const uint16_t* v_scale,
                                     const uint16_t* v_minimum, const void* v_dense, const uint8_t* mask, void* out,
                                     int64_t k_bits, int64_t k_packed, int64_t k_rest, int64_t k_block, int64_t k_groups,
                                     int64_t k_codes_stride, int64_t k_scale_stride, int64_t k_dense_stride, int64_t v_bits,
                                     int64_t v_packed, int64_t v_rest, int64_t v_block, int64_t v_groups,
                                     int64_t v_codes_stride, int64_t v_scale_stride, int64_t v_dense_stride, int64_t rows,
                                     int64_t heads, int64_t kv_heads, int64_t size, int dtype, float scaling, int level,
                                     int threads) {
  Part k{k_codes, k_scale, k_minimum, k_dense, k_bits, k_packed, k_rest, k_block, std::max<int64_t>(k_groups, 1),
         k_codes_stride, k_scale_stride, k_dense_stride};
  Part v{v_codes, v_scale, v_minimum, v_dense, v_bits, v_packed, v_rest, v_block, std::max<int64_t>(v_groups, 1),
         v_codes_stride, v_scale_stride, v_dense_stride};
  Shape s{k_packed + k_rest, heads / kv_heads, size, dtype, dtype == F32 ? 3 : 2};
  int64_t pairs = rows * kv_heads, tile = k.block > 64 ? k.block : k.block ? 64 / k.block * k.block : 64;
  Attend* attend = attend_portable;
#ifdef X86
  if (level >= AVX512) attend = s.digits == 3 ? attend_avx512<3> : attend_avx512<2>;
  else if (level == AVX2) attend = attend_avx2;
#endif
  int64_t tiles = (s.tokens + tile - 1) / tile;
  int64_t splits = std::max<int64_t>(1, std::min<int64_t>({(4 * threads + pairs - 1) / pairs, (tiles + 3) / 4}));
  int64_t stretch = (tiles + splits - 1) / splits * tile;
  splits = (s.tokens + stretch - 1) / stretch;
  std::vector<float> part_out(pairs * splits * s.heads * size), part_peak(pairs * splits * s.heads), part_total(part_peak);
  int used = (int)std::min<int64_t>(threads, pairs * splits);
#pragma omp parallel num_threads(used)
  {
    State state(s, k.packed || v.packed);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < pairs * splits; task++) {
      int64_t pair = task / splits, first = task % splits * stretch;
      for (int64_t h = 0; h < s.heads; h++) {
        state.q_sum[h] = 0;
        for (int64_t j = 0; j < size; j++) {
          float x = load_float(q, (pair * s.heads + h) * size + j, dtype) * scaling;
          state.q[h * size + j] = x;
          state.q_sum[h] += x;
        }
      }
      attend(k, v, s, state, pair, mask ? mask + pair / kv_heads * s.tokens : nullptr, first,
             std::min(first + stretch, s.tokens), tile);
      std::copy(state.out.begin(), state.out.end(), &part_out[task * s.heads * size]);
      std::copy(state.peak.begin(), state.peak.end(), &part_peak[task * s.heads]);
      std::copy(state.total.begin(), state.total.end(), &part_total[task * s.heads]);
    }
  }
  std::vector<float> sum(size);
  for (int64_t pair = 0; pair < pairs; pair++)
    for (int64_t h = 0; h < s.heads; h++) {
      float peak = -INFINITY, total = 0;
      for (int64_t i = 0; i < splits; i++) peak = std::max(peak, part_peak[(pair * splits + i) * s.heads + h]);
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t i = 0; i < splits; i++) {
        int64_t at = (pair * splits + i) * s.heads + h;
        if (part_total[at] == 0) continue;
        float by = fast_exp(part_peak[at] - peak);
        total += by * part_total[at];
        for (int64_t j = 0; j < size; j++) sum[j] += by * part_out[at * size + j];
      }
      for (int64_t j = 0; j < size; j++)
        store_float(out, (pair * s.heads + h) * size + j, total > 0 ? sum[j] / total : 0, dtype);
    }
}

// Squared error of a group's codes for a scale and a minimum.
template <typename Get>
INLINE double group_error(Get get, int64_t n, float top, float s, float m) {
  double error = 0;
  for (int64_t i = 0; i < n; i++) {
    float code = std::min(top, std::max(0.0f, std::nearbyint((get(i) - m) / s)));
    double off = (double)code * s + m - get(i);
    error += off * off;
  }
  return error;
}

template <typename Get>
INLINE void quantize_group(Get get, int64_t n, int bits, bool with_zero, uint16_t* scale, uint16_t* minimum, uint8_t* codes,
                           int64_t step) {
  float low = get(0), high = low, top = (float)((1 << bits) - 1);
  for (int64_t i = 1; i < n; i++) {
    float x = get(i);
    low = x < low ? x : low;
    high = x > high ? x : high;
  }
  *minimum = float_to_half(std::min(65504.0f, std::max(-65504.0f, low)));
  *scale = float_to_half(std::min(65504.0f, (high - low) / top));
  if (!(*scale & 0x7fff) || (*scale & 0x8000)) *scale = 0x3c00;
  float s = half_to_float(*scale), m = half_to_float(*minimum);
  if (with_zero) {
    uint16_t nearest = float_to_half(std::min(65504.0f, std::max(-65504.0f, std::nearbyint(m / s) * s)));
    float multiple = half_to_float(nearest);  // with it 0 is on the grid
    if (group_error(get, n, top, s, multiple) < (1 - 1e-9) * group_error(get, n, top, s, m)) *minimum = nearest, m = multiple;
  }
  for (int64_t i = 0; i < n; i++) {
    float code = std::nearbyint((get(i) - m) / s);
    codes[i * step] = code > top ? (uint8_t)top : code > 0 ? (uint8_t)code : 0;
  }
}

// x (tokens, size) -> codes, scale and minimum: by token in groups of `group` numbers, or by channel in blocks of as many tokens.
EXPORT void slimzoo_kv_quantize(const void* x, uint8_t* codes, uint16_t* scale, uint16_t* minimum, int64_t tokens,
                                    int64_t size, int64_t group, int bits, int by_channel, int dtype, int threads) {
  int64_t unit = by_channel ? group : 1, units = tokens / unit, numbers = unit * size, bytes = numbers * bits / 8;
  int64_t scales = by_channel ? size : size / group;
  int used = units * numbers < 8192 ? 1 : threads;
#pragma omp parallel num_threads(used)
  {
    std::vector<float> values(numbers);
    std::vector<uint8_t> flat(numbers);
#pragma omp for schedule(static)
    for (int64_t u = 0; u < units; u++) {
      load_row(x, u * numbers, numbers, dtype, values.data());
      const float* value = values.data();
      for (int64_t g = 0; g < scales; g++) {
        int64_t start = by_channel ? g : g * group, step = by_channel ? size : 1;
        quantize_group([=](int64_t i) { return value[start + i * step]; }, group, bits, bits == 2 && !by_channel,
                       scale + u * scales + g,
                       minimum + u * scales + g, flat.data() + start, step);
      }
      uint8_t* to = codes + u * bytes;  // planes lie one after the other in both cases
      for (int64_t j = 0; j < bytes; j++) to[j] = flat[j];
      for (int plane = 1; plane < 8 / bits; plane++)
        for (int64_t j = 0; j < bytes; j++) to[j] |= (uint8_t)(flat[plane * bytes + j] << (plane * bits));
    }
  }
}
