/* Unpack rows of packed S, or multiply by them without keeping them; packed_rows.py calls this through ctypes.

   Whatever meta and row_offsets say, nothing past the ends of the given arrays is read or written, and values that are
   missing count as 0. io/packed_layout.py has the layout of values, meta and scales.

   Codes take a byte each from expand() on. A code times the unit of its kind is its number, exactly: of INT4 the code is
   sixteenfold, since its 4 bits are the upper ones of the byte; of FLOAT8 the byte is read as a float of 16 bits. */

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define AVX2 __attribute__((target("avx2,fma,f16c,popcnt")))
#define INLINE inline __attribute__((always_inline))

/* Found in the OpenMP library that torch has loaded; null where that has another interface, and one thread works. */
extern void GOMP_parallel(void (*work)(void *), void *job, unsigned threads, unsigned flags) __attribute__((weak));

enum { FLOAT32, BFLOAT16, FLOAT16, INT8, INT4, FLOAT8 };
enum { MOST_TOKENS = 4, MOST_COLUMNS = 256, BLOCK = 2048, PAD = 32, LANES = 4, LANE = 16 };

struct packed { /* the fields of _Packed in packed_rows.py */
    const char *values;         /* of all rows, one after another */
    const uint8_t *meta;        /* [rows, width]; null where every column has a value, as if a byte described each */
    const int64_t *row_offsets; /* [rows + 1], where each row's values begin; null: per_row values in each */
    const char *scales;         /* [rows, groups], a scale for `group` columns; null where values are no codes */
    const int16_t *sources;     /* [256, columns]: which of the byte's values goes to a column; -1 for none */
    const uint8_t *shuffles;    /* [256, LANES, LANE]: the same in bytes, for pshufb; null where they do not fit */
    int64_t num_values, per_row, rows, width, d, groups, group; /* values: codes, with the zero behind an odd number */
    int32_t columns;      /* that a byte of meta describes */
    int32_t step;         /* values of a byte; 0 for a bitmask, which has as many as bits */
    int32_t kind;         /* of the values */
    int32_t scale_kind;   /* of the scales */
    int32_t first[LANES]; /* value from which on the sources of a lane are counted, where step is not 0 */
};

struct job {
    const struct packed *packed;
    void (*do_row)(const struct job *, int64_t row);
    char *S;        /* [rows, d], to unpack; float32 where values are codes */
    const float *x; /* [tokens, stride], zeros from column d to the next multiple of PAD, to multiply */
    float *y;       /* [tokens, rows] */
    int64_t tokens, stride, next, step;
};

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Write 16 bytes of a row: the values from v on, each where `shuffle` places it. */
AVX2 static INLINE void expand_lane(char *out, const char *v, const uint8_t *shuffle) {
    __m128i values = _mm_loadu_si128((const __m128i *)v);
    _mm_storeu_si128((__m128i *)out, _mm_shuffle_epi8(values, _mm_loadu_si128((const __m128i *)shuffle)));
}

/* Expand bytes by shuffles while 32 values can be read; return how many. Each byte fills whole lanes, and the next byte
   writes again what is past its columns. */
AVX2 static INLINE int64_t shuffle_bytes(const struct packed *p, const uint8_t *meta, int64_t bytes,
                                         const char **values, const char *end, char *out, int size, int lanes) {
    const uint8_t *shuffles = p->shuffles;
    const char *v = *values;
    const int64_t step = p->step * size, columns = p->columns * size;
    int64_t first[LANES], i = 0;
    for (int k = 0; k < LANES; k++) first[k] = p->first[k] * size;
    if (!step) {
        for (; i < bytes && end - v >= 32 * size; i++, out += columns) {
            const uint8_t *shuffle = shuffles + meta[i] * LANES * LANE;
            expand_lane(out, v, shuffle);
            if (lanes > 1) expand_lane(out + LANE, v + __builtin_popcount(meta[i] & 15) * size, shuffle + LANE);
            v += __builtin_popcount(meta[i]) * size;
        }
    } else if (end - v >= 32 * size) {
        bytes = least(bytes, (end - v - 32 * size) / step + 1);
        for (; i < bytes; i++, out += columns, v += step) {
            const uint8_t *shuffle = shuffles + meta[i] * LANES * LANE;
            for (int k = 0; k < lanes; k++) expand_lane(out + k * LANE, v + first[k], shuffle + k * LANE);
        }
    }
    *values = v;
    return i;
}

/* Unpack the columns that `bytes` bytes of meta describe, at most `room`, from values up to `end`; return how many were
   used. */
