// block_sparse_linear on CPU: a register-blocked product over the kept blocks only.
//
// Operations: 2 b_r b_c per kept block and token, so arithmetic bounds everything but a handful of tokens. A micro-tile
// of y, on AVX-512 14 tokens x 32 outputs or 28 x 16, stays in 28 registers while the kept columns of a block-row pass:
// per input 2 loads of weights and 14 broadcasts of x for 28 multiply-adds. For that a block-row's weights are laid out
// (inputs, outputs) and x (inputs, tokens of a micro-tile), transposed 16 x 16 in registers: a third of a cycle per
// number, which for weights is the price of six tokens. A tile of x fits the second-level cache and meets all rows of
// blocks; weights stream past it at 4.5 bytes a cycle over its micro-tiles. For bf16 pairs, numbers are pairs.
// Few tokens take dot products with the blocks as they are stored: each weight is read once, from memory.
//
// Measured on a Zen 4 core, 768 x 768, half of the blocks, 1576 tokens: 100 of 115 GFLOP/s in fp32, 195 of 228 in bf16,
// the same for blocks of 16, 32 and 64. What is missing is the layout and the sums' way to y.

#include <atomic>
#include <thread>
#include <utility>

#include "simd.hpp"

static const int PAIRS = 3;  // of bf16, as 32-bit numbers; the other kinds of numbers are fp32 made from a Dtype

static const int MAX_TOKENS = 28, MAX_WIDTH = 32, SLACK = 16;
static const int64_t TILE_FLOATS = 128 << 10;  // of x: half a second-level cache of 1 MB

// in (rows, stride) -> out[k * out_stride + row], k < depth numbers; what lies beyond `size` elements of a row is 0.
// Up to SLACK floats past the end of out may be written.
typedef void (*Pack)(const void* in, int64_t stride, int rows, int64_t size, int64_t depth, int kind, float* out,
                     int64_t out_stride);
// out[t * MAX_WIDTH + r] = sum over kept blocks of x (depth, T) and w (depth, width).
typedef void (*Tile)(const float* x, const float* w, const int32_t* columns, int64_t count, int64_t depth, float* out);
// out[c * MAX_WIDTH + r] for DOT_ROWS rows of a block-row, which begin at w, and vectors x of row_floats numbers each.
typedef void (*Dots)(const void* w, const float* x, const int32_t* columns, int64_t count, int64_t depth, int64_t b_r,
                     int64_t b_c, int64_t row_floats, int kind, float* out);
// y (tokens, stride) = out + bias for `width` outputs.
typedef void (*Store)(const float* out, const float* bias, int tokens, int width, void* y, int64_t stride, int dtype);

struct Micro {
  int lanes, width;  // outputs of one register, and of a micro-tile
  Pack pack;
  Store store;
  int narrow_tokens, wide_tokens;  // of a micro-tile with one or two registers of outputs
  Tile narrow[MAX_TOKENS + 1], wide[MAX_TOKENS + 1];  // by tokens
  Dots dots[MAX_VECTORS + 1];                         // by vectors; null where there are none
};

template <template <int, int> class F, int VECTORS, int... T>
void fill(Tile* tiles, std::integer_sequence<int, T...>) {
  ((tiles[T + 1] = F<T + 1, VECTORS>::run), ...);
}

template <template <int> class F, int... C>
void fill_dots(Dots* dots, std::integer_sequence<int, C...>) {
  ((dots[C + 1] = F<C + 1>::run), ...);
}

template <int NARROW, int WIDE, template <int, int> class F>
Micro make_micro(int lanes, int width, Pack pack, Store store) {
  Micro m{lanes, width, pack, store, NARROW, WIDE, {}, {}, {}};
  fill<F, 1>(m.narrow, std::make_integer_sequence<int, NARROW>());
  fill<F, 2>(m.wide, std::make_integer_sequence<int, WIDE>());
  return m;
}

template <int NARROW, int WIDE, template <int, int> class F, template <int> class G>
Micro make_micro(int lanes, int width, Pack pack, Store store) {
  Micro m = make_micro<NARROW, WIDE, F>(lanes, width, pack, store);
  fill_dots<G>(m.dots, std::make_integer_sequence<int, MAX_VECTORS>());
  return m;
}

