/* LSH and local attention under the window rule on a CPU, forward and backward: see docs/kernels.md.

   A round's order lists rows by (head index, bucket, position). GROUP consecutive queries of a bucket are processed
   together, one per vector lane. Their keys are consecutive in the order too, and are read through it without a
   sorted copy. Scores are in units of log 2. The sums of a query do not depend on any later token. */

#include <string.h>

#include "vectors.h"

#define BLOCK 120 /* keys whose scores exist at a time: a multiple of every DOT_ROWS */
#define PADDED (BLOCK + (DOT_ROWS > SUM_ROWS ? DOT_ROWS : SUM_ROWS))
#define LOWEST -1e30f
#define SMALLEST_NORM 1e-12f
#define LN_2 0.69314718055994531

/* Mirrored by `calls.AttentionCall`, field by field. Rows are those of n_batch_heads sequences, one after another. */
typedef struct {
    int64_t seq_len, n_batch_heads, n_rounds, head_dim, window, causal, sees_self, n_spans, n_threads;
    int64_t dropout_threshold, dropout_seed;
    double scale;          /* of q.k, in units of log 2 */
    double dropout_factor; /* 1 / (1 - dropout) */
    const int32_t *order;        /* [n_rounds, n_batch_heads * seq_len] row in each slot */
    const int32_t *spans;        /* [n_rounds, n_spans, 4] slots: begin and end of the bucket's keys, of the span's queries */
    const int32_t *span_counts;  /* [n_rounds, 2] number of spans, and of the leading ones, which share no keys */
    const int32_t *codes;        /* [n_rounds, n_rows] position codes, if pairs are counted once; or null */
    /* If keys have buckets of their own, whose order is `order`; or null: */
    const int32_t *query_order;  /* likewise, of the rows as queries */
    const int32_t *last_keys;    /* likewise: slot of the last key up to the query, before the bucket's first if none */
    const int32_t *query_codes;  /* [n_rounds, n_rows] */
    const int32_t *documents;    /* [n_rows] or null: rows of different documents do not attend to each other */
    const int32_t *head_indices; /* [n_batch_heads] for dropout; [n_rows] with positions; or null */
    const int32_t *positions;    /* [n_rows] if the rows are not full sequences; null: 0, 1, ... */
    const float *q, *k, *v, *d_out; /* [n_rows, head_dim] */
    float *out, *lse;    /* [n_rows, head_dim], [n_rows] in units of log 2: inf for queries that met no key, whose out is 0 */
    float *sums;         /* [n_rows] forward: sum of weights; backward: rowsum(d_out * out) */
    float *key_scales;   /* [n_rows] output 1 / |q| if keys are q / |q|, never materialized: k is q, dk is dq; or null */
    float *along;        /* [n_rows] likewise: accumulates the component of dk along k; or null */
    float *dq, *dk, *dv; /* [n_rows, head_dim] */
} Call;

/* Queries processed together, and the range of their keys: slots in the order of a round. */
typedef struct {
    const Call *call;
    const int32_t *order, *query_order;
    int round, dim, n_queries, first, first_key, end_key;
    int32_t row[GROUP]; /* after the last query, that one again: the results of those lanes are discarded */
    ints at[VECTORS];   /* slot of each query among the keys: its own, or that of the last key up to it */
    int is_mixed;       /* whether there may be rows of several documents */
    ints document[VECTORS];
} Group;

static Group group_at(const Call *call, int round, const int32_t *span, int slot) {
    int window = (int)call->window, begin = span[0], end = span[1], left = span[3] - slot;
    Group g = {.call = call, .round = round, .dim = (int)call->head_dim, .first = slot};
    int64_t round_at = round * call->n_batch_heads * call->seq_len;
    g.order = call->order + round_at;
    g.query_order = call->query_order ? call->query_order + round_at : g.order;
    g.n_queries = left < GROUP ? left : GROUP;
    const int32_t *last_keys = call->last_keys ? call->last_keys + round_at + slot : NULL;
    for (int i = 0; i < GROUP; i++) {
        int lane = i < g.n_queries ? i : g.n_queries - 1;
        g.row[i] = g.query_order[slot + lane];
        g.at[i / LANES][i % LANES] = last_keys ? last_keys[lane] : slot + i;
    }
    int end_lane = g.n_queries - 1;
    int seen_from = g.at[0][0] - (window - 1), seen_to = g.at[end_lane / LANES][end_lane % LANES] + 1;
    if (!call->causal) seen_to += window - 1;
    g.first_key = seen_from > begin ? seen_from : begin;
    g.end_key = seen_to < end ? seen_to : end;
    /* longer spans are of one document: see order.c */
    g.is_mixed = call->documents && end - begin <= GROUP;
    if (g.is_mixed)
        for (int i = 0; i < GROUP; i++) g.document[i / LANES][i % LANES] = call->documents[g.row[i]];
    return g;
}

