/* Compiled against the 0.2.0 headers kept beside it, run on today's libpsoup.so: what 0.2 added. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "psoup/psoup.h"

#define MUST(call)                                                                                 \
    do {                                                                                           \
        if ((call) != PSOUP_OK) {                                                                  \
            fprintf(stderr, "abi 0.2.0: %s: %s\n", #call, error.message);                          \
            return 1;                                                                              \
        }                                                                                          \
    } while (0)
#define EXPECT(condition)                                                                          \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "abi 0.2.0: not so: %s\n", #condition);                                \
            return 1;                                                                              \
        }                                                                                          \
    } while (0)

typedef struct result {
    float values[4];
    int tensors;
} result;

static int begin(void *user, const char *name, psoup_dtype dtype, int32_t rank, const int64_t *shape) {
    ((result *)user)->tensors++;
    return strcmp(name, "w") != 0 || dtype != PSOUP_F32 || rank != 2 || shape[0] != 2 || shape[1] != 2;
}

static int take(void *user, uint64_t offset, const void *data, size_t bytes) {
    memcpy((char *)((result *)user)->values + offset, data, bytes);
    return 0;
}

int main(void) {
    psoup_error error = {0};
    psoup_context *context;
    MUST(psoup_context_create(NULL, &context, &error));
    int32_t method;
    MUST(psoup_merge_method_parse("ties", &method, &error));
    EXPECT(method == PSOUP_MERGE_TIES && strcmp(psoup_merge_method_name(method), "ties") == 0);
    EXPECT(psoup_dtype_size(PSOUP_F8_E4M3) == 1 && strcmp(psoup_dtype_name(PSOUP_Q8_0), "q8_0") == 0);

    /* A merger of tensors in memory, with a parameter by tensor, into a sink. */
    static const float base[4] = {1, 1, 1, 1}, one[4] = {2, 1, 1, 1}, two[4] = {1, 5, 1, 1};
    static const int64_t shape[2] = {2, 2};
    const float *const data[3] = {base, one, two};
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    psoup_merger *merger;
    options.method = PSOUP_MERGE_TASK_ARITHMETIC;
    MUST(psoup_merger_create(context, &options, &merger, &error));
    for (int i = 0; i < 3; i++) {
        const psoup_named_tensor tensor = {.name = "w", .dtype = PSOUP_F32, .rank = 2, .shape = shape,
                                           .data = data[i]};
        psoup_merge_tensors source = PSOUP_MERGE_TENSORS_INIT;
        source.tensors = &tensor;
        source.n = 1;
        if (i == 0)
            MUST(psoup_merger_set_base_tensors(merger, &source, &error));
        else
            MUST(psoup_merger_add_tensors(merger, &source, 1, &error));
    }
    const double half = 0.5;
    MUST(psoup_merger_set_parameter(merger, 1, "weight", "w", &half, 1, &error));
    result merged = {.tensors = 0};
    psoup_merge_sink sink = PSOUP_MERGE_SINK_INIT;
    sink.user = &merged;
    sink.tensor = begin;
    sink.write = take;
    MUST(psoup_merger_run(merger, &sink, &error));
    EXPECT(merged.tensors == 1 && merged.values[0] == 2 && merged.values[1] == 3 && merged.values[3] == 1);
    psoup_merger_free(merger);

    /* Views, and factors for a whole adapter. */
    float sum[2] = {0}, a[2] = {1, 2}, b[2] = {3, 4}, a_out[2], b_out[2];
    const psoup_merge_view in[2] = {{.data = a, .dtype = PSOUP_F32, .rows = 1, .columns = 2},
                                    {.data = b, .dtype = PSOUP_F32, .rows = 1, .columns = 2}};
    const psoup_merge_view out = {.data = sum, .dtype = PSOUP_F32, .rows = 1, .columns = 2};
    const double weights[2] = {0.25, 0.75};
    MUST(psoup_merge_views(context, &out, in, weights, 2, &error));
    EXPECT(sum[0] == 2.5f && sum[1] == 3.5f);
    const psoup_lora_factors factors = {a, b, 1, 2.0f};
    const double w = 1;
    psoup_merge_module module = {.factors = &factors, .weights = &w, .count = 1, .out_features = 2,
                                 .in_features = 2, .a_out = a_out, .b_out = b_out, .rank = 1};
    MUST(psoup_merge_factors_batch(context, PSOUP_MERGE_DELTA, &module, 1, 0, &error));
    EXPECT(fabsf(a_out[1] * b_out[1] - 2 * a[1] * b[1]) < 1e-6f);
    psoup_context_free(context);
    return 0;
}
