/* A whole step of PPO against the same as trl 0.7.2 takes it, recorded by tests/golden/step.py: every tensor on the
 * way, the second epoch's too. With --write FILE what the library samples is left there for the recording. */
#include "ppo_case.h"

#include "format/format.h"

enum { BATCH = 12, EPOCHS = 2, MOST = 1024 };
static const char *const cases[] = {"whole", "groups"};
enum { CASES = 2 };

static int32_t asked[BATCH][4];
static psoup_ppo_prompt questions[BATCH];

/* Exact in f32, and of the response alone. */
static int pay_by_tokens(void *user, const psoup_rollout *rollouts, size_t n, float *scores) {
    for (size_t i = 0; i < n; i++) {
        int32_t sum = 0;
        for (size_t t = 0; t < rollouts[i].n; t++)
            sum += rollouts[i].response[t] % 7 - 2;
        scores[i] = (float)sum / 8.0f;
    }
    return 0;
}

static psoup_ppo_policy recorded_policy(void) {
    for (int i = 0; i < BATCH; i++) {
        size_t n = 2 + (size_t)i % 3;
        for (size_t t = 0; t < n; t++)
            asked[i][t] = 3 + (int32_t)((i * 11 + (int)t * 29) % 77);
        questions[i] = (psoup_ppo_prompt){.tokens = asked[i], .n = n, .id = i};
    }
    return (psoup_ppo_policy){.adapter = "all", .reward_fn = pay_by_tokens, .prompts = questions, .n_prompts = BATCH,
                              .seed = 41};
}

static psoup_ppo_options recorded_options(int group, int epochs) {
    psoup_ppo_options o = PSOUP_PPO_OPTIONS_INIT;
    o.steps = 1;
    o.batch_size = BATCH;
    o.ppo_epochs = epochs;
    o.loss_group = group ? 2 : 0;
    o.max_new_tokens = 12;
    o.draw_new_tokens_from = 3;
    o.learning_rate = 3e-3f;
    o.max_grad_norm = 0.0f;
    o.early_stop = PSOUP_EARLY_STOP_OFF;
    return o;
}

/* A policy that has been trained, with a critic that has. */
static psoup_model *trained_model(void) {
    psoup_model *model;
    OK(psoup_model_load(context, "tests/golden/model/plain", &model, &error));
    OK(psoup_model_load_adapter(model, "all", "tests/golden/lora/all", &error));
    psoup__adapter *a = model->adapters[0];
    OK(psoup__adapter_add_head(model, a, &error));
    for (int i = 0; i <= model->config.hidden_size; i++)
        a->head[i] = (float)((i * 37) % 17 - 8) / 32.0f;
    ck_assert(a->head_bias == a->head + model->config.hidden_size);
    return model;
}

/* ---- what was recorded ------------------------------------------------------------------------------ */

static psoup__weights *file;

static const float *recorded(int which, const char *name, size_t n) {
    char path[64];
    size_t count;
    snprintf(path, sizeof(path), "%s/%s", cases[which], name);
    const psoup__tensor *tensor = psoup__weights_find(file, path);
    ck_assert_msg(tensor != NULL, "the golden file has no %s", path);
    ck_assert(psoup__tensor_elements(tensor, &count));
    ck_assert_msg(count == n, "%s has %zu elements: expected %zu", path, count, n);
    return tensor->data;
}

static const float *recorded_of(int which, const char *name, int epoch, size_t n) {
    char path[32];
    snprintf(path, sizeof(path), "%s%d", name, epoch);
    return recorded(which, path, n);
}

static void all_near(const float *got, const float *expected, size_t n, double tolerance, const char *what) {
    for (size_t i = 0; i < n; i++)
        near(got[i], expected[i], tolerance, what, i);
}

/* ‖got − expected‖ ≤ tolerance ‖expected − from‖. */
static void close_to(const float *got, const float *expected, const float *from, size_t n, double tolerance,
                     const char *what) {
    double off = 0.0, size = 0.0;
    for (size_t i = 0; i < n; i++) {
        double whole = (double)expected[i] - (from ? from[i] : 0.0f);
        off += pow((double)got[i] - expected[i], 2.0);
        size += whole * whole;
    }
    ck_assert_msg(size > 0.0 && sqrt(off / size) <= tolerance, "%s is off by %g", what, sqrt(off / size));
}