static const int DOT_ROWS = 4;  // of a block, at a time: they share each load of x

// ------------------------------------------------------------------------------------------------------- portable

namespace portable {
void pack(const void* in, int64_t stride, int rows, int64_t size, int64_t depth, int kind, float* out,
          int64_t out_stride) {
  for (int i = 0; i < rows; i++)
    for (int64_t k = 0; k < depth; k++) out[k * out_stride + i] = k < size ? load_float(in, i * stride + k, kind) : 0;
}

void store(const float* out, const float* bias, int tokens, int width, void* y, int64_t stride, int dtype) {
  for (int t = 0; t < tokens; t++)
    for (int r = 0; r < width; r++) store_float(y, t * stride + r, out[t * MAX_WIDTH + r] + bias[r], dtype);
}

template <int T, int VECTORS>
struct Product {
  static void run(const float* x, const float* w, const int32_t* columns, int64_t count, int64_t depth, float* out) {
    constexpr int WIDTH = 8 * VECTORS;
    float acc[T][WIDTH] = {};
    for (int64_t n = 0; n < count; n++, w += depth * WIDTH) {
      const float* a = x + columns[n] * depth * T;
      for (int64_t k = 0; k < depth; k++)
        for (int t = 0; t < T; t++)
          for (int r = 0; r < WIDTH; r++) acc[t][r] += a[k * T + t] * w[k * WIDTH + r];
    }
    for (int t = 0; t < T; t++) std::memcpy(out + t * MAX_WIDTH, acc[t], sizeof acc[t]);
  }
};

}  // namespace portable

#ifdef X86
// ----------------------------------------------------------------------------------------------------------- AVX2

namespace avx2 {
template <int T, int VECTORS>
struct Product {
  TARGET_AVX2 static void run(const float* x, const float* w, const int32_t* columns, int64_t count, int64_t depth,
                              float* out) {
    __m256 acc[T][VECTORS];
    for (int t = 0; t < T; t++)
      for (int v = 0; v < VECTORS; v++) acc[t][v] = _mm256_setzero_ps();
    for (int64_t n = 0; n < count; n++, w += depth * VECTORS * 8) {
      const float* a = x + columns[n] * depth * T;
      for (int64_t k = 0; k < depth; k++) {
        __m256 row[VECTORS];
        for (int v = 0; v < VECTORS; v++) row[v] = _mm256_loadu_ps(w + (k * VECTORS + v) * 8);
        for (int t = 0; t < T; t++) {
          __m256 b = _mm256_broadcast_ss(a + k * T + t);
          for (int v = 0; v < VECTORS; v++) acc[t][v] = _mm256_fmadd_ps(b, row[v], acc[t][v]);
        }
      }
    }
    for (int t = 0; t < T; t++)
      for (int v = 0; v < VECTORS; v++) _mm256_storeu_ps(out + t * MAX_WIDTH + 8 * v, acc[t][v]);
  }
};

TARGET_AVX2 void store(const float* out, const float* bias, int tokens, int width, void* y, int64_t stride, int dtype) {
  for (int t = 0; t < tokens; t++) {
    int r = 0;
    for (; r + 8 <= width; r += 8) {
      __m256 sum = _mm256_add_ps(_mm256_loadu_ps(out + t * MAX_WIDTH + r), _mm256_loadu_ps(bias + r));
      if (dtype == F32) _mm256_storeu_ps((float*)y + t * stride + r, sum);
      else if (dtype == F16)
        _mm_storeu_si128((__m128i*)((uint16_t*)y + t * stride + r), _mm256_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT));
      else
        for (int i = 0; i < 8; i++) store_float(y, t * stride + r + i, out[t * MAX_WIDTH + r + i] + bias[r + i], dtype);
    }
    for (; r < width; r++) store_float(y, t * stride + r, out[t * MAX_WIDTH + r] + bias[r], dtype);
  }
}

// Four or eight numbers, the rest zero.
TARGET_AVX2 inline __m256 load_part(const void* p, int64_t i, int64_t left, int dtype) {
  if (left >= 8) return load8(p, i, dtype);
  __m128 four;
  if (dtype == F32) {
    four = _mm_loadu_ps((const float*)p + i);
  } else {
    __m128i h = _mm_loadl_epi64((const __m128i*)((const uint16_t*)p + i));
    four = dtype == F16 ? _mm_cvtph_ps(h) : _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(h), 16));
  }
  return _mm256_insertf128_ps(_mm256_setzero_ps(), four, 0);
}

