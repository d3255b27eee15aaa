/* LSH and local attention under the window rule on a CPU, forward and backward: see docs/kernels.md.

   A round's order lists rows by (unit, bucket, position). GROUP queries that follow one another in a bucket run side
   by side, one in each lane of a vector; the keys that any of them sees follow one another too, and are read through
   the order, where they lie. Scores are in units of log 2. Sums of a query depend on nothing that comes after it. */

#include <string.h>

#include "vectors.h"

#define BLOCK 120 /* keys whose scores exist at a time: a multiple of every AT_ONCE */
#define PADDED (BLOCK + (AT_ONCE > ROWS ? AT_ONCE : ROWS))
#define LOWEST -1e30f
#define SMALLEST_NORM 1e-12f
#define LN_2 0.69314718055994531

/* Mirrored by `calls.Call`, field by field. Rows are those of n_batch_heads units, one unit after another. */
typedef struct {
    int64_t seq_len, n_batch_heads, n_rounds, head_dim, window, causal, sees_self, n_spans, n_threads;
    int64_t dropout_threshold, dropout_seed;
    double scale;          /* of q.k, in units of log 2 */
    double dropout_factor; /* 1 / (1 - dropout) */
    const int32_t *order;        /* [n_rounds, n_batch_heads * seq_len] row at each place */
    const int32_t *spans;        /* [n_rounds, n_spans, 4] places: a bucket's begin and end, a span's begin and end */
    const int32_t *span_counts;  /* [n_rounds, 2] spans in all, and the first of them, none of which share a key */
    const int32_t *codes;        /* [n_rounds, n_rows] to count pairs once: two rows are near where these are; or null */
    const int32_t *head_indices; /* [n_batch_heads] for dropout; [n_rows] with positions; or null */
    const int32_t *positions;    /* [n_rows] of rows that are not whole units; or null: then they count from 0 */
    const float *q, *k, *v, *d_out; /* [n_rows, head_dim] */
    float *out, *lse;    /* [n_rows, head_dim], 0 for queries that met no key; [n_rows] in base 2, inf for those */
    float *sums;         /* [n_rows] forward: weights so far; backward: rowsum(d_out * out) */
    float *key_scales;  /* [n_rows] if keys are q / |q|, which nobody writes: gets 1 / |q|; k is q, dk is dq; or null */
    float *along;        /* [n_rows] likewise: gets the sum of what queries add to dk, times k; or null */
    float *dq, *dk, *dv; /* [n_rows, head_dim] */
} Call;

/* Queries that run side by side, and the keys that any of them sees: places in the order of a round. */
typedef struct {
    const Call *call;
    const int32_t *order;
    int round, dim, n_queries, first, first_key, end_key;
    int32_t row[GROUP]; /* behind the last query, that one again: what its lanes find is thrown away */
} Group;

static Group group_at(const Call *call, int round, const int32_t *span, int place) {
    int window = (int)call->window, begin = span[0], end = span[1], left = span[3] - place;
    Group g = {.call = call, .round = round, .dim = (int)call->head_dim, .first = place};
    g.order = call->order + round * call->n_batch_heads * call->seq_len;
    g.n_queries = left < GROUP ? left : GROUP;
    for (int i = 0; i < GROUP; i++) g.row[i] = g.order[place + (i < g.n_queries ? i : g.n_queries - 1)];
    int seen_from = place - (window - 1), seen_to = place + g.n_queries;
    if (!call->causal) seen_to += window - 1;
    g.first_key = seen_from > begin ? seen_from : begin;
    g.end_key = seen_to < end ? seen_to : end;
    return g;
}

/* Where the rows of the group's queries lie in x. */
static void query_rows(const Group *g, const float *x, const float **rows) {
    for (int i = 0; i < GROUP; i++) rows[i] = x + (int64_t)g->row[i] * g->dim;
}

/* Likewise as targets, those behind the last query in `spare`. */
static void query_targets(const Group *g, float *x, float *spare, float **rows) {
    for (int i = 0; i < GROUP; i++) rows[i] = i < g->n_queries ? x + (int64_t)g->row[i] * g->dim : spare;
}

/* Where the rows of n keys from a place on lie in x; behind them, the last again. */
static void key_rows(const Group *g, const float *x, int first, int n, const float **rows) {
    for (int j = 0; j < n; j++) rows[j] = x + (int64_t)g->order[first + j] * g->dim;
    for (int j = n; j < n + AT_ONCE; j++) rows[j] = rows[n - 1];
}