/* ---- the step ---------------------------------------------------------------------------------------- */

typedef struct losses {
    double policy, value;
} losses;

static int note_losses(void *user, const psoup_step *step) {
    *(losses *)user = (losses){value_of(step, "policy_loss"), value_of(step, "value_loss")};
    return 0;
}

static const char *const isas[] = {NULL, "avx2", "generic"}; /* NULL: the machine's best */
enum { ISAS = 3 };

START_TEST(every_tensor_of_a_step_is_trls) {
    const int group = _i % CASES;
    losses first = {0}, now;
    psoup_context_options how = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_context *usual = context;
    how.isa = isas[_i / CASES];
    if (psoup_context_create(&how, &context, &error) == PSOUP_ERROR_UNSUPPORTED) {
        context = usual;
        return;
    }
    OK(psoup__weights_map(context, "tests/golden/train/step.safetensors", "golden", &file, &error));
    for (int epochs = 1; epochs <= EPOCHS; epochs++) {
        const int epoch = epochs - 1;
        psoup_model *model = trained_model();
        psoup_ppo_policy p = recorded_policy();
        psoup_ppo_options o = recorded_options(group, epochs);
        psoup_ppo_trace t = {.size = sizeof(t)};
        const psoup__adapter *a = model->adapters[0];
        const float *before = recorded(group, "before", a->count);
        ck_assert_mem_eq(a->data, before, a->count * sizeof(float));
        o.on_step = note_losses;
        o.user = &now;
        psoup_ppo *ppo = create(model, &p, 1, &o);
        OK(psoup_ppo_step(ppo, NULL, &error));
        OK(psoup_ppo_get_trace(ppo, 0, &t, &error));
        ck_assert_uint_eq(t.rollouts, BATCH);
        ck_assert_mem_eq(t.response, recorded(group, "response", t.tokens), t.tokens * sizeof(int32_t));
        all_near(t.logprob, recorded(group, "logprob", t.tokens), t.tokens, 1e-5, "log-prob");
        all_near(t.ref_logprob, recorded(group, "ref_logprob", t.tokens), t.tokens, 1e-5, "reference's log-prob");
        all_near(t.value, recorded(group, "value", t.tokens), t.tokens, 1e-5, "value");
        all_near(t.reward, recorded(group, "reward", t.tokens), t.tokens, 1e-5, "reward");
        all_near(t.advantage, recorded(group, "advantage", t.tokens), t.tokens, 1e-5, "advantage");
        all_near(t.returns, recorded(group, "returns", t.tokens), t.tokens, 1e-5, "return");
        near(t.kl_coefficient, *recorded(group, "kl_coefficient", 1), 1e-6, "KL coefficient", 0);

        /* The gradient is the last epoch's, which the buffer still has; a report is a mean over epochs. */
        close_to(a->grad, recorded_of(group, "gradient", epoch, a->count), NULL, a->count, 2e-5, "gradient");
        close_to(a->data, recorded_of(group, "after", epoch, a->count), before, a->count, 1e-4, "change");
        if (!group) { /* trl reports means of micro-batches' means */
            near(epochs * now.policy - first.policy, *recorded_of(group, "policy_loss", epoch, 1), 1e-5, "policy loss", 0);
            near(epochs * now.value - first.value, *recorded_of(group, "value_loss", epoch, 1), 1e-5, "value loss", 0);
        }
        first = now;

        if (epochs < EPOCHS) { /* what the next epoch reads: the same responses under the weights of now */
            psoup__policy *all[1] = {&ppo->policies[0]};
            OK(psoup__ppo_evaluate(ppo, all, 1, false, &error));
            OK(psoup_ppo_get_trace(ppo, 0, &t, &error));
            all_near(t.logprob, recorded_of(group, "new_logprob", epochs, t.tokens), t.tokens, 2e-5, "new log-prob");
            all_near(t.value, recorded_of(group, "new_value", epochs, t.tokens), t.tokens, 2e-5, "new value");
        }
        psoup_ppo_free(ppo);
        psoup_model_free(model);
    }
    psoup__weights_free(file);
    psoup_context_free(context);
    context = usual;
}
END_TEST