template <int C>
struct BlockDots {
  TARGET_AVX2 static void run(const void* w, const float* x, const int32_t* columns, int64_t count, int64_t depth,
                              int64_t b_r, int64_t b_c, int64_t row_floats, int kind, float* out) {
    constexpr int ROWS = C > 2 ? 1 : DOT_ROWS;
    for (int first = 0; first < DOT_ROWS; first += ROWS) {
      __m256 acc[ROWS][C];
      for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < C; c++) acc[r][c] = _mm256_setzero_ps();
      for (int64_t n = 0; n < count; n++)
        for (int64_t k = 0; k < depth; k += 8) {
          __m256 row[ROWS];
          for (int r = 0; r < ROWS; r++) row[r] = load_part(w, (n * b_r + first + r) * b_c + k, depth - k, kind);
          for (int c = 0; c < C; c++) {
            __m256 a = load_part(x, c * row_floats + columns[n] * depth + k, depth - k, F32);
            for (int r = 0; r < ROWS; r++) acc[r][c] = _mm256_fmadd_ps(row[r], a, acc[r][c]);
          }
        }
      for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < C; c++) out[c * MAX_WIDTH + first + r] = sum(acc[r][c]);
    }
  }
};

}  // namespace avx2

// -------------------------------------------------------------------------------------------------------- AVX-512

namespace avx512 {
// 16 numbers from element k (PAIRS: 2 k) on, of which `left` elements exist.
TARGET_AVX512 inline __m512 load_numbers(const void* p, int64_t at, int64_t left, int kind) {
  if (kind == PAIRS) {
    __mmask32 m = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0;
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(m, (const uint16_t*)p + at));
  }
  return load16(p, at, kind, left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0);
}

TARGET_AVX512 void pack(const void* in, int64_t stride, int rows, int64_t size, int64_t depth, int kind, float* out,
                        int64_t out_stride) {
  int64_t elements = kind == PAIRS ? 2 : 1;
  for (int64_t k = 0; k < depth; k += 16) {
    __m512 r[16], t[16];
    for (int i = 0; i < 16; i++)
      r[i] = i < rows ? load_numbers(in, i * stride + k * elements, size - k * elements, kind) : _mm512_setzero_ps();
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
      for (int j = 0; j < 2; j++) {
        __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + 2 + j]);
        r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
        r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
      }
    for (int j = 0; j < 4; j++) {  // r[4 i + j]: columns j, 4 + j, 8 + j, 12 + j of rows 4 i to 4 i + 3
      __m512 a = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
      __m512 c = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88), d = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
      t[j] = _mm512_shuffle_f32x4(a, c, 0x88), t[8 + j] = _mm512_shuffle_f32x4(a, c, 0xdd);
      t[4 + j] = _mm512_shuffle_f32x4(b, d, 0x88), t[12 + j] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
    for (int j = 0; j < 16; j++)  // in ascending order: what one writes too much the next one overwrites
      if (k + j < depth) _mm512_storeu_ps(out + (k + j) * out_stride, t[j]);
  }
}

TARGET_AVX512 inline __m256i round_to_bf16(__m512 v) {
  __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

TARGET_AVX512 void store(const float* out, const float* bias, int tokens, int width, void* y, int64_t stride,
                         int dtype) {
  for (int r = 0; r < width; r += 16) {
    __mmask16 m = width - r >= 16 ? 0xffff : (1u << (width - r)) - 1;
    __m512 b = _mm512_loadu_ps(bias + r);
    for (int t = 0; t < tokens; t++) {
      __m512 sum = _mm512_add_ps(_mm512_loadu_ps(out + t * MAX_WIDTH + r), b);
      if (dtype == F32) _mm512_mask_storeu_ps((float*)y + t * stride + r, m, sum);
      else
        _mm256_mask_storeu_epi16((uint16_t*)y + t * stride + r, m,
                                 dtype == F16 ? _mm512_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT) : round_to_bf16(sum));
    }
  }
}