/* Pointers to the query rows of the group in x. */
static void query_rows(const Group *g, const float *x, const float **rows) {
    for (int i = 0; i < GROUP; i++) rows[i] = x + (int64_t)g->row[i] * g->dim;
}

/* Likewise as targets; lanes after the last query write to `scratch`. */
static void query_targets(const Group *g, float *x, float *scratch, float **rows) {
    for (int i = 0; i < GROUP; i++) rows[i] = i < g->n_queries ? x + (int64_t)g->row[i] * g->dim : scratch;
}

/* Pointers to the rows of n keys from slot `first` in x, padded with the last one. */
static void key_rows(const Group *g, const float *x, int first, int n, const float **rows) {
    for (int j = 0; j < n; j++) rows[j] = x + (int64_t)g->order[first + j] * g->dim;
    for (int j = n; j < n + DOT_ROWS; j++) rows[j] = rows[n - 1];
}

static void key_targets(const Group *g, float *x, int first, int n, float *scratch, float **rows) {
    for (int j = 0; j < n; j++) rows[j] = x + (int64_t)g->order[first + j] * g->dim;
    for (int j = n; j < n + SUM_ROWS; j++) rows[j] = scratch;
}

/* Mask of the lanes whose query attends to the key in a slot. */
INLINE ints visible_lanes(const Group *g, int key_slot, int first_lane) {
    const Call *call = g->call;
    ints distance = g->at[first_lane / LANES] - key_slot;
    int window = (int)call->window, nearest = call->causal ? (call->sees_self ? 0 : 1) : 1 - window;
    ints visible = (distance >= nearest) & (distance < window);
    if (!call->causal && !call->sees_self) visible &= distance != 0;
    if (g->is_mixed) visible &= g->document[first_lane / LANES] == call->documents[g->order[key_slot]];
    return visible;
}

/* 1 / (number of rounds in which a pair is visible), or 1 if none: to count pairs once. */
static void count_once_factors(const Group *g, int first, int n, float *factors) {
    const Call *call = g->call;
    int64_t n_rows = call->n_batch_heads * call->seq_len;
    int window = (int)call->window;
    for (int j = 0; j < n; j++)
        for (int h = 0; h < GROUP; h += LANES) {
            ints n_shared = {0};
            for (int round = 0; round < call->n_rounds; round++) {
                const int32_t *codes = call->codes + round * n_rows;
                const int32_t *query_codes = call->query_codes ? call->query_codes + round * n_rows : codes;
                ints distance;
                for (int i = 0; i < LANES; i++) distance[i] = query_codes[g->row[h + i]];
                distance -= codes[g->order[first + j]];
                n_shared -= (distance < window) & (call->causal ? distance >= 0 : distance > -window);
            }
            vec count = __builtin_convertvector(n_shared, vec);
            store(factors + j * GROUP + h, 1.0f / vec_max(count, splat(1.0f)));
        }
}

#define MIX_BITS(x)       \
    (x) ^= (x) >> 16;     \
    (x) *= 0x7FEB352Du;   \
    (x) ^= (x) >> 15;     \
    (x) *= 0x846CA68Bu;   \
    (x) ^= (x) >> 16

/* `ops.dropout.token_keys` */
static uint32_t token_key(const Group *g, int32_t row, int is_query) {
    const Call *call = g->call;
    uint64_t seed = (uint64_t)call->dropout_seed;
    uint32_t salt = (uint32_t)(seed ^ (seed >> 32)) ^ (uint32_t)g->round * 0x9E3779B9u;
    int64_t position = call->positions ? call->positions[row] : row % call->seq_len;
    uint32_t key = (uint32_t)position + (salt ^ (is_query ? 0x5BD1E995u : 0u));
    MIX_BITS(key);
    key ^= (uint32_t)call->head_indices[call->positions ? row : row / call->seq_len] * 0x85EBCA6Bu;
    MIX_BITS(key);
    return key;
}

