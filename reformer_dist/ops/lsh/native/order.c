/* The order of each round by (head index, bucket, position), split into spans for the threads. */

#include <stdint.h>
#include <string.h>

/* Mirrored by `calls.OrderCall`, field by field. */
typedef struct {
    int64_t seq_len, n_batch_heads, n_rounds, n_buckets, span_len, n_spans, window, n_threads;
    const int32_t *ids;   /* [n_batch_heads, n_rounds, seq_len] buckets; n_buckets for absent rows */
    const int32_t *queries; /* [n_rounds, n_batch_heads, n_buckets, 2] first query of each bucket and one past its last,
                               relative to the bucket; null if all rows are queries */
    int32_t *ends;        /* [n_rounds, n_batch_heads, n_buckets + 2] scratch */
    int32_t *order;       /* as in attention.c */
    int32_t *spans;       /* likewise */
    int32_t *span_counts; /* likewise */
    int32_t *codes;       /* likewise: slots, with a gap of a window between buckets; or null */
} OrderCall;

/* Counting sort; stores the end of each bucket in ends. Returns 0, without an order, if an id is out of range. */
static int sort_head(const OrderCall *call, int64_t head, int64_t round) {
    const int32_t *id = call->ids + (head * call->n_rounds + round) * call->seq_len;
    int64_t first = (round * call->n_batch_heads + head) * call->seq_len;
    int32_t *end = call->ends + (round * call->n_batch_heads + head) * (call->n_buckets + 2);
    memset(end, 0, (call->n_buckets + 2) * sizeof(int32_t));
    for (int64_t i = 0; i < call->seq_len; i++) {
        if (id[i] < 0 || id[i] > call->n_buckets) return 0;
        end[id[i] + 1]++;
    }
    for (int64_t b = 0; b <= call->n_buckets; b++) end[b + 1] += end[b];
    for (int64_t i = 0; i < call->seq_len; i++) {
        int32_t slot = end[id[i]]++;
        call->order[first + slot] = (int32_t)(head * call->seq_len + i);
        if (call->codes) call->codes[first + i] = slot + id[i] * (int32_t)call->window;
    }
    return 1;
}

/* Appends every other span of each bucket, from the first or the second; returns the number of spans so far. */
static int32_t split_head(const OrderCall *call, int64_t head, int64_t round, int is_second, int32_t n) {
    int64_t line = round * call->n_batch_heads + head, first = head * call->seq_len, begin = first;
    const int32_t *end = call->ends + line * (call->n_buckets + 2);
    for (int64_t b = 0; b < call->n_buckets; begin = first + end[b++]) {
        int64_t stop = first + end[b], from = begin, to = stop;
        if (call->queries) {
            const int32_t *bounds = call->queries + (line * call->n_buckets + b) * 2;
            from = begin + bounds[0];
            to = begin + bounds[1];
        }
        for (int64_t at = from + is_second * call->span_len; at < to; at += 2 * call->span_len) {
            int32_t *span = call->spans + (round * call->n_spans + n++) * 4;
            span[0] = (int32_t)begin;
            span[1] = (int32_t)stop;
            span[2] = (int32_t)at;
            span[3] = (int32_t)(at + call->span_len < to ? at + call->span_len : to);
        }
    }
    return n;
}

/* Returns 1, or 0 if an id is out of range: the outputs are then undefined. */
int32_t reformer_order(const OrderCall *call) {
    int32_t is_valid = 1;
#pragma omp parallel num_threads(call->n_threads)
    {
#pragma omp for collapse(2) reduction(& : is_valid)
        for (int64_t round = 0; round < call->n_rounds; round++)
            for (int64_t head = 0; head < call->n_batch_heads; head++) is_valid &= sort_head(call, head, round);
#pragma omp for
        for (int64_t round = 0; round < (is_valid ? call->n_rounds : 0); round++) {
            int32_t *counts = call->span_counts + round * 2, n = 0;
            for (int64_t head = 0; head < call->n_batch_heads; head++) n = split_head(call, head, round, 0, n);
            counts[1] = n;
            for (int64_t head = 0; head < call->n_batch_heads; head++) n = split_head(call, head, round, 1, n);
            counts[0] = n;
        }
    }
    return is_valid;
}