#define UNROLL _Pragma("GCC unroll 28")  // or the sums leave the registers
#define PRODUCT(NAME, TARGET, MULTIPLY_ADD)                                                                           \
  template <int T, int VECTORS>                                                                                       \
  struct NAME {                                                                                                       \
    TARGET static void run(const float* x, const float* w, const int32_t* columns, int64_t count, int64_t depth,      \
                           float* out) {                                                                              \
      __m512 acc[T][VECTORS];                                                                                         \
      UNROLL                                                                                                          \
      for (int t = 0; t < T; t++)                                                                                     \
        for (int v = 0; v < VECTORS; v++) acc[t][v] = _mm512_setzero_ps();                                            \
      for (int64_t n = 0; n < count; n++, w += depth * VECTORS * 16) {                                                \
        const float* a = x + columns[n] * depth * T;                                                                  \
        for (int64_t k = 0; k < depth; k++) {                                                                         \
          __m512 row[VECTORS];                                                                                        \
          for (int v = 0; v < VECTORS; v++) row[v] = _mm512_loadu_ps(w + (k * VECTORS + v) * 16);                     \
          UNROLL                                                                                                      \
          for (int t = 0; t < T; t++)                                                                                 \
            for (int v = 0; v < VECTORS; v++) MULTIPLY_ADD(acc[t][v], row[v], a[k * T + t]);                          \
        }                                                                                                             \
      }                                                                                                               \
      UNROLL                                                                                                          \
      for (int t = 0; t < T; t++)                                                                                     \
        for (int v = 0; v < VECTORS; v++) _mm512_storeu_ps(out + t * MAX_WIDTH + 16 * v, acc[t][v]);                  \
    }                                                                                                                 \
  };
#define ADD_PRODUCT(sum, w, number) sum = _mm512_fmadd_ps(w, _mm512_set1_ps(number), sum)
// The broadcast is part of the instruction, which the intrinsic cannot say: 3/4 of the speed without, for 16 outputs.
#define ADD_PRODUCT_OF_PAIRS(sum, w, number) \
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(number))
PRODUCT(Product, TARGET_AVX512, ADD_PRODUCT)
PRODUCT(ProductOfPairs, TARGET_BF16, ADD_PRODUCT_OF_PAIRS)

#define MULTIPLY_ADD_PAIRS(a, b, c) _mm512_dpbf16_ps(c, (__m512bh)(a), (__m512bh)(b))
// The weights that will be needed are those of the next block-row.
#define BLOCK_DOTS(NAME, TARGET, KIND, MULTIPLY_ADD)                                                                  \
  template <int C>                                                                                                    \
  struct NAME {                                                                                                       \
    TARGET static void run(const void* w, const float* x, const int32_t* columns, int64_t count, int64_t depth,       \
                           int64_t b_r, int64_t b_c, int64_t row_floats, int kind, float* out) {                      \
      constexpr int ROWS = C > 4 ? 2 : DOT_ROWS;                                                                      \
      int64_t elements = kind == PAIRS ? 2 : 1, item = kind == F32 ? 4 : 2, ahead = count * b_r * b_c * item;         \
      for (int first = 0; first < DOT_ROWS; first += ROWS) {                                                          \
        __m512 acc[ROWS][C];                                                                                          \
        for (int r = 0; r < ROWS; r++)                                                                                \
          for (int c = 0; c < C; c++) acc[r][c] = _mm512_setzero_ps();                                                \
        for (int64_t n = 0; n < count; n++)                                                                           \
          for (int64_t k = 0; k < depth; k += 16) {                                                                   \
            __m512 row[ROWS];                                                                                         \
            for (int r = 0; r < ROWS; r++) {                                                                          \
              int64_t at = (n * b_r + first + r) * b_c + k * elements;                                                \
              _mm_prefetch((const char*)w + at * item + ahead, _MM_HINT_T1);                                          \
              row[r] = load_numbers(w, at, b_c - k * elements, KIND);                                                 \
            }                                                                                                         \
            __mmask16 m = depth - k >= 16 ? 0xffff : (1u << (depth - k)) - 1;                                         \
            for (int c = 0; c < C; c++) {                                                                             \
              __m512 a = _mm512_maskz_loadu_ps(m, x + c * row_floats + columns[n] * depth + k);                       \
              for (int r = 0; r < ROWS; r++) acc[r][c] = MULTIPLY_ADD(row[r], a, acc[r][c]);                          \
            }                                                                                                         \
          }                                                                                                           \
        for (int r = 0; r < ROWS; r++)                                                                                \
          for (int c = 0; c < C; c++) out[c * MAX_WIDTH + first + r] = _mm512_reduce_add_ps(acc[r][c]);               \
      }                                                                                                               \
    }                                                                                                                 \
  };
