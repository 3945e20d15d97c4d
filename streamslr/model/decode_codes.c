/* Decode weights [o, d] from codes of 8 or 4 bits: (number - zero) · scale · unit in float32, rounded to 16 bits;
   decode_codes.py calls this through ctypes, and dequantize.py says what the layouts are.

   16 neighbouring codes share few results, so most kinds are looked up, 32 codes at a time, in a table of 16 numbers for
   each scale: codes of 4 bits have no more, and those of FP8 with one scale differ in their exponents alone, which are
   added. Where that does not hold, 16 codes at a time are computed. */

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define INLINE inline __attribute__((always_inline))

/* Found in the OpenMP library that torch has loaded; null where that has another interface, and one thread works. */
extern void GOMP_parallel(void (*work)(void *), void *job, unsigned threads, unsigned flags) __attribute__((weak));

enum { UINT4, FP4, TABLE, UINT8, INT8, FP8 }; /* kinds of codes */
enum { ROWS, COLUMNS, AWQ, UPPER_FIRST };     /* layouts */
enum { FLOAT32, BFLOAT16, FLOAT16 };          /* dtypes */
enum { BLOCK = 128, SLOTS = 256 };            /* rows and columns of codes unpacked together; tables kept */
enum { HUGE_PAGE = 1 << 21 };

struct coded { /* the fields of _Coded in decode_codes.py */
    const uint8_t *codes;
    const void *scales;   /* float32 [.., groups], of FP4 uint8 */
    const float *zeros;   /* the same shape; null where all are 0 */
    const int32_t *order; /* [d], the group of each column; null where `group` columns after another have one */
    const float *table;   /* numbers of codes 0 to 15 of TABLE; else null */
    uint16_t *weight;     /* [o, d], or [d, o] where it is transposed, which codes of FP4 in rows can be alone */
    int64_t o, d, groups, rows, group; /* rows, group: of the weight that have one scale */
    int32_t kind, layout, via, dtype, transposed;
    float unit; /* 1, but for INT8 */
};

/* bfloat16 of the codes of FP4: the lower bytes, the upper ones, and -1 where it is not 0. */
static const uint8_t NUMBERS[48] = {
    0, 0,    0x80, 0xC0, 0,    0x40, 0x80, 0xC0, 0,    0,    0x80, 0xC0, 0,    0x40, 0x80, 0xC0,
    0, 0x3F, 0x3F, 0x3F, 0x40, 0x40, 0x40, 0x40, 0x80, 0xBF, 0xBF, 0xBF, 0xC0, 0xC0, 0xC0, 0xC0,
    0, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0,    0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF,
};

struct table { /* results for codes 0 to 15 */
    int64_t scale; /* that it is for; -1 for none */
    uint8_t bytes[32]; /* 16 lower ones, 16 upper ones */
    int valid; /* 0 where FP8 has to be computed */
};

struct job {
    const struct coded *coded;
    int64_t next, step, end; /* rows, or columns where the weight is transposed */
};

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Return 1 where numbers are rounded to bfloat16, and to nothing else before. */
static int rounds_once(const struct coded *c) { return c->dtype == BFLOAT16 && c->via != FLOAT16; }

/* Return 1 where codes are stored row by row. */
static int in_rows(const struct coded *c) { return c->layout == ROWS || c->layout == UPPER_FIRST; }

static int bits_of(int kind) { return kind <= TABLE ? 4 : 8; }

/* Return the numbers of 8 codes, a byte each. */
AVX2 static INLINE __m256 widen(const uint8_t *codes, int kind) {
    const __m128i eight = _mm_loadl_epi64((const __m128i *)codes);
    if (kind == INT8) return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
    if (kind == UINT4 || kind == UINT8) return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight));
    if (kind == FP4) { /* as float16 of the same exponent and mantissa, 2^14 too small */
        const __m128i wide = _mm_cvtepu8_epi16(eight), sign = _mm_slli_epi16(_mm_srli_epi16(wide, 3), 15);
        const __m128i half = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(7)), 9);
        return _mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(half, sign)), _mm256_set1_ps(16384.f));
    }
    __m128i half = _mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(eight), 7), _mm_set1_epi16((short)0xBFFF));
    const __m128i nan = _mm_and_si128(_mm_add_epi16(half, _mm_set1_epi16(0x80)), _mm_set1_epi16(0x4000));
    return _mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(half, nan)), _mm256_set1_ps(256.f)); /* 127 is NaN in both */
}

