/* The ops that memory bounds. */
#include "bench.h"

#include "gpu/interpolate.h"

/* Bytes count what must cross: each input once, each output once, what is added to twice. */
#define OP(name) static void run_##name(bench *b, void *const *p, const void *arg)

/* ---- between the linear layers ------------------------------------------------------------------------- */

OP(rmsnorm) {
    b->ops->rmsnorm(b->be, p[0], p[1], p[2], arg ? p[4] : NULL, p[3], 1e-5f, b->s.rows, b->s.width);
}
OP(rmsnorm_backward) {
    b->ops->rmsnorm_backward(b->be, p[0], arg ? p[5] : NULL, p[1], p[2], p[3], p[4], b->s.rows, b->s.width);
}
OP(rope) {
    b->ops->rope(b->be, p[0], p[1], p[2], b->s.rows, b->s.heads, b->s.head_dim, b->s.width, false);
}
OP(rope_append) {
    const psoup__attention_shape shape = {b->s.heads, b->s.heads, b->s.head_dim, 1, PSOUP_BF16};
    const psoup__keys cache = {.dtype = PSOUP_BF16, .stride = b->s.width, .k = p[3], .v = p[4]};
    b->ops->rope_append(b->be, p[0], p[1], p[2], p[5], p[6], &cache, p[6], b->s.rows, &shape);
}
OP(swiglu) {
    b->ops->swiglu(b->be, p[0], p[1], p[2], (size_t)b->s.rows * (size_t)b->s.ffn);
}
OP(swiglu_backward) {
    b->ops->swiglu_backward(b->be, p[0], p[1], p[2], p[3], p[4], (size_t)b->s.rows * (size_t)b->s.ffn);
}
OP(add) {
    b->ops->add(b->be, p[0], p[1], (size_t)b->s.rows * (size_t)b->s.width);
}
OP(dropout) {
    b->ops->dropout(b->be, p[0], p[1], arg, b->s.rows, b->s.width);
}
OP(dropout_backward) {
    b->ops->dropout_backward(b->be, p[0], p[1], arg, b->s.rows, b->s.width);
}

static void bench_dropout(bench *b, size_t n, const char *shape) {
    uint64_t *words = calloc((size_t)b->s.rows, sizeof *words);
    const psoup__dropout dropout = {.p = 0.1f, .seed = words, .stream = words, .offset = words};
    bench_case c = {.op = "dropout", .bytes = 8.0 * (double)n, .item = {FLOATS(n), FLOATS(n)},
                    .run = run_dropout, .arg = &dropout};
    snprintf(c.shape, sizeof c.shape, "%s", shape);
    bench_run(b, &c);
    c.op = "dropout_backward";
    c.bytes = 12.0 * (double)n;
    c.run = run_dropout_backward;
    bench_run(b, &c);
    free(words);
}