/* 1 / (1 - dropout) if `ops.dropout.keep_mask` keeps a pair, else 0. */
static void dropout_factors(const Group *g, int first, int n, float *factors) {
    uints query_keys[VECTORS];
    for (int i = 0; i < GROUP; i++) query_keys[i / LANES][i % LANES] = token_key(g, g->row[i], 1);
    for (int j = 0; j < n; j++) {
        uint32_t key = token_key(g, g->order[first + j], 0);
        for (int h = 0; h < VECTORS; h++) {
            uints pair = query_keys[h] ^ key;
            MIX_BITS(pair);
            ints keep = (ints)(pair & 0x7FFFFFFFu) >= (int32_t)g->call->dropout_threshold;
            store(factors + j * GROUP + h * LANES, blend(keep, splat((float)g->call->dropout_factor), splat(0)));
        }
    }
}

/* Factors of the dot products with keys, of the softmax weights, and of the weights of values. */
typedef struct {
    int counts_once, has_dropout;
    float keys[BLOCK], once[BLOCK * GROUP] ALIGNED, keep[BLOCK * GROUP] ALIGNED;
} Factors;

static void compute_factors(const Group *g, int first, int n, Factors *factors) {
    const float *known = g->call->key_scales;
    factors->counts_once = g->call->codes != NULL;
    factors->has_dropout = g->call->head_indices != NULL;
    for (int j = 0; j < n; j++) factors->keys[j] = known ? known[g->order[first + j]] : 1.0f;
    if (factors->counts_once) count_once_factors(g, first, n, factors->once);
    if (factors->has_dropout) dropout_factors(g, first, n, factors->keep);
}

/* Softmax state of a group over the previous keys and rounds. */
typedef struct {
    float top[GROUP] ALIGNED, weight[GROUP] ALIGNED, rescale[GROUP] ALIGNED;
} Softmax;

/* Turns dot products into weights 2^(score - top), updates the softmax state, and applies dropout to the weights. */
static void exponentiate(const Group *g, int first, int n, float *p, Softmax *softmax) {
    Factors factors;
    compute_factors(g, first, n, &factors);
    for (int h = 0; h < GROUP; h += LANES) {
        vec before = load(softmax->top + h), top = before, sum = splat(0);
        for (int j = 0; j < n; j++) {
            vec score = load(p + j * GROUP + h) * factors.keys[j];
            score = blend(visible_lanes(g, first + j, h), score, splat(-INFINITY));
            store(p + j * GROUP + h, score);
            top = vec_max(score, top);
        }
        for (int j = 0; j < n; j++) {
            vec x = vec_exp2(load(p + j * GROUP + h) - top);
            if (factors.counts_once) x *= load(factors.once + j * GROUP + h);
            sum += x;
            if (factors.has_dropout) x *= load(factors.keep + j * GROUP + h);
            store(p + j * GROUP + h, x);
        }
        vec rescale = vec_exp2(before - top);
        store(softmax->rescale + h, rescale);
        store(softmax->weight + h, load(softmax->weight + h) * rescale + sum);
        store(softmax->top + h, top);
    }
}

static void attend(const Group *g) {
    const Call *call = g->call;
    float columns[MAX_DIM * GROUP] ALIGNED, p[PADDED * GROUP] ALIGNED, scratch[MAX_DIM];
    const float *queries[GROUP], *keys[PADDED], *values[PADDED];
    float *out[GROUP];
    Softmax softmax;
    query_rows(g, call->q, queries);
    query_targets(g, call->out, scratch, out);
    transpose(queries, g->dim, (float)call->scale, columns);
    for (int i = 0; i < GROUP; i++) {
        softmax.top[i] = call->lse[g->row[i]];
        softmax.weight[i] = call->sums[g->row[i]];
    }
    for (int first = g->first_key; first < g->end_key; first += BLOCK) {
        int n = g->end_key - first < BLOCK ? g->end_key - first : BLOCK;
        key_rows(g, call->k, first, n, keys);
        key_rows(g, call->v, first, n, values);
        dot_rows(keys, n, columns, g->dim, p);
        exponentiate(g, first, n, p, &softmax);
        for (int i = 0; i < g->n_queries; i++)
            for (int d = 0; d < g->dim; d++) out[i][d] *= softmax.rescale[i];
        accumulate_keys(p, values, n, g->dim, 1.0f, out);
    }
    for (int i = 0; i < g->n_queries; i++) {
        call->lse[g->row[i]] = softmax.top[i];
        call->sums[g->row[i]] = softmax.weight[i];
    }
}