/* ---- what the recording begins with ------------------------------------------------------------------- */

static void add(psoup_named_tensor *all, size_t *n, const char *which, const char *name, psoup_dtype dtype,
                const void *data, int64_t count) {
    static char paths[16 * CASES][48];
    static int64_t shapes[16 * CASES][1];
    void *copy = malloc((size_t)count * 4 + 1);
    memcpy(copy, data, (size_t)count * 4);
    snprintf(paths[*n], sizeof(paths[*n]), "%s/%s", which, name);
    shapes[*n][0] = count;
    all[*n] = (psoup_named_tensor){paths[*n], dtype, 1, shapes[*n], copy};
    ++*n;
}

static const char *written;

START_TEST(what_is_drawn_is_written) {
    psoup_named_tensor all[16 * CASES];
    size_t n = 0;
    for (int group = 0; group < CASES; group++) {
        psoup_model *model = trained_model();
        psoup_ppo_policy p = recorded_policy();
        psoup_ppo_options o = recorded_options(group, 1);
        psoup_ppo_trace t = {.size = sizeof(t)};
        int32_t ids[4 * BATCH], prompt_lengths[BATCH], lengths[BATCH], order[EPOCHS * BATCH];
        size_t read = 0;
        add(all, &n, cases[group], "head", PSOUP_F32, model->adapters[0]->head, model->config.hidden_size + 1);
        psoup_ppo *ppo = create(model, &p, 1, &o);
        OK(psoup_ppo_step(ppo, NULL, &error));
        OK(psoup_ppo_get_trace(ppo, 0, &t, &error));
        for (size_t i = 0; i < BATCH; i++) {
            const psoup_ppo_prompt *prompt = ppo->policies[0].experience.rollouts.prompt[i];
            memcpy(ids + read, prompt->tokens, prompt->n * sizeof(*ids));
            read += prompt->n;
            prompt_lengths[i] = (int32_t)prompt->n;
            lengths[i] = t.start[i + 1] - t.start[i];
        }
        psoup__random shuffle = {psoup__seed_for(p.seed, PSOUP__FOR_MINI_BATCHES), 0, 0};
        for (int epoch = 0; epoch < EPOCHS; epoch++) { /* each epoch permutes what the one before left */
            for (int32_t i = 0; i < BATCH; i++)
                order[epoch * BATCH + i] = epoch ? order[(epoch - 1) * BATCH + i] : i;
            psoup__random_shuffle(&shuffle, order + epoch * BATCH, BATCH);
        }
        add(all, &n, cases[group], "prompt", PSOUP_I32, ids, (int64_t)read);
        add(all, &n, cases[group], "prompt_lengths", PSOUP_I32, prompt_lengths, BATCH);
        add(all, &n, cases[group], "response", PSOUP_I32, t.response, (int64_t)t.tokens);
        add(all, &n, cases[group], "response_lengths", PSOUP_I32, lengths, BATCH);
        add(all, &n, cases[group], "score", PSOUP_F32, t.score, BATCH);
        add(all, &n, cases[group], "order", PSOUP_I32, order, EPOCHS * BATCH);
        psoup_ppo_free(ppo);
        psoup_model_free(model);
    }
    OK(psoup_safetensors_write(context, written, all, n, &error));
    for (size_t i = 0; i < n; i++)
        free((void *)(uintptr_t)all[i].data);
}
END_TEST

int main(int argc, char **argv) {
    written = argc == 3 && strcmp(argv[1], "--write") == 0 ? argv[2] : NULL;
    Suite *suite = suite_create("train_recorded");
    TCase *tests = tcase_create("step");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    if (written)
        tcase_add_test(tests, what_is_drawn_is_written);
    else
        tcase_add_loop_test(tests, every_tensor_of_a_step_is_trls, 0, CASES * ISAS);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