/* Round to bfloat16, to nearest even, in the upper halves. No NaN that comes here has its lower bits set. */
AVX2 static INLINE __m256i to_bfloat16(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
}

AVX2 static INLINE __m256 round_via(__m256 x, int via) {
    if (via == FLOAT16) return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    if (via == BFLOAT16)
        return _mm256_castsi256_ps(_mm256_and_si256(to_bfloat16(x), _mm256_set1_epi32((int)0xFFFF0000)));
    return x;
}

/* Return 16 numbers rounded to a dtype. */
AVX2 static INLINE __m256i round16(__m256 a, __m256 b, int via, int dtype) {
    a = round_via(a, via);
    b = round_via(b, via);
    if (dtype == FLOAT16)
        return _mm256_set_m128i(_mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT),
                                _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    const __m256i low = _mm256_srli_epi32(to_bfloat16(a), 16), high = _mm256_srli_epi32(to_bfloat16(b), 16);
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xD8);
}

/* Return the numbers of 16 codes that have one scale. */
AVX2 static INLINE __m256i compute16(const uint8_t *codes, __m256 scale, __m256 zero, __m256 unit, int kind,
                                      int via, int dtype) {
    const __m256 a = _mm256_mul_ps(_mm256_sub_ps(widen(codes, kind), zero), scale);
    const __m256 b = _mm256_mul_ps(_mm256_sub_ps(widen(codes + 8, kind), zero), scale);
    return round16(_mm256_mul_ps(a, unit), _mm256_mul_ps(b, unit), via, dtype);
}

/* Compute n numbers, a multiple of 16, that have one scale. */
AVX2 static void compute(const struct coded *c, const uint8_t *codes, int64_t n, float scale, float zero,
                         uint16_t *out) {
    const __m256 s = _mm256_set1_ps(scale), z = _mm256_set1_ps(zero), u = _mm256_set1_ps(c->unit);
    const int kind = c->kind, via = c->via, dtype = c->dtype;
    int64_t i = 0;
    if (rounds_once(c) && kind == INT8) /* constants make it faster */
        for (; i < n; i += 16)
            _mm256_storeu_si256((__m256i *)(out + i), compute16(codes + i, s, z, u, INT8, FLOAT32, BFLOAT16));
    for (; i < n; i += 16) _mm256_storeu_si256((__m256i *)(out + i), compute16(codes + i, s, z, u, kind, via, dtype));
}

/* Compute n numbers, a multiple of 16, each with the scale and zero point that its column has. */
AVX2 static void compute_in_order(const struct coded *c, const uint8_t *codes, const int32_t *order, int64_t n,
                                  int64_t row, uint16_t *out) {
    const int64_t first = row / c->rows * c->groups;
    const float *scales = (const float *)c->scales + first;
    for (int64_t i = 0; i < n; i += 16) {
        __m256 x[2];
        for (int k = 0; k < 2; k++) {
            const __m256i groups = _mm256_loadu_si256((const __m256i *)(order + i + 8 * k));
            __m256 scale = _mm256_i32gather_ps(scales, groups, 4);
            scale = _mm256_blendv_ps(scale, _mm256_set1_ps(NAN), _mm256_cmp_ps(scale, scale, _CMP_UNORD_Q));
            x[k] = widen(codes + i + 8 * k, c->kind);
            if (c->zeros) x[k] = _mm256_sub_ps(x[k], _mm256_i32gather_ps(c->zeros + first, groups, 4));
            x[k] = _mm256_mul_ps(_mm256_mul_ps(x[k], scale), _mm256_set1_ps(c->unit));
        }
        _mm256_storeu_si256((__m256i *)(out + i), round16(x[0], x[1], c->via, c->dtype));
    }
}