BLOCK_DOTS(BlockDots, TARGET_AVX512, kind, _mm512_fmadd_ps)
BLOCK_DOTS(BlockDotsOfPairs, TARGET_BF16, PAIRS, MULTIPLY_ADD_PAIRS)
}  // namespace avx512
#endif

static const Micro& micro_for(int level, bool pairs) {
#ifdef X86
  static const Micro of_pairs =
      make_micro<28, 14, avx512::ProductOfPairs, avx512::BlockDotsOfPairs>(16, 32, avx512::pack, avx512::store);
  static const Micro of_avx512 =
      make_micro<28, 14, avx512::Product, avx512::BlockDots>(16, 32, avx512::pack, avx512::store);
  static const Micro of_avx2 = make_micro<12, 6, avx2::Product, avx2::BlockDots>(8, 16, portable::pack, avx2::store);
  if (level >= AVX512) return pairs ? of_pairs : of_avx512;
  if (level == AVX2) return of_avx2;
#endif
  static const Micro plain = make_micro<4, 0, portable::Product>(8, 8, portable::pack, portable::store);
  return plain;
}

// ---------------------------------------------------------------------------------------------------- the product

struct Weight {
  const void* blocks;
  const int32_t *crow, *col;
  int64_t d_out, d_in, b_r, b_c;
  int dtype;
  int64_t rows() const { return (d_out + b_r - 1) / b_r; }
  int64_t columns() const { return (d_in + b_c - 1) / b_c; }
  // Whether all that the kernels index with is in range, before they do: 4 bytes for each block of at least 16 numbers.
  bool valid(int64_t nnz) const {
    bool fits = crow[0] == 0 && crow[rows()] == nnz;
    for (int64_t p = 0; p < rows(); p++) fits &= crow[p] <= crow[p + 1];
    for (int64_t i = 0; i < nnz; i++) fits &= col[i] >= 0 && col[i] < columns();
    if (!fits) return false;
    for (int64_t p = 0; p < rows(); p++)
      for (int64_t i = crow[p] + 1; i < crow[p + 1]; i++) fits &= col[i - 1] < col[i];
    return fits;
  }
};

struct Plan {
  const Micro& micro;
  int kind;
  int64_t depth, block_floats, row_floats, tokens, tile_tokens, tiles, row_parts;
  bool skinny;
  Plan(const Weight& w, int64_t n, int level, int threads)
      : micro(micro_for(level, level == AVX512_BF16 && w.dtype == BF16)),
        kind(level == AVX512_BF16 && w.dtype == BF16 ? PAIRS : w.dtype) {
    depth = kind == PAIRS ? w.b_c / 2 : w.b_c;
    block_floats = depth * ((w.b_r + micro.lanes - 1) / micro.lanes * micro.lanes);
    row_floats = w.columns() * depth;
    int64_t wanted = std::min(TILE_FLOATS / row_floats, n / (4 * threads));
    tokens = w.b_r > micro.lanes && micro.wide_tokens ? micro.wide_tokens : micro.narrow_tokens;
    tile_tokens = std::max<int64_t>(1, wanted / tokens) * tokens;
    tiles = (n + tile_tokens - 1) / tile_tokens;
    row_parts = std::min(w.rows(), std::max<int64_t>(1, 4 * threads / tiles));
    skinny = n <= MAX_VECTORS && micro.dots[1];
  }
  // Where the weights of a block-row's rows from r on are: all kept columns of a micro-tile, then those of the next.
  int64_t panel(const Weight& w, int64_t p, int64_t r) const {
    return w.crow[p] * block_floats + (w.crow[p + 1] - w.crow[p]) * r * depth;
  }
  int64_t x_floats() const { return tile_tokens * row_floats + SLACK; }
  int64_t scratch(int64_t n, int64_t nnz, int threads) const {
    return skinny ? n * row_floats + SLACK : nnz * block_floats + SLACK + threads * x_floats();
  }
};

