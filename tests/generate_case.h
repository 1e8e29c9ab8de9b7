/* What the tests of generation share. */
#ifndef GENERATE_CASE_H
#define GENERATE_CASE_H

#include "model_case.h"

static const float mixes[6][2] = {{0.5f, 0.5f}, {0, 0}, {1, 0}, {0, 1}, {0.2f, 0.8f}, {0, 0}};

static inline void mixed_rows(sample_rows *rows, uint64_t seed) {
    fill_rows(rows, 6, seed);
    for (size_t i = 0; i < 6; i++)
        rows->row[i].mix = mixes[i];
}

static inline psoup_prompt prompt_of(const psoup_row *row, uint64_t sequence) {
    return (psoup_prompt){
        .tokens = row->tokens, .n = row->n, .mix = row->mix, .sequence = sequence};
}

static inline psoup_generation *generate(psoup_model *model, const sample_rows *rows, size_t first,
                                  size_t n, const psoup_sampling *sampling, int32_t places,
                                  int32_t prefill) {
    psoup_prompt prompts[6];
    psoup_generation *g = NULL;
    psoup_session_options options = PSOUP_SESSION_OPTIONS_INIT;
    options.max_sequences = places;
    options.prefill_rows = prefill;
    for (size_t i = 0; i < n; i++)
        prompts[i] = prompt_of(&rows->row[first + i], first + i);
    OK(psoup_generate(model, prompts, n, sampling, &options, NULL, NULL, &g, &error));
    return g;
}

static inline bool equal(psoup_completion a, psoup_completion b) {
    return a.n == b.n && a.finish == b.finish &&
           memcmp(a.tokens, b.tokens, a.n * sizeof *a.tokens) == 0 &&
           memcmp(a.logprobs, b.logprobs, a.n * sizeof *a.logprobs) == 0;
}

static inline psoup_sampling sampled(int32_t max_new) {
    psoup_sampling sampling = PSOUP_SAMPLING_INIT;
    sampling.max_new_tokens = max_new;
    sampling.seed = 9;
    return sampling;
}

#endif