AVX2 static INLINE void fill_table(const struct coded *c, float scale, float zero, struct table *table) {
    static const uint8_t codes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const __m256i exponents = _mm256_set_m128i(_mm_set1_epi16(0x80), _mm_setzero_si128()); /* of codes 8 to 15 */
    const __m256 s = _mm256_set1_ps(scale), z = _mm256_set1_ps(zero), one = _mm256_set1_ps(1);
    __m256i bits = c->kind == TABLE ? round16(_mm256_mul_ps(_mm256_loadu_ps(c->table), s),
                                              _mm256_mul_ps(_mm256_loadu_ps(c->table + 8), s), c->via, c->dtype)
                                    : compute16(codes, s, z, one, c->kind, c->via, c->dtype);
    if (c->kind == FP8) bits = _mm256_sub_epi16(bits, exponents);
    const __m256i low = _mm256_and_si256(bits, _mm256_set1_epi16(255)), high = _mm256_srli_epi16(bits, 8);
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xD8);
    _mm256_storeu_si256((__m256i *)table->bytes, bytes);
    /* Then every result is a normal number of bfloat16, and a code's exponent goes into the result as it is. */
    table->valid = c->kind != FP8 || (rounds_once(c) && zero == 0 &&
                                      fabsf(scale) > 0x1p-90f && fabsf(scale) < 0x1p90f);
}

/* Look up 32 codes, a byte each. */
AVX2 static INLINE void look_up(const uint8_t *codes, __m256i low, __m256i high, uint16_t *out) {
    const __m256i c = _mm256_permute4x64_epi64(_mm256_loadu_si256((const __m256i *)codes), 0xD8);
    const __m256i l = _mm256_shuffle_epi8(low, c), h = _mm256_shuffle_epi8(high, c);
    _mm256_storeu_si256((__m256i *)out, _mm256_unpacklo_epi8(l, h));
    _mm256_storeu_si256((__m256i *)(out + 16), _mm256_unpackhi_epi8(l, h));
}

/* The same for FP8: by mantissa, and 8 where the exponent is not 0; then add the exponent and the sign. Return 32 bytes
   that are -1 for NaN. */
AVX2 static INLINE __m256i look_up_fp8(const uint8_t *codes, __m256i low, __m256i high, uint16_t *out) {
    const __m256i c = _mm256_permute4x64_epi64(_mm256_loadu_si256((const __m256i *)codes), 0xD8);
    const __m256i magnitude = _mm256_and_si256(c, _mm256_set1_epi8(127)), eight = _mm256_set1_epi8(8);
    const __m256i normal = _mm256_or_si256(_mm256_and_si256(c, _mm256_set1_epi8(7)), eight);
    const __m256i index = _mm256_blendv_epi8(normal, magnitude, _mm256_cmpgt_epi8(eight, magnitude));
    const __m256i l = _mm256_shuffle_epi8(low, index), h = _mm256_shuffle_epi8(high, index);
    const __m256i sign = _mm256_set1_epi16((short)0x8000), exponent = _mm256_set1_epi16(0x0780);
    for (int k = 0; k < 2; k++) {
        const __m256i zero = _mm256_setzero_si256();
        const __m256i upper = k ? _mm256_unpackhi_epi8(zero, c) : _mm256_unpacklo_epi8(zero, c);
        const __m256i bits = k ? _mm256_unpackhi_epi8(l, h) : _mm256_unpacklo_epi8(l, h);
        const __m256i more = _mm256_add_epi16(bits, _mm256_and_si256(_mm256_srli_epi16(upper, 4), exponent));
        _mm256_storeu_si256((__m256i *)(out + 16 * k), _mm256_xor_si256(more, _mm256_and_si256(upper, sign)));
    }
    return _mm256_cmpeq_epi8(magnitude, _mm256_set1_epi8(127));
}

AVX2 static INLINE __m256i both_lanes(const uint8_t *bytes) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)bytes));
}

