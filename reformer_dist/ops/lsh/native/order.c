/* The order of each round by (head index, bucket, position), split into spans for the threads.

   Keys may have buckets of their own: queries and keys are then sorted apart, and each query is linked to the last key
   of its bucket up to its position.

   The rows of a document are adjacent within each bucket. Such a run of rows has spans of its own, whose sums are thus
   those of the document alone; short runs share one, of so few rows that all sums of a row are still in one group. */

#include <stdint.h>
#include <string.h>

#define GROUP 16 /* queries that attention.c processes together: that of vectors.h */

/* Mirrored by `calls.OrderCall`, field by field. */
typedef struct {
    int64_t seq_len, n_batch_heads, n_rounds, n_buckets, span_len, n_spans, window;
    int64_t includes_own; /* keys of their own: whether the keys up to a query include that of its row */
    int64_t n_threads;
    const int32_t *ids;   /* [n_batch_heads, n_rounds, seq_len] buckets; n_buckets for absent rows */
    const int32_t *query_ids; /* likewise, of the rows as queries, if ids are those of keys of their own; or null */
    const int32_t *queries; /* [n_rounds, n_batch_heads, n_buckets, 2] first query of each bucket and one past its last,
                               relative to the bucket; null if all rows are queries */
    const int32_t *documents; /* [n_batch_heads, seq_len] document of each row, ascending within a bucket; or null */
    int32_t *ends, *query_ends; /* [n_rounds, n_batch_heads, n_buckets + 2] scratch */
    int32_t *order;       /* as in attention.c */
    int32_t *spans;       /* likewise */
    int32_t *span_counts; /* likewise */
    int32_t *codes;       /* likewise: slots, with a gap of a window between buckets; or null */
    int32_t *query_order, *last_keys, *query_codes; /* likewise; null unless keys are their own */
} OrderCall;

/* Counting sort; stores the end of each bucket in end. Returns 0, without an order, if an id is out of range. */
static int sort_rows(const OrderCall *call, int64_t head, int64_t round, const int32_t *ids, int32_t *order, int32_t *end) {
    const int32_t *id = ids + (head * call->n_rounds + round) * call->seq_len;
    order += (round * call->n_batch_heads + head) * call->seq_len;
    memset(end, 0, (call->n_buckets + 2) * sizeof(int32_t));
    for (int64_t i = 0; i < call->seq_len; i++) {
        if (id[i] < 0 || id[i] > call->n_buckets) return 0;
        end[id[i] + 1]++;
    }
    for (int64_t b = 0; b <= call->n_buckets; b++) end[b + 1] += end[b];
    for (int64_t i = 0; i < call->seq_len; i++) order[end[id[i]]++] = (int32_t)(head * call->seq_len + i);
    return 1;
}

/* Slots of a bucket in the order of a head's rows. */
typedef struct {
    int32_t begin, end;
} Bucket;

static Bucket bucket_at(const OrderCall *call, int64_t line, int64_t b, const int32_t *ends) {
    const int32_t *end = ends + line * (call->n_buckets + 2);
    int32_t first = (int32_t)(line % call->n_batch_heads * call->seq_len);
    return (Bucket){first + (b ? end[b - 1] : 0), first + end[b]};
}

/* The slot of the last key up to each query of a bucket: one before the bucket's first if there is none. */
static void link_bucket(const OrderCall *call, int64_t line, int64_t b) {
    int64_t round_at = line / call->n_batch_heads * call->n_batch_heads * call->seq_len;
    const int32_t *keys = call->order + round_at, *queries = call->query_order + round_at;
    Bucket of_keys = bucket_at(call, line, b, call->ends), of_queries = bucket_at(call, line, b, call->query_ends);
    int32_t key = of_keys.begin;
    for (int32_t slot = of_queries.begin; slot < of_queries.end; slot++) {
        while (key < of_keys.end && keys[key] < queries[slot] + call->includes_own) key++;
        call->last_keys[round_at + slot] = key - 1;
    }
}

/* Position codes of the rows of a bucket, whose positions in the order are `slots`, or the order's own. */
static void code_bucket(const OrderCall *call, int64_t line, int64_t b, const int32_t *ends, const int32_t *order,
                        const int32_t *slots, int32_t *codes) {
    int64_t round_at = line / call->n_batch_heads * call->n_batch_heads * call->seq_len;
    Bucket bucket = bucket_at(call, line, b, ends);
    for (int32_t slot = bucket.begin; slot < bucket.end; slot++) {
        int32_t at = slots ? slots[round_at + slot] : slot;
        codes[round_at + order[round_at + slot]] = at + (int32_t)(b * call->window);
    }
}

