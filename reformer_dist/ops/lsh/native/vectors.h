/* SIMD vectors, and products of a few rows with GROUP columns: all in registers or the L1 cache. */

#include <math.h>
#include <stdint.h>

#define GROUP 16
#define MAX_DIM 256 /* largest head_dim, checked by `calls.check_dim` */
#ifndef LANES /* floats per vector */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#endif
/* DOT_ROWS x VECTORS and SUM_ROWS x SUM_VECTORS accumulators fill the registers, with room for the operands. */
#if LANES == 16
#define DOT_ROWS 8
#define SUM_VECTORS 4
#elif LANES == 8
#define DOT_ROWS 6
#define SUM_VECTORS 2
#else
#define DOT_ROWS 4
#define SUM_VECTORS 4
#endif
#define SUM_ROWS 4
#define VECTORS (GROUP / LANES)
#define ALIGNED __attribute__((aligned(64)))
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_in_memory __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t uints __attribute__((vector_size(4 * LANES)));

INLINE vec load(const float *p) { return *(const vec_in_memory *)p; }
INLINE void store(float *p, vec x) { *(vec_in_memory *)p = x; }
INLINE vec splat(float x) { return x - (vec){0}; }
INLINE vec blend(ints mask, vec a, vec b) { return (vec)((mask & (ints)a) | (~mask & (ints)b)); }
INLINE vec vec_max(vec a, vec b) { return blend(a > b, a, b); }

/* 2^x to a relative error of 1e-7; 0 below 2^-126; NaN stays NaN. */
INLINE vec vec_exp2(vec x) {
    const float to_integers = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    ints is_small = x < splat(-126.0f);
    vec bounded = blend(is_small, splat(-126.0f), x), shifted = bounded + to_integers;
    vec fraction = bounded - (shifted - to_integers);
    vec y = splat(1.535336188319500e-4f);
    y = y * fraction + 1.339887440266574e-3f;
    y = y * fraction + 9.618437357674640e-3f;
    y = y * fraction + 5.550332471162809e-2f;
    y = y * fraction + 2.402264791363012e-1f;
    y = y * fraction + 6.931472028550421e-1f;
    y = y * fraction + 1.0f;
    y *= (vec)(((ints)shifted << 23) + (127 << 23));
    return (vec)((ints)y & ~is_small);
}

/* dots[r][i] = sum over d of rows[r][d] * columns[d][i], for DOT_ROWS rows. */
INLINE void dot_group(const float *const *rows, const float *columns, int dim, float *dots) {
    vec sum[DOT_ROWS][VECTORS] = {{{0}}};
    for (int d = 0; d < dim; d++) {
        vec column[VECTORS];
        for (int h = 0; h < VECTORS; h++) column[h] = load(columns + d * GROUP + h * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < DOT_ROWS; r++)
            for (int h = 0; h < VECTORS; h++) sum[r][h] += rows[r][d] * column[h];
    }
    for (int r = 0; r < DOT_ROWS; r++)
        for (int h = 0; h < VECTORS; h++) store(dots + r * GROUP + h * LANES, sum[r][h]);
}

INLINE void dot_rows(const float *const *rows, int n, const float *columns, int dim, float *dots) {
    for (int r = 0; r < n; r += DOT_ROWS) dot_group(rows + r, columns, dim, dots + r * GROUP);
}

/* targets[a] += factor * sum over b of weights[a * a_step + b * b_step] * rows[b], in n_vectors columns from `at`. */
INLINE void accumulate_columns(const float *weights, int a_step, int b_step, const float *const *rows, int n, int at,
                               int n_vectors, float factor, float *const *targets) {
    vec sum[SUM_ROWS][SUM_VECTORS] = {{{0}}};
    for (int b = 0; b < n; b++) {
        vec x[SUM_VECTORS];
        for (int c = 0; c < n_vectors; c++) x[c] = load(rows[b] + at + c * LANES);
        for (int a = 0; a < SUM_ROWS; a++)
            for (int c = 0; c < n_vectors; c++) sum[a][c] += weights[a * a_step + b * b_step] * x[c];
    }
    for (int a = 0; a < SUM_ROWS; a++)
        for (int c = 0; c < n_vectors; c++) {
            float *target = targets[a] + at + c * LANES;
            store(target, load(target) + factor * sum[a][c]);
        }
}

INLINE void accumulate(const float *weights, int a_step, int b_step, const float *const *rows, int n, int dim,
                       float factor, float *const *targets) {
    int at = 0;
    for (; at + SUM_VECTORS * LANES <= dim; at += SUM_VECTORS * LANES)
        accumulate_columns(weights, a_step, b_step, rows, n, at, SUM_VECTORS, factor, targets);
    for (; at < dim; at += LANES) accumulate_columns(weights, a_step, b_step, rows, n, at, 1, factor, targets);
}

/* targets of the queries += weights [n keys, GROUP] times rows of the keys. */
static void accumulate_keys(const float *weights, const float *const *rows, int n, int dim, float factor,
                            float *const *targets) {
    for (int i = 0; i < GROUP; i += SUM_ROWS) accumulate(weights + i, 1, GROUP, rows, n, dim, factor, targets + i);
}

/* targets of the n keys += weights [n keys, GROUP] times rows of the queries. */
static void accumulate_queries(const float *weights, const float *const *rows, int n_queries, int n, int dim,
                               float factor, float *const *targets) {
    for (int j = 0; j < n; j += SUM_ROWS)
        accumulate(weights + j * GROUP, GROUP, 1, rows, n_queries, dim, factor, targets + j);
}

/* One step of an in-register transpose: swaps lanes with the bit set in their index with rows without it. */
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