/* Write n numbers, a multiple of 32, that have one scale. */
AVX2 static void decode_codes(const struct coded *c, const struct table *table, const uint8_t *codes, int64_t n,
                              float scale, float zero, uint16_t *out) {
    if (table && table->valid) {
        const __m256i low = both_lanes(table->bytes), high = both_lanes(table->bytes + 16);
        if (c->kind != FP8) {
            for (int64_t i = 0; i < n; i += 32) look_up(codes + i, low, high, out + i);
            return;
        }
        __m256i nan = _mm256_setzero_si256();
        for (int64_t i = 0; i < n; i += 32) nan = _mm256_or_si256(nan, look_up_fp8(codes + i, low, high, out + i));
        if (_mm256_testz_si256(nan, nan)) return;
    }
    compute(c, codes, n, scale, zero, out);
}

/* Return the scale of an index; NaN without lower bits, which rounding would carry away. */
static float scale_at(const struct coded *c, int64_t index) {
    if (c->kind != FP4) {
        const float scale = ((const float *)c->scales)[index];
        return scale == scale ? scale : NAN;
    }
    const uint8_t exponent = ((const uint8_t *)c->scales)[index];
    const uint32_t bits = exponent ? (uint32_t)exponent << 23 : 1u << 22;
    float scale;
    memcpy(&scale, &bits, 4);
    return scale;
}

/* Return the table of a scale, filled if it is not the one that was kept. */
AVX2 static const struct table *table_of(const struct coded *c, struct table *tables, int64_t index) {
    if (c->kind == UINT8 || c->kind == INT8) return 0;
    const int64_t key = c->kind == FP4 ? ((const uint8_t *)c->scales)[index] : index;
    struct table *table = tables + key % SLOTS;
    if (table->scale != key) {
        fill_table(c, scale_at(c, index), c->zeros ? c->zeros[index] : 0, table);
        table->scale = key;
    }
    return table;
}

/* Write n columns of a row from `column` on, which is in `group`; codes are a byte each. */
static void decode_row(const struct coded *c, struct table *tables, int64_t row, int64_t column, int64_t group,
                       int64_t n, const uint8_t *codes, uint16_t *out) {
    uint8_t few[32] = {0};
    uint16_t numbers[32];
    if (c->order) {
        int32_t order[16] = {0};
        const int64_t whole = n / 16 * 16, rest = n - whole;
        compute_in_order(c, codes, c->order + column, whole, row, out);
        memcpy(few, codes + whole, rest);
        memcpy(order, c->order + column + whole, rest * sizeof(int32_t));
        compute_in_order(c, few, order, 16, row, numbers);
        memcpy(out + whole, numbers, rest * sizeof(uint16_t));
        return;
    }
    int64_t index = (c->rows == 1 ? row : row / c->rows) * c->groups + group;
    for (int64_t i = 0, next; i < n; i = next, group++, index++) {
        next = least((group + 1) * c->group - column, n);
        const int64_t whole = (next - i) / 32 * 32, rest = next - i - whole;
        const struct table *table = table_of(c, tables, index);
        const float scale = scale_at(c, index), zero = c->zeros ? c->zeros[index] : 0;
        decode_codes(c, table, codes + i, whole, scale, zero, out + i);
        if (rest) {
            memcpy(few, codes + i + whole, rest);
            decode_codes(c, table, few, 32, scale, zero, numbers);
            memcpy(out + i + whole, numbers, rest * sizeof(uint16_t));
        }
    }
}

/* Spread the halves of 16 bytes over 32, the lower or the upper ones first. */
AVX2 static INLINE void spread_halves(__m128i bytes, int upper_first, uint8_t *out) {
    const __m128i mask = _mm_set1_epi8(15);
    const __m128i low = _mm_and_si128(bytes, mask), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
    const __m128i first = upper_first ? high : low, second = upper_first ? low : high;
    _mm_storeu_si128((__m128i *)out, _mm_unpacklo_epi8(first, second));
    _mm_storeu_si128((__m128i *)(out + 16), _mm_unpackhi_epi8(first, second));
}