void bench_layer(bench *b) {
    const int32_t rows = b->s.rows, width = b->s.width;
    const size_t n = (size_t)rows * (size_t)width, wide = (size_t)rows * (size_t)b->s.ffn;
    int32_t *position = malloc((size_t)rows * sizeof *position);
    char shape[96];
    snprintf(shape, sizeof shape, "%d rows of %d", (int)rows, (int)width);
    for (int32_t i = 0; i < rows; i++)
        position[i] = i % b->s.sequence;
    bench_case cases[] = {
        {.op = "rmsnorm", .bytes = 8.0 * (double)n, .run = run_rmsnorm,
         .item = {FLOATS(n), FLOATS(rows), FLOATS(n), FLOATS(width)}},
        {.op = "rmsnorm", .bytes = 16.0 * (double)n, .run = run_rmsnorm, .arg = "a residual",
         .item = {FLOATS(n), FLOATS(rows), FLOATS(n), FLOATS(width), FLOATS(n)}},
        {.op = "rmsnorm_backward", .bytes = 16.0 * (double)n, .run = run_rmsnorm_backward,
         .item = {FLOATS(n), FLOATS(n), FLOATS(n), FLOATS(width), FLOATS(rows)}},
        {.op = "rmsnorm_backward", .bytes = 16.0 * (double)n, .run = run_rmsnorm_backward, .arg = "dweight",
         .item = {FLOATS(n), FLOATS(n), FLOATS(n), FLOATS(width), FLOATS(rows), FLOATS(width)}},
        {.op = "rope", .bytes = 8.0 * (double)n, .run = run_rope,
         .item = {FLOATS(n), FLOATS((size_t)b->s.sequence * (size_t)b->s.head_dim),
                  BYTES(position, (size_t)rows * sizeof *position)}},
        {.op = "rope_append", .bytes = 20.0 * (double)n, .run = run_rope_append,
         .item = {FLOATS(n), FLOATS(n), FLOATS(n), NUMBERS(n, PSOUP_BF16), NUMBERS(n, PSOUP_BF16),
                  FLOATS((size_t)b->s.sequence * (size_t)b->s.head_dim), BYTES(position, (size_t)rows * sizeof *position)}},
        {.op = "add", .bytes = 12.0 * (double)n, .run = run_add, .item = {FLOATS(n), FLOATS(n)}},
        {.op = "swiglu", .bytes = 12.0 * (double)wide, .run = run_swiglu,
         .item = {FLOATS(wide), FLOATS(wide), FLOATS(wide)}},
        {.op = "swiglu_backward", .bytes = 20.0 * (double)wide, .run = run_swiglu_backward,
         .item = {FLOATS(wide), FLOATS(wide), FLOATS(wide), FLOATS(wide), FLOATS(wide)}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const bool is_wide = cases[i].run == run_swiglu || cases[i].run == run_swiglu_backward;
        const char *with = cases[i].arg;
        snprintf(cases[i].shape, sizeof cases[i].shape, "%d rows of %d%s%s", (int)rows,
                 (int)(is_wide ? b->s.ffn : width), with ? ", with " : "", with ? with : "");
        bench_run(b, &cases[i]);
    }
    bench_dropout(b, n, shape);
    free(position);
}

/* ---- rows found by number ------------------------------------------------------------------------------ */

OP(embed) {
    const psoup__weight table = {.dtype = PSOUP_BF16, .out = b->s.vocab, .in = b->s.width, .data = p[1]};
    b->ops->embed(b->be, p[0], &table, p[2], b->s.rows);
}
OP(embed_backward) {
    b->ops->embed_backward(b->be, p[0], p[1], p[2], b->s.vocab, b->s.width, b->s.rows);
}
OP(gather_rows) {
    b->ops->gather_rows(b->be, p[0], p[1], p[2], b->s.rows, b->s.width);
}
OP(scatter_add_rows) {
    b->ops->scatter_add_rows(b->be, p[0], p[1], p[3], p[2], b->s.rows, b->s.width);
}
OP(combine_rows) {
    b->ops->combine_rows(b->be, p[0], p[1], p[3], p[2], b->s.rows / 2, b->s.width);
}
OP(cache_append) {
    const psoup__keys cache = {.dtype = PSOUP_BF16, .stride = b->s.width, .k = p[0], .v = p[1]};
    b->ops->cache_append(b->be, &cache, p[2], p[3], p[4], b->s.rows, b->s.width);
}
OP(head) {
    b->ops->head(b->be, p[0], p[1], p[2], p[2], p[5], p[3], p[4], b->s.rows, b->s.width);
}
OP(head_backward) {
    b->ops->head_backward(b->be, p[0], p[1], p[2], p[3], p[4], p[5], p[5], p[7], p[6], b->s.rows, b->s.width);
}

void bench_rows(bench *b) {
    const int32_t rows = b->s.rows, width = b->s.width, vocab = b->s.vocab;
    const size_t n = (size_t)rows * (size_t)width, table = (size_t)vocab * (size_t)width;
    const size_t bytes = (size_t)rows * sizeof(int32_t);
    int32_t *token = malloc(bytes), *row = malloc(bytes), *first = malloc(bytes + sizeof *first);
    for (int32_t i = 0; i <= rows; i++)
        first[i] = 2 * i;
    for (int32_t i = 0; i < rows; i++) {
        token[i] = (int32_t)((int64_t)i * 7919 % vocab); /* each a few times */
        row[i] = rows - 1 - i;
    }
    bench_case cases[] = {
        {.op = "embed", .bytes = 6.0 * (double)n, .run = run_embed,
         .item = {FLOATS(n), NUMBERS(table, PSOUP_BF16), BYTES(token, bytes)}},
        {.op = "embed_backward", .bytes = 12.0 * (double)n, .run = run_embed_backward,
         .item = {FLOATS(table), FLOATS(n), BYTES(token, bytes)}},
        {.op = "gather_rows", .bytes = 8.0 * (double)n, .run = run_gather_rows,
         .item = {FLOATS(n), FLOATS(n), BYTES(row, bytes)}},
        {.op = "scatter_add_rows", .bytes = 12.0 * (double)n, .run = run_scatter_add_rows,
         .item = {FLOATS(n), FLOATS(n), BYTES(row, bytes), FLOATS(rows)}},
        {.op = "combine_rows", .bytes = 6.0 * (double)n, .run = run_combine_rows,
         .item = {FLOATS(n), FLOATS(n), BYTES(first, bytes), FLOATS(rows)}},
        {.op = "cache_append", .bytes = 12.0 * (double)n, .run = run_cache_append,
         .item = {NUMBERS(n, PSOUP_BF16), NUMBERS(n, PSOUP_BF16), BYTES(row, bytes), FLOATS(n), FLOATS(n)}},
        {.op = "head", .bytes = 4.0 * (double)n, .run = run_head,
         .item = {FLOATS(rows), FLOATS(n), BYTES(row, bytes), FLOATS(width), FLOATS(1), FLOATS(rows)}},
        {.op = "head_backward", .bytes = 12.0 * (double)n, .run = run_head_backward,
         .item = {FLOATS(n), FLOATS(width), FLOATS(1), FLOATS(rows), FLOATS(n), BYTES(row, bytes), FLOATS(width),
                  FLOATS(rows)}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        snprintf(cases[i].shape, sizeof cases[i].shape, "%d rows of %d", (int)rows, (int)width);
        bench_run(b, &cases[i]);
    }
    free(token), free(row), free(first);
}

/* ---- logits -------------------------------------------------------------------------------------------- */

OP(logprob) {
    b->ops->logprob(b->be, p[0], p[1], p[2], p[3], b->s.rows, b->s.vocab);
}
OP(logprob_backward) {
    b->ops->logprob_backward(b->be, p[0], p[0], p[1], p[2], NULL, b->s.rows, b->s.vocab);
}
OP(sample) {
    b->ops->sample(b->be, p[0], p[1], p[2], p[3], b->s.batch, b->s.vocab);
}

void bench_loss(bench *b) {
    const int32_t rows = b->s.rows, vocab = b->s.vocab;
    const size_t n = (size_t)rows * (size_t)vocab, bytes = (size_t)rows * sizeof(int32_t);
    int32_t *target = malloc(bytes);
    for (int32_t i = 0; i < rows; i++)
        target[i] = (int32_t)((int64_t)i * 7919 % vocab);
    bench_case cases[] = {
        {.op = "logprob", .bytes = 4.0 * (double)n, .run = run_logprob,
         .item = {FLOATS(rows), FLOATS(rows), FLOATS(n), BYTES(target, bytes)}},
        {.op = "logprob_backward", .bytes = 8.0 * (double)n, .run = run_logprob_backward,
         .item = {FLOATS(n), FLOATS(rows), BYTES(target, bytes)}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        snprintf(cases[i].shape, sizeof cases[i].shape, "%d rows, vocabulary %d%s", (int)rows, (int)vocab,
                 i ? ", in place" : "");
        bench_run(b, &cases[i]);
    }
    free(target);
}

/* Standard normal logits, flatter than a model's: nothing is filtered out early. */
void bench_sample(bench *b) {
    const int32_t rows = b->s.batch, vocab = b->s.vocab;
    const size_t n = (size_t)rows * (size_t)vocab;
    static const struct {
        const char *name;
        psoup__draw draw;
    } kinds[] = {{"greedy", {.top_p = 1}},
                 {"temperature 1", {.temperature = 1, .top_p = 1}},
                 {"top-k 50", {.temperature = 1, .top_k = 50, .top_p = 1}},
                 {"top-k 50, top-p 0.9", {.temperature = 1, .top_k = 50, .top_p = 0.9f}}};
    psoup__draw *draws = calloc((size_t)rows, sizeof *draws);
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        bench_case c = {.op = "sample", .bytes = 4.0 * (double)n, .run = run_sample,
                        .item = {FLOATS(rows), FLOATS(rows), FLOATS(n),
                                 BYTES(draws, (size_t)rows * sizeof *draws)}};
        for (int32_t i = 0; i < rows; i++) {
            draws[i] = kinds[k].draw;
            draws[i].sequence = (uint64_t)i;
        }
        snprintf(c.shape, sizeof c.shape, "%d rows, vocabulary %d, %s", (int)rows, (int)vocab, kinds[k].name);
        bench_run(b, &c);
    }
    free(draws);
}

/* ---- policies ------------------------------------------------------------------------------------------ */

OP(gae) {
    b->ops->gae(b->be, p[0], p[1], p[2], p[3], p[4], b->s.batch, 1, 0.95);
}
OP(policy_loss) {
    const psoup__objective *o = arg;
    const psoup__old old = {p[5], p[6], o->estimator ? p[7] : NULL, o->value_coefficient > 0 ? p[8] : NULL, p[9]};
    b->ops->policy_loss(b->be, p[0], p[1], p[2], p[3], p[4], &old, p[10], b->s.batch, o);
}

/* A step's responses, all of the longest length. */
void bench_policy(bench *b) {
    const int32_t n = b->s.batch, length = b->s.context;
    const size_t tokens = (size_t)n * (size_t)length, bytes = (size_t)n * sizeof(psoup__response);
    int32_t *first = malloc(((size_t)n + 1) * sizeof *first);
    psoup__response *response = calloc((size_t)n, sizeof *response);
    for (int32_t i = 0; i <= n; i++)
        first[i] = i * length;
    for (int32_t i = 0; i < n; i++)
        response[i] = (psoup__response){1, 0.05, first[i], length, first[i]};
    const psoup__objective ppo = {0.2, 0.2, 0.1, 0, 0}, rloo = {0.2, 0, 0, 1, 0}, grpo = {0.2, 0, 0, 0, PSOUP__K3};
    const struct {
        const char *name;
        const psoup__objective *objective;
        double floats; /* of a token */
    } kinds[] = {{"PPO", &ppo, 8}, {"RLOO", &rloo, 3}, {"GRPO", &grpo, 5}};
    bench_case advantages = {.op = "gae", .bytes = 16.0 * (double)tokens, .run = run_gae,
                             .item = {FLOATS(tokens), FLOATS(tokens), FLOATS(tokens), FLOATS(tokens),
                                      BYTES(first, ((size_t)n + 1) * sizeof *first)}};
    snprintf(advantages.shape, sizeof advantages.shape, "%d responses of %d tokens", (int)n, (int)length);
    bench_run(b, &advantages);
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        bench_case c = {.op = "policy_loss", .bytes = 4.0 * kinds[k].floats * (double)tokens, .run = run_policy_loss,
                        .arg = kinds[k].objective};
        for (int i = 0; i < 10; i++)
            c.item[i] = (bench_item)FLOATS(i == 2 ? (size_t)n * sizeof(psoup__loss_terms) / sizeof(float) : tokens);
        c.item[10] = (bench_item)BYTES(response, bytes);
        snprintf(c.shape, sizeof c.shape, "%s, %d responses of %d tokens", kinds[k].name, (int)n, (int)length);
        bench_run(b, &c);
    }
    free(first), free(response);
}

/* ---- parameters ---------------------------------------------------------------------------------------- */

OP(adamw) {
    b->ops->adamw(b->be, p[0], p[1], p[2], p[3], b->s.parameters, arg);
}
OP(sum_squares) {
    double sum;
    psoup_error error;
    b->ops->sum_squares(b->be, &sum, p[0], b->s.parameters, &error); /* settle tells */
}

void bench_adamw(bench *b) {
    const size_t n = b->s.parameters;
    const psoup__adamw_args args = {1e-4f, 0.9f, 0.999f, 1e-8f, 0.1f, 0.1f, 0.001f, 1};
    bench_case step = {.op = "adamw", .bytes = 28.0 * (double)n, .run = run_adamw, .arg = &args,
                       .item = {FLOATS(n), FLOATS(n), SQUARES(n), FLOATS(n)}};
    bench_case squares = {.op = "sum_squares", .bytes = 4.0 * (double)n, .run = run_sum_squares,
                          .waits = true, .item = {FLOATS(n)}};
    snprintf(step.shape, sizeof step.shape, "%zu parameters", n);
    snprintf(squares.shape, sizeof squares.shape, "%zu numbers, with reading it back", n);
    bench_run(b, &step);
    bench_run(b, &squares);
}

/* Σ weights[i] · in[i] of `count` models of bf16. */
OP(sum) {
    const int *count = arg;
    const double weights[8] = {0.125, 0.125, 0.125, 0.125, 0.125, 0.125, 0.125, 0.125};
    psoup__terms room = {NULL, 0};
    psoup_merge_view view[9];
    psoup_error error;
    for (int i = 0; i <= *count; i++)
        view[i] = (psoup_merge_view){.data = p[i], .dtype = PSOUP_BF16, .place = PSOUP_MERGE_DEVICE,
                                     .rows = 1, .columns = (int64_t)b->s.parameters};
    if (psoup__gpu_sum(b->gpu, &room, &view[0], &view[1], weights, (size_t)*count, &error) != PSOUP_OK)
        b->gpu->failed = error;
}

/* One linear with all adapters folded in, in place. */
OP(fold) {
    const int32_t width = b->s.width, rank = b->s.rank;
    const psoup_merge_view view = {.data = p[0], .dtype = PSOUP_BF16, .place = PSOUP_MERGE_DEVICE,
                                   .rows = width, .columns = width};
    psoup__terms room = {NULL, 0};
    psoup_lora_factors factors[MOST_ADAPTERS];
    double weights[MOST_ADAPTERS];
    psoup_error error;
    for (int32_t i = 0; i < b->s.adapters; i++) {
        const size_t at = (size_t)i * (size_t)rank * (size_t)width;
        factors[i] = (psoup_lora_factors){(float *)p[1] + at, (float *)p[2] + at, rank, 2};
        weights[i] = 1.0 / b->s.adapters;
    }
    if (psoup__gpu_fold(b->gpu, &room, &view, &view, 0, 0, width, factors, weights, (size_t)b->s.adapters,
                        &error) != PSOUP_OK)
        b->gpu->failed = error;
}

static void bench_fold(bench *b) {
    const size_t width = (size_t)b->s.width, n = (size_t)b->s.adapters * (size_t)b->s.rank * width;
    bench_case c = {.op = "fold", .bytes = 4.0 * (double)(width * width) + 8.0 * (double)n,
                    .flops = 2.0 * (double)n * (double)width, .run = run_fold,
                    .item = {NUMBERS(width * width, PSOUP_BF16), FLOATS(n), FLOATS(n)}};
    snprintf(c.shape, sizeof c.shape, "bf16, %zu x %zu, %d adapters of rank %d", width, width,
             (int)b->s.adapters, (int)b->s.rank);
    bench_run(b, &c);
}

void bench_interpolate(bench *b) {
    static const int counts[] = {2, 3, 8};
    const size_t n = b->s.parameters;
    for (size_t k = 0; k < sizeof counts / sizeof *counts; k++) {
        bench_case c = {.op = "sum", .bytes = 2.0 * (counts[k] + 1) * (double)n, .run = run_sum,
                        .arg = &counts[k]};
        for (int i = 0; i <= counts[k]; i++)
            c.item[i] = (bench_item)NUMBERS(n, PSOUP_BF16);
        snprintf(c.shape, sizeof c.shape, "bf16, %d inputs of %zu numbers", counts[k], n);
        bench_run(b, &c);
    }
    bench_fold(b);
}