static void pack_block_row(const Weight& w, const Plan& plan, int64_t p, float* packed) {
  const Micro& micro = plan.micro;
  for (int64_t r = 0; r < w.b_r; r += micro.width) {
    int64_t left = std::min<int64_t>(micro.width, w.b_r - r);
    int64_t width = left > micro.lanes ? micro.width : micro.lanes;
    float* to = packed + plan.panel(w, p, r);
    for (int64_t i = w.crow[p]; i < w.crow[p + 1]; i++, to += plan.depth * width)
      for (int64_t lane = 0; lane < width; lane += micro.lanes)
        micro.pack((const uint8_t*)w.blocks + (i * w.b_r + r + lane) * w.b_c * item_size(w.dtype), w.b_c,
                   (int)std::min<int64_t>(micro.lanes, left - lane), w.b_c, plan.depth, plan.kind, to + lane, width);
  }
}

// The block-rows are laid out by whoever comes first: no thread waits for all, which on a busy machine takes longest.
enum State : char { AS_STORED, IN_WORK, PACKED };

static void wide_product(const Weight& w, const Plan& plan, const void* x, const void* bias, void* y, float* scratch,
                         int64_t n, int threads) {
  const Micro& micro = plan.micro;
  int64_t nnz = w.crow[w.rows()], item = item_size(w.dtype);
  float *packed_w = scratch, *packed_x = scratch + nnz * plan.block_floats + SLACK;
  std::vector<std::atomic<char>> states(w.rows());
  for (auto& state : states) state.store(AS_STORED, std::memory_order_relaxed);
#pragma omp parallel num_threads(threads)
  {
    float* tile = packed_x + omp_get_thread_num() * plan.x_floats();
    int64_t held = -1, first = 0, tokens = 0, parts = 0;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t task = 0; task < plan.tiles * plan.row_parts; task++) {
      int64_t part = task % plan.row_parts;
      if (held != task / plan.row_parts) {  // micro-tiles of equal size, or one token less
        held = task / plan.row_parts;
        first = held * plan.tile_tokens, tokens = std::min(plan.tile_tokens, n - first);
        parts = (tokens + plan.tokens - 1) / plan.tokens;
        for (int64_t m = 0; m < parts; m++) {
          int64_t from = tokens * m / parts, to = tokens * (m + 1) / parts;
          for (int64_t t = (to - from - 1) / 16 * 16; t >= 0; t -= 16)  // the last ones first: they write too much
            micro.pack((const uint8_t*)x + (first + from + t) * w.d_in * item, w.d_in,
                       (int)std::min<int64_t>(16, to - from - t), w.d_in, plan.row_floats, plan.kind,
                       tile + from * plan.row_floats + t, to - from);
        }
      }
      int64_t begin_row = w.rows() * part / plan.row_parts, rows = w.rows() * (part + 1) / plan.row_parts - begin_row;
      for (int64_t step = 0; step < rows; step++) {
        int64_t p = begin_row + (step + held * rows / plan.tiles) % rows;  // tiles begin apart
        char state = AS_STORED;
        if (states[p].compare_exchange_strong(state, IN_WORK)) {
          pack_block_row(w, plan, p, packed_w);
          states[p].store(PACKED, std::memory_order_release);
        }
        while (states[p].load(std::memory_order_acquire) != PACKED) std::this_thread::yield();
        int64_t begin = w.crow[p], height = std::min(w.b_r, w.d_out - p * w.b_r);
        for (int64_t r = 0; r < height; r += micro.width) {
          int width = (int)std::min<int64_t>(micro.width, height - r);
          bool wide = std::min<int64_t>(micro.width, w.b_r - r) > micro.lanes;
          int64_t output = p * w.b_r + r;
          float out[MAX_TOKENS * MAX_WIDTH], offset[MAX_WIDTH] = {};
          for (int j = 0; bias && j < width; j++) offset[j] = load_float(bias, output + j, w.dtype);
          for (int64_t m = 0; m < parts; m++) {
            int64_t from = tokens * m / parts, count = tokens * (m + 1) / parts - from;
            (wide ? micro.wide : micro.narrow)[count](tile + from * plan.row_floats, packed_w + plan.panel(w, p, r),
                                                      w.col + begin, w.crow[p + 1] - begin, plan.depth, out);
            micro.store(out, offset, (int)count, width, (uint8_t*)y + ((first + from) * w.d_out + output) * item,
                        w.d_out, w.dtype);
          }
        }
      }
    }
  }
}