/* Transpose 16 x 16 bytes in each lane: each step moves the upper bit of the row behind the bits of the column. */
AVX2 static INLINE void transpose(__m256i m[16]) {
    for (int step = 0; step < 4; step++) {
        __m256i t[16];
        for (int i = 0; i < 8; i++) {
            t[2 * i] = _mm256_unpacklo_epi8(m[i], m[i + 8]);
            t[2 * i + 1] = _mm256_unpackhi_epi8(m[i], m[i + 8]);
        }
        for (int i = 0; i < 16; i++) m[i] = t[i];
    }
}

AVX2 static INLINE __m256i two_lanes(const uint8_t *low, const uint8_t *high) {
    const __m256i first = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)low));
    return _mm256_inserti128_si256(first, _mm_loadu_si128((const __m128i *)high), 1);
}

/* Unpack at most BLOCK codes of a row from an even column on. */
AVX2 static void unpack_halves(const struct coded *c, int64_t row, int64_t column, int64_t n, uint8_t *out) {
    const uint8_t *in = c->codes + (row * c->d + column) / 2;
    const int upper_first = c->layout == UPPER_FIRST;
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) spread_halves(_mm_loadu_si128((const __m128i *)(in + i / 2)), upper_first, out + i);
    for (; i < n; i += 2) {
        out[i + upper_first] = in[i / 2] & 15;
        out[i + !upper_first] = in[i / 2] >> 4;
    }
}

/* Return the place, from the lowest, of row r of 8 in a word of AWQ. */
static int place_in_word(int64_t r) { return (int)((r & 1) * 4 + (r >> 1)); }

static uint8_t code_at(const struct coded *c, int64_t row, int64_t column) {
    const int bits = bits_of(c->kind), in_word = 32 / bits;
    uint32_t word;
    if (c->layout == AWQ) {
        memcpy(&word, c->codes + (column * (c->o / 8) + row / 8) * 4, 4);
        return word >> 4 * place_in_word(row % 8) & 15;
    }
    memcpy(&word, c->codes + (column / in_word * c->o + row) * 4, 4);
    return word >> bits * (column % in_word) & (bits == 4 ? 15 : 255);
}

/* Unpack 4 rows of 4 words, of codes that lie along columns. */
AVX2 static INLINE void unpack_along_columns(const uint8_t *in, int64_t pitch, int bits, uint8_t out[][BLOCK]) {
    __m128i w[4];
    for (int k = 0; k < 4; k++) w[k] = _mm_loadu_si128((const __m128i *)(in + k * pitch));
    const __m128i a = _mm_unpacklo_epi32(w[0], w[1]), b = _mm_unpacklo_epi32(w[2], w[3]);
    const __m128i e = _mm_unpackhi_epi32(w[0], w[1]), f = _mm_unpackhi_epi32(w[2], w[3]);
    const __m128i rows[4] = {_mm_unpacklo_epi64(a, b), _mm_unpackhi_epi64(a, b), _mm_unpacklo_epi64(e, f),
                             _mm_unpackhi_epi64(e, f)};
    for (int k = 0; k < 4; k++) {
        if (bits == 4)
            spread_halves(rows[k], 0, out[k]);
        else
            _mm_storeu_si128((__m128i *)out[k], rows[k]);
    }
}

/* Unpack 32 rows of 32 columns of AWQ. */
AVX2 static void unpack_awq(const uint8_t *in, int64_t pitch, uint8_t out[][BLOCK]) {
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i m[16];
    for (int i = 0; i < 16; i++) m[i] = two_lanes(in + i * pitch, in + (i + 16) * pitch);
    transpose(m);
    for (int i = 0; i < 16; i++) { /* lower halves of byte b of a word: row 0, 4, 1, 5 of 8; upper halves: 2 more */
        const int row = i / 4 * 8 + (i & 1) * 4 + (i >> 1 & 1);
        _mm256_storeu_si256((__m256i *)out[row], _mm256_and_si256(m[i], mask));
        _mm256_storeu_si256((__m256i *)out[row + 2], _mm256_and_si256(_mm256_srli_epi16(m[i], 4), mask));
    }
}

