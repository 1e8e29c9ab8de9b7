/* Judges: a callback or another program, asked about single questions or whole duels. */
#include "eval/eval.h"

#include <math.h>
#include <string.h>

psoup_status psoup_judge_create(psoup_context *context, psoup_judge_fn fn, void *user,
                                psoup_judge **out, psoup_error *error) {
    if (!out)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_judge_create: an argument is NULL");
    *out = NULL;
    if (!fn)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "judge: the callback is NULL");
    psoup_judge *judge = psoup__alloc(context, 1, sizeof *judge, error);
    if (!judge)
        return PSOUP_ERROR_MEMORY;
    *judge = (psoup_judge){.context = context, .fn = fn, .user = user};
    *out = judge;
    return PSOUP_OK;
}

psoup_status psoup_judge_command(psoup_context *context, const char *const *argv,
                                 psoup_judge **out, psoup_error *error) {
    if (!out)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_judge_command: an argument is NULL");
    *out = NULL;
    if (!argv || !argv[0] || !*argv[0])
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "judge: the command is empty");
    psoup_judge *judge = psoup__alloc(context, 1, sizeof *judge, error);
    if (!judge)
        return PSOUP_ERROR_MEMORY;
    judge->context = context;
    psoup_status status =
        psoup__judge_process_start(context, argv, &judge->process, error);
    if (status != PSOUP_OK) {
        psoup__free(context, judge);
        return status;
    }
    *out = judge;
    return PSOUP_OK;
}

psoup_status psoup_judge_set_patience(psoup_judge *judge, double seconds, psoup_error *error) {
    if (!judge || !isfinite(seconds) || seconds < 0)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "judge: a patience of %g seconds; expected a judge and 0 or more",
                           seconds);
    if (judge->process)
        psoup__judge_process_patience(judge->process, seconds);
    return PSOUP_OK;
}

void psoup_judge_free(psoup_judge *judge) {
    if (!judge)
        return;
    psoup__judge_process_free(judge->process);
    psoup__free(judge->context, judge);
}

psoup_status psoup_judge_ask(psoup_judge *judge, const psoup_question *questions, size_t n,
                             int32_t *verdicts, psoup_error *error) {
    if (!judge || (n > 0 && (!questions || !verdicts)))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_judge_ask: an argument is NULL");
    for (size_t i = 0; i < n; i++)
        if (!psoup__all_zero(questions[i].reserved, sizeof questions[i].reserved))
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_judge_ask: questions[%zu].reserved is not 0", i);
    for (size_t i = 0; i < n; i++)
        verdicts[i] = PSOUP_UNPARSED;
    if (n == 0)
        return PSOUP_OK;
    if (judge->process)
        return psoup__judge_process_ask(judge->process, questions, n, verdicts, error);
    if (judge->fn(judge->user, questions, n, verdicts) != 0)
        return psoup__fail(error, PSOUP_ERROR_CANCELLED, "judge: the callback failed");
    for (size_t i = 0; i < n; i++)
        if (verdicts[i] < PSOUP_B_WINS || verdicts[i] > PSOUP_UNPARSED)
            verdicts[i] = PSOUP_UNPARSED;
    return PSOUP_OK;
}

/* The answer to a question asked both ways: `there` with A first, `back` with B first. */
static int32_t agree(int32_t there, int32_t back) {
    if (there == PSOUP_UNPARSED || back == PSOUP_UNPARSED)
        return PSOUP_UNPARSED;
    return there == -back ? there : PSOUP_TIE;
}

psoup_status psoup_judge_duels(psoup_judge *judge, const psoup_preferences *preferences,
                               const char *const *prompts, const char *const *a,
                               const char *const *b, const psoup_duel *duels, size_t n, int swap,
                               int32_t *verdicts, int32_t *helpful, psoup_error *error) {
    if (!judge || !preferences || !verdicts || (n > 0 && (!prompts || !a || !b || !duels)))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_judge_duels: an argument is NULL");
    size_t asked = 0, total = 0;
    psoup_status checked = psoup__duels_check(duels, n, error);
    if (checked != PSOUP_OK)
        return checked;
    for (size_t i = 0; i < n; i++)
        asked += duels[i].n + (helpful ? 1 : 0);
    if (!psoup__multiply(asked, swap ? 2 : 1, &total))
        return psoup__out_of_memory(error, asked);
    psoup_context *context = judge->context;
    psoup_question *questions = psoup__alloc(context, total, sizeof *questions, error);
    int32_t *answers = psoup__alloc(context, total, sizeof *answers, error);
    psoup_status status = questions && answers ? PSOUP_OK : PSOUP_ERROR_MEMORY;
    if (status != PSOUP_OK)
        goto fail;
    size_t q = 0;
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < duels[i].n + (helpful ? 1 : 0); j++, q++) {
            const psoup_preference *preference = NULL;
            if (j < duels[i].n) {
                int32_t index = duels[i].preferences[j];
                preference = index < 0 ? NULL : psoup_preferences_get(preferences, (size_t)index);
                if (!preference) {
                    status = psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                                         "duel %zu: preference %d, expected 0 to %zu", i, index,
                                         psoup_preferences_count(preferences) - 1);
                    goto fail;
                }
            }
            questions[q] = (psoup_question){.id = (int64_t)q,
                                            .prompt = prompts[i],
                                            .preference = preference,
                                            .a = a[i],
                                            .b = b[i]};
            if (swap) {
                questions[asked + q] = questions[q];
                questions[asked + q].id = (int64_t)(asked + q);
                questions[asked + q].a = b[i];
                questions[asked + q].b = a[i];
            }
        }
    PSOUP__TRY(psoup_judge_ask(judge, questions, total, answers, error));
    q = 0;
    for (size_t i = 0, v = 0; i < n; i++)
        for (size_t j = 0; j < duels[i].n + (helpful ? 1 : 0); j++, q++) {
            int32_t answer = swap ? agree(answers[q], answers[asked + q]) : answers[q];
            if (j < duels[i].n)
                verdicts[v++] = answer;
            else
                helpful[i] = answer;
        }
fail:
    psoup__free(context, questions);
    psoup__free(context, answers);
    return status;
}
