/* embed_llama_cpp: changes a running llama.cpp context's soup, user by user. Built only where llama.cpp
 * is present (LLAMA_CPP_DIR=… or pkg-config llama). See docs/embedding.md.
 *
 *     embed_llama_cpp MODEL.gguf SCRATCH ADAPTER.gguf ADAPTER.gguf…
 *
 * Two ways, which must agree:
 *   many   all adapters stay on the context, and a user is new scales: nothing is merged, and every token
 *          costs the sum of the ranks. Any number of users, no memory for each.
 *   one    the merger makes the user's soup one GGUF adapter (its sources stay mapped: a user costs
 *          set_weights and write), and the context has that alone. For a user who stays.
 * In both the KV cache is cleared: its entries belong to the weights that wrote them.
 */
#include <llama.h>
#include <math.h>
#include <psoup/merge.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MOST = 16, PROMPT = 6 };

typedef struct server {
    struct llama_model *model;
    struct llama_context *context;
    struct llama_adapter_lora *adapters[MOST];
    size_t n;
    psoup_merger *merger; /* over the same adapters */
} server;

static void quiet(enum ggml_log_level level, const char *text, void *user) {
    (void)user;
    if (level == GGML_LOG_LEVEL_ERROR)
        fputs(text, stderr);
}

static int set_soup(server *s, struct llama_adapter_lora **adapters, size_t n, float *weights) {
    llama_memory_clear(llama_get_memory(s->context), true);
#ifdef PSOUP_OLD_LLAMA /* before llama_set_adapters_lora took them all at once */
    llama_clear_adapter_lora(s->context);
    for (size_t i = 0; i < n; i++)
        if (llama_set_adapter_lora(s->context, adapters[i], weights[i]) != 0)
            return -1;
    return 0;
#else
    return llama_set_adapters_lora(s->context, adapters, n, weights);
#endif
}

/* The logits after the prompt; borrowed until the next call. */
static const float *next_logits(server *s) {
    llama_token tokens[PROMPT];
    int32_t vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(s->model));
    for (int32_t i = 0; i < PROMPT; i++)
        tokens[i] = (7 * i + 3) % vocabulary;
    if (llama_decode(s->context, llama_batch_get_one(tokens, PROMPT)) != 0)
        return NULL;
    return llama_get_logits_ith(s->context, -1);
}

static int many(server *s, const double *weights, float *logits, size_t n) {
    float scales[MOST];
    for (size_t i = 0; i < s->n; i++)
        scales[i] = (float)weights[i];
    if (set_soup(s, s->adapters, s->n, scales) != 0)
        return -1;
    const float *got = next_logits(s);
    if (got == NULL)
        return -1;
    memcpy(logits, got, n * sizeof *logits);
    return 0;
}

static int one(server *s, const double *weights, const char *path, float *logits, size_t n) {
    psoup_error error = {0};
    float whole = 1.0f;
    int result = -1;
    unlink(path);
    if (psoup_merger_set_weights(s->merger, weights, s->n, &error) != PSOUP_OK ||
        psoup_merger_write(s->merger, path, &error) != PSOUP_OK) {
        fprintf(stderr, "%s\n", error.message);
        return -1;
    }
    struct llama_adapter_lora *soup = llama_adapter_lora_init(s->model, path);
    const float *got = NULL;
    if (soup != NULL && set_soup(s, &soup, 1, &whole) == 0 && (got = next_logits(s)) != NULL) {
        memcpy(logits, got, n * sizeof *logits);
        result = 0;
    }
    set_soup(s, NULL, 0, NULL); /* off the context before it goes */
    if (soup != NULL)
        llama_adapter_lora_free(soup);
    return result;
}

static int start(server *s, psoup_context *psoup, const char *model, char **adapters, size_t n) {
    psoup_error error = {0};
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    struct llama_context_params params = llama_context_default_params();
    options.format = PSOUP_MERGE_GGUF;
    params.n_ctx = 64;
    /* A serving program leaves these two alone; here results are compared to the last digits. */
    params.type_k = params.type_v = GGML_TYPE_F32;
#ifndef PSOUP_OLD_LLAMA
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED; /* its CPU code computes in f16 */
#endif
    s->n = n;
    s->model = llama_model_load_from_file(model, llama_model_default_params());
    if (s->model == NULL || (s->context = llama_init_from_model(s->model, params)) == NULL)
        return -1;
    if (psoup_merger_create(psoup, &options, &s->merger, &error) != PSOUP_OK ||
        psoup_merger_set_reference(s->merger, model, &error) != PSOUP_OK)
        goto fail;
    for (size_t i = 0; i < n; i++) {
        s->adapters[i] = llama_adapter_lora_init(s->model, adapters[i]);
        if (s->adapters[i] == NULL)
            return -1;
        if (psoup_merger_add(s->merger, adapters[i], 1.0 / (double)n, &error) != PSOUP_OK)
            goto fail;
    }
    return 0;
fail:
    fprintf(stderr, "%s\n", error.message);
    return -1;
}

int main(int argc, char **argv) {
    server s = {0};
    psoup_context *psoup = NULL;
    char path[4096];
    int status = 1;
    double worst = 0;
    if (argc < 4 || argc - 3 > MOST)
        return fprintf(stderr, "usage: embed_llama_cpp MODEL.gguf SCRATCH ADAPTER.gguf…\n"), 2;
    size_t n = (size_t)argc - 3;
    llama_log_set(quiet, NULL);
    llama_backend_init();
    if (psoup_context_create(NULL, &psoup, NULL) != PSOUP_OK || start(&s, psoup, argv[1], argv + 3, n) != 0)
        goto done;
    size_t vocabulary = (size_t)llama_vocab_n_tokens(llama_model_get_vocab(s.model));
    float *a = calloc(2 * vocabulary, sizeof *a), *b = a + vocabulary;
    snprintf(path, sizeof path, "%s/soup.gguf", argv[2]);
    for (size_t user = 0; a != NULL && user <= n; user++) { /* each policy alone, then all alike */
        double weights[MOST] = {0};
        for (size_t i = 0; i < n; i++)
            weights[i] = user == n ? 1.0 / (double)n : i == user;
        if (many(&s, weights, a, vocabulary) != 0 || one(&s, weights, path, b, vocabulary) != 0)
            goto done;
        double difference = 0;
        for (size_t i = 0; i < vocabulary; i++)
            difference = fmax(difference, fabs((double)a[i] - b[i]));
        worst = fmax(worst, difference);
        printf("user %zu", user);
        for (size_t i = 0; i < vocabulary; i++)
            printf(" %.6f", b[i]);
        printf("\n");
    }
    free(a);
    fprintf(stderr, "largest difference between the two ways: %.1e\n", worst);
    status = worst < 1e-4 ? 0 : 1;
done:
    psoup_merger_free(s.merger);
    psoup_context_free(psoup);
    llama_free(s.context);
    if (s.model != NULL)
        llama_model_free(s.model);
    llama_backend_free();
    return status;
}