/* Unpack at most BLOCK rows and columns, of codes that lie in words along columns. */
AVX2 static void unpack_block(const struct coded *c, int64_t row, int64_t column, int64_t rows, int64_t columns,
                              uint8_t codes[][BLOCK]) {
    const int bits = bits_of(c->kind), at_once = c->layout == AWQ ? 32 : 4, wide = c->layout == AWQ ? 32 : 128 / bits;
    const int64_t pitch = c->layout == AWQ ? c->o / 2 : c->o * 4;
    const int64_t whole_rows = rows / at_once * at_once, whole_columns = columns / wide * wide;
    for (int64_t j = 0; j < whole_columns; j += wide) {
        for (int64_t i = 0; i < whole_rows; i += at_once) {
            uint8_t(*out)[BLOCK] = (uint8_t(*)[BLOCK])(codes[i] + j);
            if (c->layout == AWQ)
                unpack_awq(c->codes + (column + j) * pitch + (row + i) / 2, pitch, out);
            else
                unpack_along_columns(c->codes + (column + j) * bits / 32 * pitch + (row + i) * 4, pitch, bits, out);
        }
    }
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; j++)
            codes[i][j] = code_at(c, row + i, column + j);
}

static void decode_rows(const struct coded *c, struct table *tables, int64_t start, int64_t stop) {
    uint8_t codes[BLOCK][BLOCK];
    if (in_rows(c)) {
        for (int64_t row = start; row < stop; row++) {
            uint16_t *out = c->weight + row * c->d;
            if (bits_of(c->kind) == 8) {
                decode_row(c, tables, row, 0, 0, c->d, c->codes + row * c->d, out);
                continue;
            }
            for (int64_t column = 0; column < c->d; column += sizeof codes) {
                const int64_t n = least(sizeof codes, c->d - column);
                unpack_halves(c, row, column, n, codes[0]);
                decode_row(c, tables, row, column, column / c->group, n, codes[0], out + column);
            }
        }
        return;
    }
    for (int64_t column = 0; column < c->d; column += BLOCK) {
        const int64_t n = least(BLOCK, c->d - column), group = column / c->group;
        unpack_block(c, start, column, stop - start, n, codes);
        for (int64_t row = start; row < stop; row++) {
            /* Each row is in another page, where the processor does not see by itself what comes next. */
            for (int k = 0; k < BLOCK; k += 32) __builtin_prefetch(c->weight + (row + 8) * c->d + column + k, 1);
            decode_row(c, tables, row, column, group, n, codes[row - start], c->weight + row * c->d + column);
        }
    }
}

/* Write 32 columns of 32 rows of FP4 to bfloat16, transposed, a whole line of the cache at a time: numbers of scale 1, to
   whose exponents those of the scales are added. Return 0 where a result may have no such exponent. */
AVX2 static int decode_transposed(const struct coded *c, int64_t row, int64_t column) {
    const uint8_t *in = c->codes + (row * c->d + column) / 2, *scales = (const uint8_t *)c->scales + column / 32;
    const int64_t pitch = c->d / 2;
    uint8_t bytes[32];
    for (int i = 0; i < 32; i++) bytes[i] = scales[(row + i) * c->groups];
    const __m256i exponents = _mm256_sub_epi8(_mm256_loadu_si256((const __m256i *)bytes), _mm256_set1_epi8(127));
    const __m256i size = _mm256_abs_epi8(exponents), fits = _mm256_min_epu8(size, _mm256_set1_epi8(124));
    if (_mm256_movemask_epi8(_mm256_cmpeq_epi8(size, fits)) != -1) return 0;
    /* In the order that unpacking the bytes of 32 numbers gives: 0 to 7 and 16 to 23, then the others. */
    const __m256i zero = _mm256_setzero_si256();
    const __m256i first_exponents = _mm256_srai_epi16(_mm256_unpacklo_epi8(zero, exponents), 1);
    const __m256i second_exponents = _mm256_srai_epi16(_mm256_unpackhi_epi8(zero, exponents), 1);
    const __m256i low = both_lanes(NUMBERS), high = both_lanes(NUMBERS + 16), some = both_lanes(NUMBERS + 32);
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i m[16];
    for (int i = 0; i < 16; i++) m[i] = two_lanes(in + i * pitch, in + (i + 16) * pitch);
    transpose(m);
    uint16_t *out = c->weight + column * c->o + row;
    for (int i = 0; i < 32; i++, out += c->o) {
        const __m256i codes = _mm256_and_si256(i % 2 ? _mm256_srli_epi16(m[i / 2], 4) : m[i / 2], mask);
        const __m256i l = _mm256_shuffle_epi8(low, codes), h = _mm256_shuffle_epi8(high, codes);
        const __m256i not_zero = _mm256_shuffle_epi8(some, codes);
        const __m256i first = _mm256_add_epi16(
            _mm256_unpacklo_epi8(l, h), _mm256_and_si256(_mm256_unpacklo_epi8(not_zero, not_zero), first_exponents));
        const __m256i second = _mm256_add_epi16(
            _mm256_unpackhi_epi8(l, h), _mm256_and_si256(_mm256_unpackhi_epi8(not_zero, not_zero), second_exponents));
        _mm256_storeu_si256((__m256i *)out, _mm256_permute2x128_si256(first, second, 0x20));
        _mm256_storeu_si256((__m256i *)(out + 16), _mm256_permute2x128_si256(first, second, 0x31));
    }
    return 1;
}