static void key_targets(const Group *g, float *x, int first, int n, float *spare, float **rows) {
    for (int j = 0; j < n; j++) rows[j] = x + (int64_t)g->order[first + j] * g->dim;
    for (int j = n; j < n + ROWS; j++) rows[j] = spare;
}

/* Which lanes see the key at a place. */
INLINE ints sees(const Group *g, int key_place, int first_lane) {
    const Call *call = g->call;
    ints distance = counting(g->first + first_lane - key_place);
    int window = (int)call->window, nearest = call->causal ? (call->sees_self ? 0 : 1) : 1 - window;
    ints found = (distance >= nearest) & (distance < window);
    if (!call->causal && !call->sees_self) found &= distance != 0;
    return found;
}

/* 1 / (rounds in which a pair meets), or as it is where it meets in none: for pairs that are to be counted once. */
static void share_meetings(const Group *g, int first, int n, float *factors) {
    const Call *call = g->call;
    int64_t n_rows = call->n_batch_heads * call->seq_len;
    int window = (int)call->window;
    for (int j = 0; j < n; j++)
        for (int h = 0; h < GROUP; h += LANES) {
            ints meetings = {0};
            for (int round = 0; round < call->n_rounds; round++) {
                const int32_t *codes = call->codes + round * n_rows;
                ints distance;
                for (int i = 0; i < LANES; i++) distance[i] = codes[g->row[h + i]];
                distance -= codes[g->order[first + j]];
                meetings -= (distance < window) & (call->causal ? distance >= 0 : distance > -window);
            }
            vec found = __builtin_convertvector(meetings, vec);
            store(factors + j * GROUP + h, 1.0f / larger(found, all(1.0f)));
        }
}

#define MIX_BITS(x)       \
    (x) ^= (x) >> 16;     \
    (x) *= 0x7FEB352Du;   \
    (x) ^= (x) >> 15;     \
    (x) *= 0x846CA68Bu;   \
    (x) ^= (x) >> 16

/* `ops.counter_dropout.token_keys` */
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

/* 1 / (1 - dropout) where `ops.counter_dropout.keep_mask` keeps a pair, else 0. */
static void draw_dropout(const Group *g, int first, int n, float *factors) {
    words query_keys[VECTORS];
    for (int i = 0; i < GROUP; i++) query_keys[i / LANES][i % LANES] = token_key(g, g->row[i], 1);
    for (int j = 0; j < n; j++) {
        uint32_t key = token_key(g, g->order[first + j], 0);
        for (int h = 0; h < VECTORS; h++) {
            words pair = query_keys[h] ^ key;
            MIX_BITS(pair);
            ints kept = (ints)(pair & 0x7FFFFFFFu) >= (int32_t)g->call->dropout_threshold;
            store(factors + j * GROUP + h * LANES, pick(kept, all((float)g->call->dropout_factor), all(0)));
        }
    }
}

/* What dots with keys, weights in the sum, and weights of values are multiplied with. */
typedef struct {
    int shares_pairs, drops;
    float keys[BLOCK], shares[BLOCK * GROUP] ALIGNED, kept[BLOCK * GROUP] ALIGNED;
} Factors;

static void find_factors(const Group *g, int first, int n, Factors *factors) {
    const float *known = g->call->key_scales;
    factors->shares_pairs = g->call->codes != NULL;
    factors->drops = g->call->head_indices != NULL;
    for (int j = 0; j < n; j++) factors->keys[j] = known ? known[g->order[first + j]] : 1.0f;
    if (factors->shares_pairs) share_meetings(g, first, n, factors->shares);
    if (factors->drops) draw_dropout(g, first, n, factors->kept);
}

/* What a group has summed up so far over the keys and rounds before. */
typedef struct {
    float top[GROUP] ALIGNED, weight[GROUP] ALIGNED, shrunk[GROUP] ALIGNED;
} Softmax;

/* Dots become 2^(score - top) of what the lanes see, which are then added up, shared and dropped. */
static void exponentiate(const Group *g, int first, int n, float *p, Softmax *softmax) {
    Factors factors;
    find_factors(g, first, n, &factors);
    for (int h = 0; h < GROUP; h += LANES) {
        vec before = load(softmax->top + h), top = before, sum = all(0);
        for (int j = 0; j < n; j++) {
            vec score = pick(sees(g, first + j, h), load(p + j * GROUP + h) * factors.keys[j], all(-INFINITY));
            store(p + j * GROUP + h, score);
            top = larger(score, top);
        }
        for (int j = 0; j < n; j++) {
            vec x = power_of_2(load(p + j * GROUP + h) - top);
            if (factors.shares_pairs) x *= load(factors.shares + j * GROUP + h);
            sum += x;
            if (factors.drops) x *= load(factors.kept + j * GROUP + h);
            store(p + j * GROUP + h, x);
        }
        vec shrunk = power_of_2(before - top);
        store(softmax->shrunk + h, shrunk);
        store(softmax->weight + h, load(softmax->weight + h) * shrunk + sum);
        store(softmax->top + h, top);
    }
}