INLINE float add_lanes(float sum, vec x) {
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

/* Turns dot products into p = 2^(score - lse), and d_p = d_out.v into dS = p (d_p - rowsum(d_out * out)), times the
   scale of the key. */
static void differentiate(const Group *g, int first, int n, float *p, float *d_p) {
    const Call *call = g->call;
    float lses[GROUP] ALIGNED, sums[GROUP] ALIGNED;
    Factors factors;
    compute_factors(g, first, n, &factors);
    for (int i = 0; i < GROUP; i++) {
        lses[i] = i < g->n_queries ? call->lse[g->row[i]] : INFINITY;
        sums[i] = call->sums[g->row[i]];
    }
    for (int j = 0; j < n; j++) {
        float along = 0; /* query by query: the others of the group, whose terms are 0, do not matter */
        for (int h = 0; h < GROUP; h += LANES) {
            float *at = p + j * GROUP + h, *d_at = d_p + j * GROUP + h;
            vec score = load(at) * factors.keys[j], d_x = load(d_at);
            vec x = vec_exp2(blend(visible_lanes(g, first + j, h), score, splat(-INFINITY)) - load(lses + h));
            if (factors.counts_once) x *= load(factors.once + j * GROUP + h);
            if (factors.has_dropout) d_x *= load(factors.keep + j * GROUP + h);
            vec d_score = x * (d_x - load(sums + h));
            along = add_lanes(along, d_score * score);
            store(d_at, d_score * factors.keys[j]);
            store(at, factors.has_dropout ? x * load(factors.keep + j * GROUP + h) : x);
        }
        if (call->along) call->along[g->order[first + j]] += along;
    }
}

static void attend_backward(const Group *g) {
    const Call *call = g->call;
    float q_columns[MAX_DIM * GROUP] ALIGNED, d_out_columns[MAX_DIM * GROUP] ALIGNED;
    float p[PADDED * GROUP] ALIGNED, ds[PADDED * GROUP] ALIGNED, scratch[MAX_DIM];
    const float *queries[GROUP], *d_outs[GROUP], *keys[PADDED], *values[PADDED];
    float *dq[GROUP], *dk[PADDED], *dv[PADDED];
    float to_scores = (float)(call->scale * LN_2);
    query_rows(g, call->q, queries);
    query_rows(g, call->d_out, d_outs);
    query_targets(g, call->dq, scratch, dq);
    transpose(queries, g->dim, (float)call->scale, q_columns);
    transpose(d_outs, g->dim, 1.0f, d_out_columns);
    for (int first = g->first_key; first < g->end_key; first += BLOCK) {
        int n = g->end_key - first < BLOCK ? g->end_key - first : BLOCK;
        key_rows(g, call->k, first, n, keys);
        key_rows(g, call->v, first, n, values);
        key_targets(g, call->dk, first, n, scratch, dk);
        key_targets(g, call->dv, first, n, scratch, dv);
        dot_rows(keys, n, q_columns, g->dim, p);
        dot_rows(values, n, d_out_columns, g->dim, ds);
        differentiate(g, first, n, p, ds);
        accumulate_queries(p, d_outs, g->n_queries, n, g->dim, 1.0f, dv);
        accumulate_queries(ds, queries, g->n_queries, n, g->dim, to_scores, dk);
        accumulate_keys(ds, keys, n, g->dim, to_scores, dq);
    }
}

/* Prefetches up to GROUP rows of x from slot `from` of an order. */
INLINE void prefetch_rows(const Group *g, const float *x, const int32_t *order, int from) {
    int64_t n_following = g->call->n_batch_heads * g->call->seq_len - from;
    int n = n_following > GROUP ? GROUP : n_following > 0 ? (int)n_following : 0;
    for (int i = 0; i < n; i++)
        for (int d = 0; d < g->dim; d += 16) __builtin_prefetch(x + (int64_t)order[from + i] * g->dim + d, 0, 2);
}

/* Prefetches the rows of the next group, which are scattered, while this one is computed. */
INLINE void prefetch_next(const Group *g, int is_backward) {
    const Call *call = g->call;
    int shared = call->key_scales != NULL, next = g->first + GROUP, next_key = call->query_order ? g->end_key : next;
    const float *queries[] = {call->q, is_backward ? call->d_out : call->out, call->dq};
    const float *keys[] = {call->v, call->dv, call->k, call->dk};
    for (int x = 0; x < (is_backward ? 3 : 2); x++) prefetch_rows(g, queries[x], g->query_order, next);
    for (int x = 0; x < (shared ? 2 : 4); x += is_backward ? 1 : 2) prefetch_rows(g, keys[x], g->order, next_key);
}

static void attend_span(const Call *call, int round, int number, int is_backward) {
    const int32_t *span = call->spans + (round * call->n_spans + number) * 4;
    for (int slot = span[2]; slot < span[3]; slot += GROUP) {
        Group g = group_at(call, round, span, slot);
        prefetch_next(&g, is_backward);
        if (is_backward)
            attend_backward(&g);
        else
            attend(&g);
    }
}

static float dot_product(const float *x, const float *y, int64_t dim) {
    vec sum = splat(0);
    for (int64_t d = 0; d < dim; d += LANES) sum += load(x + d) * load(y + d);
    return add_lanes(0, sum);
}

/* 1 / |q| of a row: `ops.lsh.shared_keys.shared_keys` */
static float key_scale(const Call *call, int64_t row) {
    const float *q = call->q + row * call->head_dim;
    float length = sqrtf(dot_product(q, q, call->head_dim));
    return 1.0f / (length < SMALLEST_NORM ? SMALLEST_NORM : length);
}

/* Removes the component of dk along k from dq, since |k| is fixed at 1: `ops.lsh.shared_keys.shared_keys_backward` */
static void project_out_key(const Call *call, int64_t row) {
    float factor = call->key_scales[row], along = (float)LN_2 * call->along[row] * factor * factor;
    int64_t at = row * call->head_dim;
    for (int64_t d = at; d < at + call->head_dim; d++) call->dq[d] -= along * call->q[d];
}

/* Computes out and lse from q, k, v. */
void reformer_attend(const Call *call) {
    int64_t n_rows = call->n_batch_heads * call->seq_len, dim = call->head_dim;
#pragma omp parallel num_threads(call->n_threads)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < n_rows; row++) {
            call->lse[row] = LOWEST;
            call->sums[row] = 0;
            if (call->key_scales) call->key_scales[row] = key_scale(call, row);
            memset(call->out + row * dim, 0, dim * sizeof(float));
        }
        for (int round = 0; round < call->n_rounds; round++) {
#pragma omp for schedule(dynamic, 4)
            for (int i = 0; i < call->span_counts[round * 2]; i++) attend_span(call, round, i, 0);
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < n_rows; row++) {
            float *out = call->out + row * dim, weight = call->sums[row];
            if (weight == 0) {
                call->lse[row] = INFINITY;
                continue;
            }
            call->lse[row] += log2f(weight);
            for (int d = 0; d < dim; d++) out[d] /= weight;
        }
    }
}