AVX2 static INLINE int64_t expand_sized(const struct packed *p, const uint8_t *meta, int64_t bytes, const char *values,
                                        const char *end, char *out, int64_t room, int size) {
    const char *v = values;
    int64_t i = 0;
    if (p->shuffles && room >= 16) {
        const int64_t whole = least(bytes, (room - 16) / p->columns + 1);
        const int lanes = (p->columns * size + LANE - 1) / LANE; /* a constant in each call: loops over it unroll */
        if (lanes == 1) i = shuffle_bytes(p, meta, whole, &v, end, out, size, 1);
        if (lanes == 2) i = shuffle_bytes(p, meta, whole, &v, end, out, size, 2);
        if (lanes == 3) i = shuffle_bytes(p, meta, whole, &v, end, out, size, 3);
        if (lanes == 4) i = shuffle_bytes(p, meta, whole, &v, end, out, size, 4);
    }
    for (; i < bytes; i++) {
        const int16_t *sources = p->sources + meta[i] * p->columns;
        const int64_t left = (end - v) / size, columns = least(p->columns, room - i * p->columns);
        char *at = out + i * p->columns * size;
        for (int64_t j = 0; j < columns; j++, at += size) {
            if (sources[j] >= 0 && sources[j] < left)
                memcpy(at, v + sources[j] * size, size);
            else
                memset(at, 0, size);
        }
        v += least(p->step ? p->step : __builtin_popcount(meta[i]), left) * size;
    }
    return (v - values) / size;
}

/* Bytes of a value as expand() writes it. */
static int value_size(const struct packed *p) { return p->kind == FLOAT32 ? 4 : p->kind <= FLOAT16 ? 2 : 1; }

/* Return how many values these bytes of meta describe. */
AVX2 static int64_t count_values(const struct packed *p, const uint8_t *meta, int64_t bytes) {
    if (p->step) return bytes * p->step;
    int64_t count = 0;
    for (int64_t i = 0; i < bytes; i++) count += __builtin_popcount(meta[i]);
    return count;
}

/* Write `count` INT4 codes from code `first` on, a byte each and sixteenfold, from out + first % 2 on; then some more
   codes or zeros up to out + count + 2 * PAD. */
AVX2 static void spread_halves(const struct packed *p, int64_t first, int64_t count, char *out) {
    const uint8_t *in = (const uint8_t *)p->values + first / 2;
    const int64_t bytes = (count + 2 * PAD) / 2, held = least(bytes, (p->num_values - first + 1) / 2);
    const __m128i upper = _mm_set1_epi8((char)0xF0);
    int64_t i = 0;
    for (; i + 16 <= held; i += 16) {
        const __m128i both = _mm_loadu_si128((const __m128i *)(in + i)), high = _mm_and_si128(both, upper);
        const __m128i low = _mm_and_si128(_mm_slli_epi16(both, 4), upper);
        _mm_storeu_si128((__m128i *)(out + 2 * i), _mm_unpacklo_epi8(low, high));
        _mm_storeu_si128((__m128i *)(out + 2 * i + 16), _mm_unpackhi_epi8(low, high));
    }
    for (; i < held; i++) {
        out[2 * i] = (char)(in[i] << 4);
        out[2 * i + 1] = (char)(in[i] & 0xF0);
    }
    memset(out + 2 * held, 0, 2 * (bytes - held));
}

/* Unpack the columns that `bytes` bytes of meta describe, at most `room`, from value `first` on; return the value behind
   those that were used. Codes are unpacked for at most a block of columns. */
AVX2 static int64_t expand(const struct packed *p, const uint8_t *meta, int64_t bytes, int64_t first, char *out,
                           int64_t room) {
    const int size = value_size(p);
    const char *values = p->values + first * size, *end = p->values + p->num_values * size;
    char codes[MOST_COLUMNS * PAD + 2 * PAD];
    if (p->kind == INT4) {
        const int64_t count = p->meta ? count_values(p, meta, bytes) : bytes;
        spread_halves(p, first, count, codes);
        values = codes + first % 2;
        end = values + count + PAD;
    }
    int64_t used = least(bytes, (end - values) / size);
    if (!p->meta) {
        memcpy(out, values, used);
        memset(out + used, 0, bytes - used);
    } else if (size == 1) {
        used = expand_sized(p, meta, bytes, values, end, out, room, 1);
    } else if (size == 2) {
        used = expand_sized(p, meta, bytes, values, end, out, room, 2);
    } else {
        used = expand_sized(p, meta, bytes, values, end, out, room, 4);
    }
    return least(first + used, p->num_values);
}

static int64_t first_value(const struct packed *p, int64_t row) {
    const int64_t first = p->row_offsets ? p->row_offsets[row] : row * p->per_row;
    return first < 0 || first > p->num_values ? p->num_values : first;
}

static const uint8_t *meta_at(const struct packed *p, int64_t row, int64_t byte) {
    return p->meta ? p->meta + row * p->width + byte : 0;
}