static void skinny_product(const Weight& w, const Plan& plan, const void* x, const void* bias, void* y, float* scratch,
                           int64_t n, int threads) {
  int64_t item = item_size(w.dtype);
  for (int64_t t = 0; t < n; t++)  // a panel of one token is a vector
    plan.micro.pack((const uint8_t*)x + t * w.d_in * item, w.d_in, 1, w.d_in, plan.row_floats, plan.kind,
                    scratch + t * plan.row_floats, 1);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t p = 0; p < w.rows(); p++) {
    int64_t begin = w.crow[p], height = std::min(w.b_r, w.d_out - p * w.b_r);
    for (int64_t r = 0; r < height; r += DOT_ROWS) {
      float out[MAX_VECTORS * MAX_WIDTH];
      plan.micro.dots[n]((const uint8_t*)w.blocks + (begin * w.b_r + r) * w.b_c * item, scratch, w.col + begin,
                         w.crow[p + 1] - begin, plan.depth, w.b_r, w.b_c, plan.row_floats, plan.kind, out);
      for (int64_t j = 0; j < std::min<int64_t>(DOT_ROWS, height - r); j++) {
        int64_t output = p * w.b_r + r + j;
        float offset = bias ? load_float(bias, output, w.dtype) : 0;
        for (int64_t t = 0; t < n; t++)
          store_float(y, t * w.d_out + output, out[t * MAX_WIDTH + j] + offset, w.dtype);
      }
    }
  }
}

// Floats of scratch memory that the product needs.
EXPORT int64_t slimzoo_block_sparse_scratch(int64_t n, int64_t d_out, int64_t d_in, int64_t b_r, int64_t b_c,
                                                int64_t nnz, int dtype, int level, int threads) {
  Weight w{nullptr, nullptr, nullptr, d_out, d_in, b_r, b_c, dtype};
  return Plan(w, n, level, threads).scratch(n, nnz, threads);
}

// y (n, d_out) = x (n, d_in) W^T + bias, x, blocks, bias and y of one dtype. Not 0 when the indices are impossible.
EXPORT int slimzoo_block_sparse_linear(const void* x, const void* blocks, const int32_t* crow, const int32_t* col,
                                           const void* bias, void* y, float* scratch, int64_t n, int64_t d_out,
                                           int64_t d_in, int64_t b_r, int64_t b_c, int64_t nnz, int dtype, int level,
                                           int threads) {
  Weight w{blocks, crow, col, d_out, d_in, b_r, b_c, dtype};
  if (!w.valid(nnz)) return 1;
  Plan plan(w, n, level, threads);
  (plan.skinny ? skinny_product : wide_product)(w, plan, x, bias, y, scratch, n, threads);
  return 0;
}

// --------------------------------------------------------------------------------------------- the gradient by blocks

// The same micro-tiles, with tokens for inputs: grad (tokens, outputs) takes the place of x and x that of the weights.
// CHUNK tokens at a time are cut into panels, which for 768 inputs fit the second-level cache.
static const int64_t CHUNK = 128;

struct GradientPlan {
  const Micro& micro;
  int64_t x_width, x_floats, grad_floats;
  GradientPlan(const Weight& w, int level)
      : micro(micro_for(level, false)), x_width((w.b_c + micro.lanes - 1) / micro.lanes * micro.lanes),
        x_floats(w.columns() * x_width * CHUNK), grad_floats(w.rows() * w.b_r * CHUNK) {}
};