/* Computes dq, dk, dv from d_out and the outputs of reformer_attend. */
void reformer_attend_backward(const Call *call) {
    int64_t n_rows = call->n_batch_heads * call->seq_len;
#pragma omp parallel num_threads(call->n_threads)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < n_rows; row++) {
            if (call->key_scales) {
                call->key_scales[row] = key_scale(call, row);
                call->along[row] = 0;
            }
        }
        for (int round = 0; round < call->n_rounds; round++) {
            const int32_t *counts = call->span_counts + round * 2;
            /* two passes, since adjacent spans add to the same keys */
#pragma omp for schedule(dynamic, 4)
            for (int i = 0; i < counts[1]; i++) attend_span(call, round, i, 1);
#pragma omp for schedule(dynamic, 4)
            for (int i = counts[1]; i < counts[0]; i++) attend_span(call, round, i, 1);
        }
        if (call->along) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < n_rows; row++) project_out_key(call, row);
        }
    }
}

/* out [n_rows]: dot products of the rows of a and b [n_rows, dim]. */
void reformer_row_dot(const float *a, const float *b, float *out, int64_t n_rows, int64_t dim, int64_t n_threads) {
#pragma omp parallel for schedule(static) num_threads(n_threads)
    for (int64_t row = 0; row < n_rows; row++) out[row] = dot_product(a + row * dim, b + row * dim, dim);
}