static void attend(const Group *g) {
    const Call *call = g->call;
    float columns[MAX_DIM * GROUP] ALIGNED, p[PADDED * GROUP] ALIGNED, spare[MAX_DIM];
    const float *queries[GROUP], *keys[PADDED], *values[PADDED];
    float *out[GROUP];
    Softmax softmax;
    query_rows(g, call->q, queries);
    query_targets(g, call->out, spare, out);
    transpose(queries, g->dim, (float)call->scale, columns);
    for (int i = 0; i < GROUP; i++) {
        softmax.top[i] = call->lse[g->row[i]];
        softmax.weight[i] = call->sums[g->row[i]];
    }
    for (int first = g->first_key; first < g->end_key; first += BLOCK) {
        int n = g->end_key - first < BLOCK ? g->end_key - first : BLOCK;
        key_rows(g, call->k, first, n, keys);
        key_rows(g, call->v, first, n, values);
        dots_of(keys, n, columns, g->dim, p);
        exponentiate(g, first, n, p, &softmax);
        for (int i = 0; i < g->n_queries; i++)
            for (int d = 0; d < g->dim; d++) out[i][d] *= softmax.shrunk[i];
        mix_keys(p, values, n, g->dim, 1.0f, out);
    }
    for (int i = 0; i < g->n_queries; i++) {
        call->lse[g->row[i]] = softmax.top[i];
        call->sums[g->row[i]] = softmax.weight[i];
    }
}

INLINE float total(vec x) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

/* Dots become p = 2^(score - lse), and d_p = d_out.v becomes dS = p (d_p - rowsum(d_out * out)), times the key's
   factor. */
static void differentiate(const Group *g, int first, int n, float *p, float *d_p) {
    const Call *call = g->call;
    float lses[GROUP] ALIGNED, sums[GROUP] ALIGNED;
    Factors factors;
    find_factors(g, first, n, &factors);
    for (int i = 0; i < GROUP; i++) {
        lses[i] = i < g->n_queries ? call->lse[g->row[i]] : INFINITY;
        sums[i] = call->sums[g->row[i]];
    }
    for (int j = 0; j < n; j++) {
        vec along = all(0);
        for (int h = 0; h < GROUP; h += LANES) {
            float *at = p + j * GROUP + h, *d_at = d_p + j * GROUP + h;
            vec score = load(at) * factors.keys[j], d_x = load(d_at);
            vec x = power_of_2(pick(sees(g, first + j, h), score, all(-INFINITY)) - load(lses + h));
            if (factors.shares_pairs) x *= load(factors.shares + j * GROUP + h);
            if (factors.drops) d_x *= load(factors.kept + j * GROUP + h);
            vec d_score = x * (d_x - load(sums + h));
            along += d_score * score;
            store(d_at, d_score * factors.keys[j]);
            store(at, factors.drops ? x * load(factors.kept + j * GROUP + h) : x);
        }
        if (call->along) call->along[g->order[first + j]] += total(along);
    }
}

static void attend_backward(const Group *g) {
    const Call *call = g->call;
    float q_columns[MAX_DIM * GROUP] ALIGNED, d_out_columns[MAX_DIM * GROUP] ALIGNED;
    float p[PADDED * GROUP] ALIGNED, ds[PADDED * GROUP] ALIGNED, spare[MAX_DIM];
    const float *queries[GROUP], *d_outs[GROUP], *keys[PADDED], *values[PADDED];
    float *dq[GROUP], *dk[PADDED], *dv[PADDED];
    float to_scores = (float)(call->scale * LN_2);
    query_rows(g, call->q, queries);
    query_rows(g, call->d_out, d_outs);
    query_targets(g, call->dq, spare, dq);
    transpose(queries, g->dim, (float)call->scale, q_columns);
    transpose(d_outs, g->dim, 1.0f, d_out_columns);
    for (int first = g->first_key; first < g->end_key; first += BLOCK) {
        int n = g->end_key - first < BLOCK ? g->end_key - first : BLOCK;
        key_rows(g, call->k, first, n, keys);
        key_rows(g, call->v, first, n, values);
        key_targets(g, call->dk, first, n, spare, dk);
        key_targets(g, call->dv, first, n, spare, dv);
        dots_of(keys, n, q_columns, g->dim, p);
        dots_of(values, n, d_out_columns, g->dim, ds);
        differentiate(g, first, n, p, ds);
        mix_queries(p, d_outs, g->n_queries, n, g->dim, 1.0f, dv);
        mix_queries(ds, queries, g->n_queries, n, g->dim, to_scores, dk);
        mix_keys(ds, keys, n, g->dim, to_scores, dq);
    }
}

