/* Bucket ids of vectors under random rotations (`ops.lsh.hashing`): fused projection and argmax. */

#include <stdint.h>

#include "vectors.h"

/* Mirrored by `calls.HashCall`, field by field. */
typedef struct {
    int64_t seq_len, n_batch_heads, n_heads, n_rounds, head_dim, n_columns, n_factors, id_bytes, n_threads;
    const int64_t *factors;   /* [n_factors] of the number of buckets; each has half as many columns */
    const float *x;           /* [n_batch_heads, seq_len, head_dim] */
    const float *rotations;   /* [n_heads, n_rounds, n_columns, head_dim] */
    void *ids;                /* [n_batch_heads, n_rounds, seq_len] integers of id_bytes each */
} HashCall;

/* Per lane, argmax of [p, -p] over the projections p on `half` columns. */
INLINE void argmax_columns(const float *rotation, int half, int dim, const float *columns, ints *best) {
    float dots[DOT_ROWS * GROUP] ALIGNED;
    vec largest[VECTORS];
    for (int h = 0; h < VECTORS; h++) {
        largest[h] = splat(-1.0f);
        best[h] = (ints){0};
    }
    for (int first = 0; first < half; first += DOT_ROWS) {
        const float *rows[DOT_ROWS];
        int n = half - first < DOT_ROWS ? half - first : DOT_ROWS;
        for (int r = 0; r < DOT_ROWS; r++) rows[r] = rotation + (int64_t)(first + (r < n ? r : n - 1)) * dim;
        dot_group(rows, columns, dim, dots);
        for (int r = 0; r < n; r++)
            for (int h = 0; h < VECTORS; h++) {
                vec product = load(dots + r * GROUP + h * LANES);
                ints is_negative = product < splat(0), column = (is_negative & half) + (first + r);
                vec size = blend(is_negative, -product, product);
                ints is_larger = size > largest[h]; /* ties: the first */
                largest[h] = blend(is_larger, size, largest[h]);
                best[h] = (is_larger & column) | (~is_larger & best[h]);
            }
    }
}

static void write_ids(const HashCall *call, int64_t head_index, int64_t round, int64_t first, int n,
                      const ints *buckets) {
    int64_t at = (head_index * call->n_rounds + round) * call->seq_len + first;
    for (int i = 0; i < n; i++) {
        int32_t id = buckets[i / LANES][i % LANES];
        if (call->id_bytes == 1) ((uint8_t *)call->ids)[at + i] = (uint8_t)id;
        else if (call->id_bytes == 2) ((int16_t *)call->ids)[at + i] = (int16_t)id;
        else ((int32_t *)call->ids)[at + i] = id;
    }
}

static void hash_group(const HashCall *call, int64_t head_index, int64_t first) {
    int dim = (int)call->head_dim, n = call->seq_len - first < GROUP ? (int)(call->seq_len - first) : GROUP;
    float columns[MAX_DIM * GROUP] ALIGNED;
    const float *rows[GROUP];
    int64_t start = head_index * call->seq_len + first;
    for (int i = 0; i < GROUP; i++) rows[i] = call->x + (start + (i < n ? i : n - 1)) * dim;
    transpose(rows, dim, 1.0f, columns);
    for (int64_t round = 0; round < call->n_rounds; round++) {
        int64_t of_head = (head_index % call->n_heads) * call->n_rounds + round;
        const float *rotation = call->rotations + of_head * call->n_columns * dim;
        ints buckets[VECTORS] = {{0}}, best[VECTORS];
        int32_t radix = 1;
        for (int64_t f = 0; f < call->n_factors; f++) {
            int half = (int)call->factors[f] / 2;
            argmax_columns(rotation, half, dim, columns, best);
            for (int h = 0; h < VECTORS; h++) buckets[h] += radix * best[h];
            rotation += (int64_t)half * dim;
            radix *= (int32_t)call->factors[f];
        }
        write_ids(call, head_index, round, first, n, buckets);
    }
}

void reformer_hash(const HashCall *call) {
    int64_t n_groups = (call->seq_len + GROUP - 1) / GROUP;
#pragma omp parallel for num_threads(call->n_threads) schedule(static)
    for (int64_t i = 0; i < call->n_batch_heads * n_groups; i++) hash_group(call, i / n_groups, i % n_groups * GROUP);
}