AVX2 static INLINE __m256 widen(const char *v, int kind) {
    if (kind == FLOAT32) return _mm256_loadu_ps((const float *)v);
    __m128i half = _mm_loadu_si128((const __m128i *)v);
    if (kind == FLOAT16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

AVX2 static INLINE float sum_of(__m256 sum) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

AVX2 static INLINE float dot_of(const char *row, const float *x, int64_t n, int kind) {
    const int size = kind == FLOAT32 ? 4 : 2;
    __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int64_t i = 0; i < n; i += PAD)
        for (int k = 0; k < 4; k++)
            sums[k] = _mm256_fmadd_ps(widen(row + (i + 8 * k) * size, kind), _mm256_loadu_ps(x + i + 8 * k), sums[k]);
    return sum_of(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
}

/* Return row · x in float32; n is a multiple of PAD. */
AVX2 static float dot(const char *row, const float *x, int64_t n, int kind) {
    if (kind == FLOAT32) return dot_of(row, x, n, FLOAT32);
    return kind == BFLOAT16 ? dot_of(row, x, n, BFLOAT16) : dot_of(row, x, n, FLOAT16);
}

/* Number of a code over the code as it is widened. */
static float unit_of(int kind) { return kind == INT4 ? 1.f / 16 : kind == FLOAT8 ? 256.f : 1.f; }

/* Return 8 codes, each over its unit. */
AVX2 static INLINE __m256 widen_codes(const char *codes, int kind) {
    const __m128i eight = _mm_loadl_epi64((const __m128i *)codes);
    if (kind != FLOAT8) return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
    __m128i half = _mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(eight), 7), _mm_set1_epi16((short)0xBFFF));
    const __m128i nan = _mm_and_si128(_mm_add_epi16(half, _mm_set1_epi16(0x80)), _mm_set1_epi16(0x4000));
    return _mm256_cvtph_ps(_mm_or_si128(half, nan)); /* the largest code + 1, as bits, is NaN in both formats */
}

