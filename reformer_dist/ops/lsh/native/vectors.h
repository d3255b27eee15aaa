/* Vectors of floats, and products of a few rows with GROUP columns: all lie in registers or in the first cache. */

#include <math.h>
#include <stdint.h>

#define GROUP 16
#define MOST_DIM 256 /* of a row: `backends.why_not` lets none longer through */
#ifndef LANES /* of a vector */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#endif
/* AT_ONCE x VECTORS and ROWS x COLUMNS sums lie in registers: as many as there are, with room for what is added. */
#if LANES == 16
#define AT_ONCE 8
#define COLUMNS 4
#elif LANES == 8
#define AT_ONCE 6
#define COLUMNS 2
#else
#define AT_ONCE 4
#define COLUMNS 4
#endif
#define ROWS 4
#define VECTORS (GROUP / LANES)
#define ALIGNED __attribute__((aligned(64)))
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_in_memory __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

INLINE vec load(const float *p) { return *(const vec_in_memory *)p; }
INLINE void store(float *p, vec x) { *(vec_in_memory *)p = x; }
INLINE vec all(float x) { return x - (vec){0}; }
INLINE vec pick(ints mask, vec a, vec b) { return (vec)((mask & (ints)a) | (~mask & (ints)b)); }
INLINE vec larger(vec a, vec b) { return pick(a > b, a, b); }

INLINE ints counting(int from) {
    ints x;
    for (int i = 0; i < LANES; i++) x[i] = from + i;
    return x;
}

/* 2^x to 1e-7 of itself, 0 below 2^-126; what is not a number stays so. */
INLINE vec power_of_2(vec x) {
    const float to_integers = 12582912.0f; /* 1.5 * 2^23: what is added to it loses its fraction */
    ints is_small = x < all(-126.0f);
    vec bounded = pick(is_small, all(-126.0f), x), shifted = bounded + to_integers;
    vec fraction = bounded - (shifted - to_integers);
    vec y = all(1.535336188319500e-4f);
    y = y * fraction + 1.339887440266574e-3f;
    y = y * fraction + 9.618437357674640e-3f;
    y = y * fraction + 5.550332471162809e-2f;
    y = y * fraction + 2.402264791363012e-1f;
    y = y * fraction + 6.931472028550421e-1f;
    y = y * fraction + 1.0f;
    y *= (vec)(((ints)shifted << 23) + (127 << 23));
    return (vec)((ints)y & ~is_small);
}

/* dots[r][i] = sum over d of rows[r][d] * columns[d][i], for AT_ONCE rows. */
INLINE void dot(const float *const *rows, const float *columns, int dim, float *dots) {
    vec sum[AT_ONCE][VECTORS] = {{{0}}};
    for (int d = 0; d < dim; d++) {
        vec column[VECTORS];
        for (int h = 0; h < VECTORS; h++) column[h] = load(columns + d * GROUP + h * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < AT_ONCE; r++)
            for (int h = 0; h < VECTORS; h++) sum[r][h] += rows[r][d] * column[h];
    }
    for (int r = 0; r < AT_ONCE; r++)
        for (int h = 0; h < VECTORS; h++) store(dots + r * GROUP + h * LANES, sum[r][h]);
}

INLINE void dots_of(const float *const *rows, int n, const float *columns, int dim, float *dots) {
    for (int r = 0; r < n; r += AT_ONCE) dot(rows + r, columns, dim, dots + r * GROUP);
}

/* targets[a] += factor * sum over b of weights[a * a_step + b * b_step] * rows[b], in n_vectors columns from `at`. */
INLINE void mix_columns(const float *weights, int a_step, int b_step, const float *const *rows, int n, int at,
                        int n_vectors, float factor, float *const *targets) {
    vec sum[ROWS][COLUMNS] = {{{0}}};
    for (int b = 0; b < n; b++) {
        vec x[COLUMNS];
        for (int c = 0; c < n_vectors; c++) x[c] = load(rows[b] + at + c * LANES);
        for (int a = 0; a < ROWS; a++)
            for (int c = 0; c < n_vectors; c++) sum[a][c] += weights[a * a_step + b * b_step] * x[c];
    }
    for (int a = 0; a < ROWS; a++)
        for (int c = 0; c < n_vectors; c++) {
            float *target = targets[a] + at + c * LANES;
            store(target, load(target) + factor * sum[a][c]);
        }
}

INLINE void mix(const float *weights, int a_step, int b_step, const float *const *rows, int n, int dim, float factor,
                float *const *targets) {
    int at = 0;
    for (; at + COLUMNS * LANES <= dim; at += COLUMNS * LANES)
        mix_columns(weights, a_step, b_step, rows, n, at, COLUMNS, factor, targets);
    for (; at < dim; at += LANES) mix_columns(weights, a_step, b_step, rows, n, at, 1, factor, targets);
}

/* The queries' targets += weights [n keys, GROUP] times rows of the keys. */
static void mix_keys(const float *weights, const float *const *rows, int n, int dim, float factor,
                     float *const *targets) {
    for (int i = 0; i < GROUP; i += ROWS) mix(weights + i, 1, GROUP, rows, n, dim, factor, targets + i);
}

/* The n keys' targets += weights [n keys, GROUP] times rows of the queries. */
static void mix_queries(const float *weights, const float *const *rows, int n_queries, int n, int dim, float factor,
                        float *const *targets) {
    for (int j = 0; j < n; j += ROWS) mix(weights + j * GROUP, GROUP, 1, rows, n_queries, dim, factor, targets + j);
}

/* One step of a transpose in registers: lanes whose number has the bit change places with rows that lack it. */
#define SWAP(x, bit)                                                 \
    for (int i = 0; i < LANES; i++) {                                \
        if (i & bit) continue;                                       \
        ints low, high;                                              \
        for (int l = 0; l < LANES; l++) {                            \
            low[l] = l & bit ? LANES + (l ^ bit) : l;                \
            high[l] = l & bit ? LANES + l : l ^ bit;                 \
        }                                                            \
        vec one = x[i], other = x[i + bit];                          \
        x[i] = __builtin_shuffle(one, other, low);                   \
        x[i + bit] = __builtin_shuffle(one, other, high);            \
    }

/* columns[d][i] = factor * rows[i][d], for GROUP rows. */
static void transpose(const float *const *rows, int dim, float factor, float *columns) {
    for (int first = 0; first < GROUP; first += LANES)
        for (int d = 0; d < dim; d += LANES) {
            vec x[LANES];
            for (int i = 0; i < LANES; i++) x[i] = load(rows[first + i] + d) * factor;
            SWAP(x, 1)
            SWAP(x, 2)
#if LANES > 4
            SWAP(x, 4)
#endif
#if LANES > 8
            SWAP(x, 8)
#endif
            for (int i = 0; i < LANES; i++) store(columns + (d + i) * GROUP + first, x[i]);
        }
}