// out (CHUNK, width) = columns [from, from + width) of in (tokens, size), zero beyond.
static void copy_panel(const void* in, int64_t tokens, int64_t size, int64_t from, int64_t width, int dtype,
                       float* out) {
  int64_t there = std::max<int64_t>(0, std::min(width, size - from));
  for (int64_t k = 0; k < tokens; k++, out += width) {
    if (dtype == F32) std::memcpy(out, (const float*)in + k * size + from, there * 4);
    else if (dtype == BF16)
      for (int64_t j = 0; j < there; j++) out[j] = bf16_to_float(((const uint16_t*)in)[k * size + from + j]);
    else
      for (int64_t j = 0; j < there; j++) out[j] = half_to_float(((const uint16_t*)in)[k * size + from + j]);
    std::fill(out + there, out + width, 0.0f);
  }
}

EXPORT int64_t slimzoo_block_sparse_gradient_scratch(int64_t d_out, int64_t d_in, int64_t b_r, int64_t b_c,
                                                         int level) {
  GradientPlan plan({nullptr, nullptr, nullptr, d_out, d_in, b_r, b_c, F32}, level);
  return plan.x_floats + plan.grad_floats;
}

// out (nnz, b_r, b_c), zero at first, += grad[:, rows of a block]^T x[:, its columns]; grad (n, d_out), x (n, d_in).
EXPORT int slimzoo_block_sparse_gradient(const void* grad, const void* x, const int32_t* crow, const int32_t* col,
                                             float* out, float* scratch, int64_t n, int64_t d_out, int64_t d_in,
                                             int64_t b_r, int64_t b_c, int64_t nnz, int dtype, int level, int threads) {
  Weight w{nullptr, crow, col, d_out, d_in, b_r, b_c, dtype};
  if (!w.valid(nnz)) return 1;
  GradientPlan plan(w, level);
  const Micro& micro = plan.micro;
  int64_t most = b_c > micro.lanes && micro.wide_tokens ? micro.wide_tokens : micro.narrow_tokens;
  int64_t parts = (b_r + most - 1) / most, item = item_size(dtype);
  float *x_panels = scratch, *grad_panels = scratch + plan.x_floats;
#pragma omp parallel num_threads(threads)
  for (int64_t first = 0; first < n; first += CHUNK) {
    int64_t tokens = std::min(CHUNK, n - first);
#pragma omp for schedule(static) nowait
    for (int64_t q = 0; q < w.columns(); q++)
      for (int64_t c = 0; c < b_c; c += micro.width) {
        int64_t left = std::min<int64_t>(micro.width, b_c - c), width = left > micro.lanes ? micro.width : micro.lanes;
        copy_panel((const uint8_t*)x + first * d_in * item, tokens, d_in, q * b_c + c, width, dtype,
                   x_panels + (q * plan.x_width + c) * CHUNK);
      }
#pragma omp for schedule(static)
    for (int64_t p = 0; p < w.rows(); p++)
      for (int64_t m = 0; m < parts; m++) {
        int64_t from = b_r * m / parts, to = b_r * (m + 1) / parts;
        copy_panel((const uint8_t*)grad + first * d_out * item, tokens, d_out, p * b_r + from, to - from, dtype,
                   grad_panels + (p * b_r + from) * CHUNK);
      }
#pragma omp for schedule(dynamic, 1)
    for (int64_t p = 0; p < w.rows(); p++)
      for (int64_t i = crow[p]; i < crow[p + 1]; i++)
        for (int64_t m = 0; m < parts; m++) {
          int64_t from = b_r * m / parts, rows = b_r * (m + 1) / parts - from;
          for (int64_t c = 0; c < b_c; c += micro.width) {
            int64_t left = std::min<int64_t>(micro.width, b_c - c);
            const float *grads = grad_panels + (p * b_r + from) * CHUNK;
            const float *xs = x_panels + (col[i] * plan.x_width + c) * CHUNK;
            const int32_t only = 0;
            float sums[MAX_TOKENS * MAX_WIDTH];
            (left > micro.lanes ? micro.wide : micro.narrow)[rows](grads, xs, &only, 1, tokens, sums);
            for (int64_t t = 0; t < rows; t++) {
              float* to = out + (i * b_r + from + t) * b_c + c;
              for (int64_t r = 0; r < left; r++) to[r] += sums[t * MAX_WIDTH + r];
            }
          }
        }
  }
  return 0;
}