static void decode_columns(const struct coded *c, struct table *tables, int64_t start, int64_t stop) {
    const int64_t o = c->o, d = c->d;
    uint8_t codes[32];
    uint16_t numbers[32];
    for (int64_t row = 0; row < o; row += 32) {
        for (int64_t i = row + 32; i < row + 64; i++) __builtin_prefetch(c->codes + (i * d + start) / 2);
        for (int64_t column = start; column < stop; column += 32) {
            if (rounds_once(c) && row + 32 <= o && decode_transposed(c, row, column)) continue;
            for (int64_t i = row; i < least(row + 32, o); i++) {
                unpack_halves(c, i, column, 32, codes);
                decode_row(c, tables, i, column, column / 32, 32, codes, numbers);
                for (int64_t j = 0; j < 32; j++) c->weight[(column + j) * o + i] = numbers[j];
            }
        }
    }
}

static void work(void *argument) {
    struct job *job = argument;
    const struct coded *c = job->coded;
    struct table tables[SLOTS];
    for (int i = 0; i < SLOTS; i++) tables[i].scale = -1;
    for (;;) {
        const int64_t start = __atomic_fetch_add(&job->next, job->step, __ATOMIC_RELAXED);
        if (start >= job->end) return;
        const int64_t stop = least(start + job->step, job->end);
        if (c->transposed)
            decode_columns(c, tables, start, stop);
        else
            decode_rows(c, tables, start, stop);
    }
}

/* Ask for large pages: memory that is written for the first time then costs few faults, which take longer than all else.
   Where the system has none, nothing changes. */
static void ask_for_huge_pages(const struct coded *c) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t first = ((uintptr_t)c->weight + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    const uintptr_t end = (uintptr_t)(c->weight + c->o * c->d) / HUGE_PAGE * HUGE_PAGE;
    if (end > first) madvise((void *)first, end - first, MADV_HUGEPAGE);
#endif
}

/* Return the bytes of the struct that the function below reads, so that a library of another build is found out. */
int streamslr_size_of_coded(void) { return sizeof(struct coded); }

/* Return 1 where this CPU can run the function below. */
int streamslr_decodes_here(void) {
    /* Every CPU with AVX2 has F16C, which compilers before GCC 11 cannot be asked for. */
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

/* Write all of a weight. */
void streamslr_decode(const struct coded *coded, int threads) {
    struct job job = {.coded = coded, .step = BLOCK, .end = coded->o};
    if (coded->transposed)
        job.end = coded->d;
    else if (in_rows(coded))
        job.step = 1 + (1 << 16) / coded->d; /* microseconds of work */
    ask_for_huge_pages(coded);
    if (GOMP_parallel && threads > 1 && job.step < job.end)
        GOMP_parallel(work, &job, threads, 0);
    else
        work(&job);
}

#else

int streamslr_size_of_coded(void) { return 0; }

int streamslr_decodes_here(void) { return 0; }

#endif