/* Return the mask of the first n of 8 floats. */
AVX2 static INLINE __m256i first_of_eight(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

AVX2 static INLINE float scale_of(const struct packed *p, int64_t row, int64_t group) {
    const char *at = p->scales + (row * p->groups + group) * (p->scale_kind == FLOAT32 ? 4 : 2);
    uint32_t bits;
    uint16_t half;
    float scale;
    if (p->scale_kind == FLOAT32) {
        memcpy(&scale, at, 4);
        return scale;
    }
    memcpy(&half, at, 2);
    if (p->scale_kind == FLOAT16) return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
    bits = (uint32_t)half << 16;
    memcpy(&scale, &bits, 4);
    return scale;
}

/* Return Σ code · x of n codes in 8 sums, each over the unit of the kind; 7 more codes can be read. */
AVX2 static INLINE __m256 dot_codes(const char *codes, const float *x, int64_t n, int kind) {
    __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (int k = 0; k < 4; k++)
            sums[k] = _mm256_fmadd_ps(widen_codes(codes + i + 8 * k, kind), _mm256_loadu_ps(x + i + 8 * k), sums[k]);
    for (; i < n; i += 8) {
        const __m256i inside = first_of_eight(n - i);
        sums[0] = _mm256_fmadd_ps(widen_codes(codes + i, kind), _mm256_maskload_ps(x + i, inside), sums[0]);
    }
    return _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
}

/* Return Σ scale · (Σ code · x) over the groups of the columns of a block, whose first column is `start`. */
AVX2 static INLINE float dot_groups_of(const struct packed *p, int64_t row, const char *block, const float *x,
                                       int64_t start, int64_t columns, int kind) {
    const __m256 unit = _mm256_set1_ps(unit_of(kind));
    __m256 total = _mm256_setzero_ps();
    int64_t group = start / p->group;
    for (int64_t i = 0, next; i < columns; i = next, group++) {
        next = least((group + 1) * p->group - start, columns);
        const __m256 sum = dot_codes(block + i, x + i, next - i, kind);
        total = _mm256_fmadd_ps(_mm256_mul_ps(sum, unit), _mm256_set1_ps(scale_of(p, row, group)), total);
    }
    return sum_of(total);
}

AVX2 static float dot_groups(const struct packed *p, int64_t row, const char *block, const float *x, int64_t start,
                             int64_t columns) {
    if (p->kind == INT8) return dot_groups_of(p, row, block, x, start, columns, INT8);
    if (p->kind == INT4) return dot_groups_of(p, row, block, x, start, columns, INT4);
    return dot_groups_of(p, row, block, x, start, columns, FLOAT8);
}

/* Write code · scale of the columns of a block, whose first column is `start`. */
AVX2 static void scale_block(const struct packed *p, int64_t row, const char *block, int64_t start, int64_t columns,
                             float *out) {
    const __m256 unit = _mm256_set1_ps(unit_of(p->kind));
    int64_t group = start / p->group;
    for (int64_t i = 0, next; i < columns; i = next, group++) {
        const __m256 scale = _mm256_set1_ps(scale_of(p, row, group));
        next = least((group + 1) * p->group - start, columns);
        for (int64_t j = i; j < next; j += 8) {
            const __m256 codes = widen_codes(block + j, p->kind == FLOAT8 ? FLOAT8 : INT8);
            const __m256 numbers = _mm256_mul_ps(_mm256_mul_ps(codes, unit), scale);
            if (next - j >= 8)
                _mm256_storeu_ps(out + j, numbers);
            else
                _mm256_maskstore_ps(out + j, first_of_eight(next - j), numbers);
        }
    }
}

/* Bytes of meta for a block of columns: whole PADs of columns. */
static int64_t block_bytes(const struct packed *p) {
    return p->columns * PAD > BLOCK ? PAD : BLOCK / p->columns / PAD * PAD;
}

static void unpack_row(const struct job *job, int64_t row) {
    const struct packed *p = job->packed;
    const int64_t bytes = block_bytes(p);
    int64_t value = first_value(p, row);
    if (!p->scales) {
        expand(p, meta_at(p, row, 0), p->width, value, job->S + row * p->d * value_size(p), p->d);
        return;
    }
    char block[MOST_COLUMNS * PAD + PAD];
    for (int64_t start = 0; start < p->width; start += bytes) {
        const int64_t column = start * p->columns, columns = least(bytes * p->columns, p->d - column);
        value = expand(p, meta_at(p, row, start), least(bytes, p->width - start), value, block, columns + 16);
        scale_block(p, row, block, column, columns, (float *)job->S + row * p->d + column);
    }
}

static void multiply_row(const struct job *job, int64_t row) {
    const struct packed *p = job->packed;
    const int size = value_size(p);
    const int64_t bytes = block_bytes(p);
    int64_t value = first_value(p, row);
    char block[(MOST_COLUMNS * PAD + PAD) * sizeof(float)]; /* what is used of it stays in the first-level cache */
    float sums[MOST_TOKENS] = {0};
    for (int64_t start = 0; start < p->width; start += bytes) {
        const int64_t column = start * p->columns, columns = least(bytes * p->columns, p->d - column);
        const int64_t padded = (columns + PAD - 1) / PAD * PAD;
        value = expand(p, meta_at(p, row, start), least(bytes, p->width - start), value, block, columns + 16);
        memset(block + columns * size, 0, (padded - columns + 8) * size);
        for (int64_t token = 0; token < job->tokens; token++) {
            const float *x = job->x + token * job->stride + column;
            sums[token] += p->scales ? dot_groups(p, row, block, x, column, columns) : dot(block, x, padded, p->kind);
        }
    }
    for (int64_t token = 0; token < job->tokens; token++) job->y[token * p->rows + row] = sums[token];
}

static void do_rows(void *argument) {
    struct job *job = argument;
    const int64_t rows = job->packed->rows;
    for (;;) {
        const int64_t start = __atomic_fetch_add(&job->next, job->step, __ATOMIC_RELAXED);
        if (start >= rows) return;
        for (int64_t row = start; row < least(start + job->step, rows); row++) job->do_row(job, row);
    }
}

static void run(struct job *job, int threads) {
    const struct packed *p = job->packed;
    job->step = 1 + (1 << 15) / (p->d + 1); /* rows that a thread takes at a time: microseconds of work */
    if (GOMP_parallel && threads > 1 && job->step < p->rows)
        GOMP_parallel(do_rows, job, threads, 0);
    else
        do_rows(job);
}

/* Return the bytes of the struct that the functions below read, so that a library of another build is found out. */
int streamslr_size_of_packed(void) { return sizeof(struct packed); }

/* Return 1 where this CPU can run the functions below. */
int streamslr_runs_here(void) {
    /* Every CPU with AVX2 has F16C, which compilers before GCC 11 cannot be asked for. */
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
}

/* Unpack S [rows, d] into memory of the values' type, of float32 where they are codes. */
void streamslr_unpack(const struct packed *packed, void *S, int threads) {
    struct job job = {.packed = packed, .do_row = unpack_row, .S = S};
    run(&job, threads);
}

/* Write y = x Sᵀ [tokens, rows] in float32, for 1 to MOST_TOKENS tokens. */
void streamslr_multiply(const struct packed *packed, const float *x, int64_t tokens, int64_t stride, float *y,
                        int threads) {
    struct job job = {.packed = packed, .do_row = multiply_row, .x = x, .y = y, .tokens = tokens, .stride = stride};
    run(&job, threads);
}

#else

int streamslr_size_of_packed(void) { return 0; }

int streamslr_runs_here(void) { return 0; }

#endif