/* Sorts the rows of a head in one round. Returns 0 if an id is out of range. */
static int sort_head(const OrderCall *call, int64_t head, int64_t round) {
    int64_t line = round * call->n_batch_heads + head, ends_at = line * (call->n_buckets + 2);
    if (!sort_rows(call, head, round, call->ids, call->order, call->ends + ends_at)) return 0;
    if (call->query_ids &&
        !sort_rows(call, head, round, call->query_ids, call->query_order, call->query_ends + ends_at))
        return 0;
    for (int64_t b = 0; b < call->n_buckets; b++) {
        if (call->query_ids) link_bucket(call, line, b);
        if (call->codes) code_bucket(call, line, b, call->ends, call->order, NULL, call->codes);
        if (call->codes && call->query_ids)
            code_bucket(call, line, b, call->query_ends, call->query_order, call->last_keys, call->query_codes);
    }
    return 1;
}

static void set_span(const OrderCall *call, int64_t round, int32_t number, Bucket keys, int64_t from, int64_t to) {
    int32_t *span = call->spans + (round * call->n_spans + number) * 4;
    span[0] = keys.begin;
    span[1] = keys.end;
    span[2] = (int32_t)from;
    span[3] = (int32_t)to;
}

/* Index of the span of a query: that of its last key among spans of span_len keys. */
static int64_t span_of(const OrderCall *call, const int32_t *last_keys, int32_t slot, Bucket keys) {
    return last_keys[slot] < keys.begin ? 0 : (last_keys[slot] - keys.begin) / call->span_len;
}

/* Appends every other span of queries whose keys are their own; returns the number of spans so far. */
static int32_t split_own_keys(const OrderCall *call, int64_t round, Bucket keys, Bucket queries, int is_second, int32_t n) {
    const int32_t *last_keys = call->last_keys + round * call->n_batch_heads * call->seq_len;
    for (int32_t from = queries.begin, to; from < queries.end && keys.begin < keys.end; from = to) {
        int64_t number = span_of(call, last_keys, from, keys);
        for (to = from + 1; to < queries.end && span_of(call, last_keys, to, keys) == number; to++) {}
        if (number % 2 == is_second) set_span(call, round, n++, keys, from, to);
    }
    return n;
}

/* Likewise of queries that are among the keys. */
static int32_t split_queries(const OrderCall *call, int64_t round, Bucket keys, Bucket queries, int is_second, int32_t n) {
    if (call->query_ids) return split_own_keys(call, round, keys, queries, is_second, n);
    for (int64_t at = queries.begin + is_second * call->span_len; at < queries.end; at += 2 * call->span_len)
        set_span(call, round, n++, keys, at, at + call->span_len < queries.end ? at + call->span_len : queries.end);
    return n;
}

/* The first of the slots [slot, end) of a bucket whose row is of a later document, or end. */
static int32_t skip_document(const OrderCall *call, const int32_t *order, int32_t slot, int32_t end, int32_t document) {
    while (slot < end && call->documents[order[slot]] <= document) slot++;
    return slot;
}

/* As split_queries, for the queries of each document and its keys, or of several whose rows are one group. */
static int32_t split_documents(const OrderCall *call, int64_t round, Bucket keys, Bucket queries, int is_second, int32_t n) {
    int64_t round_at = round * call->n_batch_heads * call->seq_len;
    const int32_t *order = call->order + round_at, *query_order = call->query_ids ? call->query_order + round_at : order;
    Bucket run = {keys.begin, keys.begin}, of_run = {queries.begin, queries.begin};
    while (run.end < keys.end) {
        int32_t document = call->documents[order[run.end]];
        int32_t end = skip_document(call, order, run.end, keys.end, document);
        int32_t query = skip_document(call, query_order, of_run.end, queries.end, document - 1);
        int32_t query_end = skip_document(call, query_order, query, queries.end, document);
        if (end - run.begin > GROUP || query_end - of_run.begin > GROUP) {
            n = split_queries(call, round, run, of_run, is_second, n);
            run.begin = run.end;
            of_run.begin = query;
        }
        run.end = end;
        of_run.end = query_end;
    }
    return split_queries(call, round, run, of_run, is_second, n);
}

/* Appends every other span of each bucket, from the first or the second; returns the number of spans so far. */
static int32_t split_head(const OrderCall *call, int64_t head, int64_t round, int is_second, int32_t n) {
    int64_t line = round * call->n_batch_heads + head;
    for (int64_t b = 0; b < call->n_buckets; b++) {
        Bucket keys = bucket_at(call, line, b, call->ends), queries = keys;
        if (call->query_ids) queries = bucket_at(call, line, b, call->query_ends);
        if (call->queries) {
            const int32_t *bounds = call->queries + (line * call->n_buckets + b) * 2;
            queries = (Bucket){keys.begin + bounds[0], keys.begin + bounds[1]};
        }
        n = (call->documents ? split_documents : split_queries)(call, round, keys, queries, is_second, n);
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
