/* Unpack rows of packed S, or multiply by them without keeping them; packed_rows.py calls this through ctypes.

   Whatever meta and row_offsets say, nothing past the ends of the given arrays is read or written, and values that are
   missing count as 0. io/packed_layout.py has the layout of values and meta. */

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define AVX2 __attribute__((target("avx2,fma,f16c,popcnt")))
#define INLINE inline __attribute__((always_inline))

/* Found in the OpenMP library that torch has loaded; null where that has another interface, and one thread works. */
extern void GOMP_parallel(void (*work)(void *), void *job, unsigned threads, unsigned flags) __attribute__((weak));

enum { FLOAT32, BFLOAT16, FLOAT16 };
enum { MOST_TOKENS = 4, MOST_COLUMNS = 256, BLOCK = 2048, PAD = 32, LANES = 4, LANE = 16 };

struct packed { /* the fields of _Packed in packed_rows.py */
    const char *values;         /* of all rows, one after another */
    const uint8_t *meta;        /* [rows, width] */
    const int64_t *row_offsets; /* [rows + 1], where each row's values begin; null: per_row values in each */
    const int16_t *sources;     /* [256, columns]: which of the byte's values goes to a column; -1 for none */
    const uint8_t *shuffles;    /* [256, LANES, LANE]: the same in bytes, for pshufb; null where they do not fit */
    int64_t num_values, per_row, rows, width, d;
    int32_t columns;      /* that a byte of meta describes */
    int32_t step;         /* values of a byte; 0 for a bitmask, which has as many as bits */
    int32_t kind;         /* of the values */
    int32_t first[LANES]; /* value from which on the sources of a lane are counted, where step is not 0 */
};

struct job {
    const struct packed *packed;
    void (*do_row)(const struct job *, int64_t row);
    char *S;        /* [rows, d], to unpack */
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

/* Unpack the columns that `bytes` bytes of meta describe, at most `room`; move *values past those that were used. */
AVX2 static INLINE void expand_sized(const struct packed *p, const uint8_t *meta, int64_t bytes, const char **values,
                                     char *out, int64_t room, int size) {
    const char *end = p->values + p->num_values * size;
    int64_t i = 0;
    if (p->shuffles && room >= 16) {
        const int64_t whole = least(bytes, (room - 16) / p->columns + 1);
        const int lanes = (p->columns * size + LANE - 1) / LANE; /* a constant in each call: loops over it unroll */
        if (lanes == 1) i = shuffle_bytes(p, meta, whole, values, end, out, size, 1);
        if (lanes == 2) i = shuffle_bytes(p, meta, whole, values, end, out, size, 2);
        if (lanes == 3) i = shuffle_bytes(p, meta, whole, values, end, out, size, 3);
        if (lanes == 4) i = shuffle_bytes(p, meta, whole, values, end, out, size, 4);
    }
    for (; i < bytes; i++) {
        const int16_t *sources = p->sources + meta[i] * p->columns;
        const int64_t left = (end - *values) / size, columns = least(p->columns, room - i * p->columns);
        char *at = out + i * p->columns * size;
        for (int64_t j = 0; j < columns; j++, at += size) {
            if (sources[j] >= 0 && sources[j] < left)
                memcpy(at, *values + sources[j] * size, size);
            else
                memset(at, 0, size);
        }
        *values += least(p->step ? p->step : __builtin_popcount(meta[i]), left) * size;
    }
}

static int value_size(const struct packed *p) { return p->kind == FLOAT32 ? 4 : 2; }

AVX2 static void expand(const struct packed *p, const uint8_t *meta, int64_t bytes, const char **values, char *out,
                        int64_t room) {
    if (value_size(p) == 2)
        expand_sized(p, meta, bytes, values, out, room, 2);
    else
        expand_sized(p, meta, bytes, values, out, room, 4);
}

static const char *row_values(const struct packed *p, int64_t row) {
    int64_t first = p->row_offsets ? p->row_offsets[row] : row * p->per_row;
    if (first < 0 || first > p->num_values) first = p->num_values;
    return p->values + first * value_size(p);
}

static void unpack_row(const struct job *job, int64_t row) {
    const struct packed *p = job->packed;
    const char *values = row_values(p, row);
    expand(p, p->meta + row * p->width, p->width, &values, job->S + row * p->d * value_size(p), p->d);
}

AVX2 static INLINE __m256 widen(const char *v, int kind) {
    if (kind == FLOAT32) return _mm256_loadu_ps((const float *)v);
    __m128i half = _mm_loadu_si128((const __m128i *)v);
    if (kind == FLOAT16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

AVX2 static INLINE float dot_of(const char *row, const float *x, int64_t n, int kind) {
    const int size = kind == FLOAT32 ? 4 : 2;
    __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int64_t i = 0; i < n; i += PAD)
        for (int k = 0; k < 4; k++)
            sums[k] = _mm256_fmadd_ps(widen(row + (i + 8 * k) * size, kind), _mm256_loadu_ps(x + i + 8 * k), sums[k]);
    __m256 sum = _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

/* Return row · x in float32; n is a multiple of PAD. */
AVX2 static float dot(const char *row, const float *x, int64_t n, int kind) {
    if (kind == FLOAT32) return dot_of(row, x, n, FLOAT32);
    return kind == BFLOAT16 ? dot_of(row, x, n, BFLOAT16) : dot_of(row, x, n, FLOAT16);
}

static void multiply_row(const struct job *job, int64_t row) {
    const struct packed *p = job->packed;
    const int size = value_size(p);
    const int64_t bytes = p->columns * PAD > BLOCK ? PAD : BLOCK / p->columns / PAD * PAD; /* whole PADs of columns */
    const uint8_t *meta = p->meta + row * p->width;
    const char *values = row_values(p, row);
    char block[(MOST_COLUMNS * PAD + PAD) * sizeof(float)]; /* what is used of it stays in the first-level cache */
    float sums[MOST_TOKENS] = {0};
    for (int64_t start = 0; start < p->width; start += bytes) {
        const int64_t column = start * p->columns, columns = least(bytes * p->columns, p->d - column);
        const int64_t padded = (columns + PAD - 1) / PAD * PAD;
        expand(p, meta + start, least(bytes, p->width - start), &values, block, columns + 16);
        memset(block + columns * size, 0, (padded - columns) * size);
        for (int64_t token = 0; token < job->tokens; token++)
            sums[token] += dot(block, job->x + token * job->stride + column, padded, p->kind);
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

/* Return 1 where this CPU can run the functions below. */
int streamslr_runs_here(void) {
    /* Every CPU with AVX2 has F16C, which compilers before GCC 11 cannot be asked for. */
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
}

/* Unpack S [rows, d] into memory of the values' type. */
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

int streamslr_runs_here(void) { return 0; }

#endif