/* Rows of the next group are asked for while this one is computed: they lie anywhere, and each alone would be waited for. */
INLINE void fetch_rows(const Group *g, const float *x, int n) {
    const int32_t *rows = g->order + g->first + GROUP;
    for (int i = 0; i < n; i++)
        for (int d = 0; d < g->dim; d += 16) __builtin_prefetch(x + (int64_t)rows[i] * g->dim + d, 0, 2);
}

INLINE void fetch_next(const Group *g, int is_backward) {
    const Call *call = g->call;
    int64_t behind = call->n_batch_heads * call->seq_len - g->first - GROUP;
    int n = behind > GROUP ? GROUP : behind > 0 ? (int)behind : 0, shared = call->key_scales != NULL;
    const float *forward[] = {call->q, call->v, call->out, call->k};
    const float *backward[] = {call->q, call->v, call->d_out, call->dq, call->dv, call->k, call->dk};
    for (int x = 0; x < (is_backward ? 7 - 2 * shared : 4 - shared); x++)
        fetch_rows(g, is_backward ? backward[x] : forward[x], n);
}

static void attend_span(const Call *call, int round, int number, int is_backward) {
    const int32_t *span = call->spans + (round * call->n_spans + number) * 4;
    for (int place = span[2]; place < span[3]; place += GROUP) {
        Group g = group_at(call, round, span, place);
        fetch_next(&g, is_backward);
        if (is_backward)
            attend_backward(&g);
        else
            attend(&g);
    }
}

static float product(const float *x, const float *y, int64_t dim) {
    vec sum = all(0);
    for (int64_t d = 0; d < dim; d += LANES) sum += load(x + d) * load(y + d);
    return total(sum);
}

/* 1 / |q| of a row: `ops.lsh.shared_keys.shared_keys` */
static float key_factor(const Call *call, int64_t row) {
    const float *q = call->q + row * call->head_dim;
    float length = sqrtf(product(q, q, call->head_dim));
    return 1.0f / (length < SMALLEST_NORM ? SMALLEST_NORM : length);
}

/* Takes from dq what dk had along k, whose length is always 1: `ops.lsh.shared_keys.shared_keys_backward` */
static void stay_across_key(const Call *call, int64_t row) {
    float factor = call->key_scales[row], along = (float)LN_2 * call->along[row] * factor * factor;
    int64_t at = row * call->head_dim;
    for (int64_t d = at; d < at + call->head_dim; d++) call->dq[d] -= along * call->q[d];
}

/* out and lse of q, k, v. */
void reformer_attend(const Call *call) {
    int64_t n_rows = call->n_batch_heads * call->seq_len, dim = call->head_dim;
#pragma omp parallel num_threads(call->n_threads)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < n_rows; row++) {
            call->lse[row] = LOWEST;
            call->sums[row] = 0;
            if (call->key_scales) call->key_scales[row] = key_factor(call, row);
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

/* Adds to dq, dk and dv. */
void reformer_attend_backward(const Call *call) {
    int64_t n_rows = call->n_batch_heads * call->seq_len;
#pragma omp parallel num_threads(call->n_threads)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < n_rows; row++) {
            if (call->key_scales) {
                call->key_scales[row] = key_factor(call, row);
                call->along[row] = 0;
            }
        }
        for (int round = 0; round < call->n_rounds; round++) {
            const int32_t *counts = call->span_counts + round * 2;
            /* two halves, since spans that are neighbours add to the same keys */
#pragma omp for schedule(dynamic, 4)
            for (int i = 0; i < counts[1]; i++) attend_span(call, round, i, 1);
#pragma omp for schedule(dynamic, 4)
            for (int i = counts[1]; i < counts[0]; i++) attend_span(call, round, i, 1);
        }
        if (call->along) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < n_rows; row++) stay_across_key(call, row);
        }
    }
}

/* out [n_rows] of a, b [n_rows, dim]. */
void reformer_row_dot(const float *a, const float *b, float *out, int64_t n_rows, int64_t dim, int64_t n_threads) {
#pragma omp parallel for schedule(static) num_threads(n_threads)
    for (int64_t row = 0; row < n_rows; row++) out[row] = product(a + row * dim, b + row * dim, dim);
}
