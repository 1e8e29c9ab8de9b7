/* psoup run: the stages. Each leaves its results in the run's directory, where the next finds them. */
#include "launch.h"
#include "run.h"

#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static psoup_status no_memory(psoup_error *error) {
    return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
}

void run_say(const run *r, const char *format, ...) {
    va_list args;
    if (r->quiet || launch_rank() > 0)
        return;
    cli_progress_end();
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
}

char *run_path(const run *r, const char *folder, const char *name) {
    char *directory = join(r->c.output, folder), *path = directory ? join(directory, name) : NULL;
    free(directory);
    return path;
}

/* ---- adapters ------------------------------------------------------------------------------------ */

psoup_status run_add_rewards(run *r, bool trained, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t i = 0; status == PSOUP_OK && i < r->n_rewards; i++) {
        run_reward *w = &r->rewards[i];
        const char *from = w->directory ? w->directory : trained ? w->own : NULL;
        status = from ? psoup_reward_load(r->m.model, w->adapter, from, &r->handles[i], error)
                      : psoup_reward_create(r->m.model, w->adapter, &r->c.reward_lora.options, &r->handles[i], error);
    }
    return status;
}

psoup_status run_add_policies(run *r, bool trained, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t i = 0; status == PSOUP_OK && i < r->n_policies; i++) {
        const char *name = r->policies[i].name;
        char *path = run_path(r, "policies", name);
        if (!path)
            return no_memory(error);
        status = trained ? psoup_model_load_adapter(r->m.model, name, path, error)
                         : psoup_model_add_adapter(r->m.model, name, &r->c.lora.options, error);
        free(path);
    }
    return status;
}

/* ---- reward models --------------------------------------------------------------------------------- */

psoup_status run_train_rewards(run *r, psoup_error *error) {
    double accuracy = 0, loss = 0;
    run_say(r, "reward: %zu model%s on %zu comparisons, %zu held out", r->n_rewards, r->n_rewards > 1 ? "s" : "",
            r->n_comparisons, r->n_comparisons_held);
    psoup_status status = psoup_reward_train(r->handles, r->n_rewards, r->comparisons, r->n_comparisons,
                                             r->comparisons + r->n_comparisons, r->n_comparisons_held, &r->c.reward,
                                             error);
    cli_progress_end();
    if (launch_tell(r->comm, status, error) != PSOUP_OK || launch_rank() > 0)
        return status;
    for (size_t i = 0; status == PSOUP_OK && i < r->n_rewards; i++)
        status = psoup_reward_save(r->handles[i], r->rewards[i].own, r->c.model, error);
    if (status == PSOUP_OK && r->n_comparisons_held)
        status = psoup_reward_accuracy(r->handles, r->n_rewards, r->comparisons + r->n_comparisons,
                                       r->n_comparisons_held, &accuracy, &loss, error);
    if (status == PSOUP_OK && r->n_comparisons_held)
        run_say(r, "reward: accuracy %.4f, loss %.4f on the held-out comparisons", accuracy, loss);
    return status;
}

/* ---- policies -------------------------------------------------------------------------------------- */

static psoup_status save_policy(const run *r, const char *name, psoup_error *error) {
    if (launch_rank() > 0)
        return PSOUP_OK;
    char *path = run_path(r, "policies", name);
    psoup_status status = path ? psoup_model_save_adapter(r->m.model, name, path, r->c.model, error) : no_memory(error);
    free(path);
    return status;
}

/* Policy i: P-SOUPS reads its own reward model, or like P-MORL the one told by prompt; RLHF the general one. */
static psoup_ppo_policy ppo_policy(run *r, size_t i) {
    const run_policy *p = &r->policies[i];
    bool all = r->method->scope == RUN_ALL;
    return (psoup_ppo_policy){.adapter = p->name,
                              .rewards = &r->handles[r->told || all || p->preference < 0 ? 0 : p->preference],
                              .n_rewards = all ? r->n_rewards : 1,
                              .prompts = p->prompts.items,
                              .n_prompts = p->prompts.n,
                              .validation = p->validation.items,
                              .n_validation = p->validation.n,
                              .seed = r->c.seed + i};
}

psoup_status run_policies_memory(run *r, psoup_memory *out, psoup_error *error) {
    psoup_ppo_policy policies[RUN_PREFERENCES];
    for (size_t i = 0; i < r->n_policies; i++)
        policies[i] = ppo_policy(r, i);
    return psoup_ppo_memory(r->m.model, policies, r->n_policies, &r->c.ppo, out, error);
}

static psoup_status train_by_reward(run *r, psoup_error *error) {
    psoup_ppo_policy policies[RUN_PREFERENCES];
    psoup_ppo *ppo = NULL;
    for (size_t i = 0; i < r->n_policies; i++)
        policies[i] = ppo_policy(r, i);
    run_say(r, "policies: %zu, %zu prompts%s", r->n_policies, policies[0].n_prompts,
            r->n_policies > 1 ? " each, side by side" : "");
    psoup_status status = psoup_ppo_create(r->m.model, policies, r->n_policies, &r->c.ppo, &ppo, error);
    if (status != PSOUP_OK)
        return launch_tell(r->comm, status, error);
    status = psoup_ppo_run(ppo, error);
    cli_progress_end();
    /* A policy that diverged does not cost the others: they are done, and saved. */
    bool some = status == PSOUP_OK;
    for (size_t i = 0; status == PSOUP_ERROR_STATE && i < r->n_policies; i++)
        some = some || psoup_ppo_diverged(ppo, i);
    if (!some)
        launch_tell(r->comm, status, error);
    for (size_t i = 0; some && i < r->n_policies; i++) {
        psoup_error trouble;
        if (!psoup_ppo_diverged(ppo, i) && save_policy(r, r->policies[i].name, &trouble) != PSOUP_OK) {
            *error = trouble;
            status = trouble.status;
            break;
        }
    }
    psoup_ppo_free(ppo);
    return status;
}

psoup_status run_train_policies(run *r, psoup_error *error) {
    if (!r->method->supervised)
        return train_by_reward(r, error);
    run_say(r, "%s: %zu examples, %zu held out", r->policies[0].name, r->n_examples, r->n_examples_held);
    psoup_status status = psoup_sft(r->m.model, r->policies[0].name, r->examples, r->n_examples,
                                    r->examples + r->n_examples, r->n_examples_held, &r->c.sft, error);
    cli_progress_end();
    if (launch_tell(r->comm, status, error) != PSOUP_OK)
        return status;
    return save_policy(r, r->policies[0].name, error);
}

/* ---- soups as files -------------------------------------------------------------------------------- */

static const char *policy_of(const run *r, int32_t preference) {
    return psoup_preferences_get(r->preferences, (size_t)preference)->symbol;
}

static psoup_status make_soup(run *r, const run_user *u, psoup_error *error) {
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    psoup_merger *merger = NULL;
    char *to = run_path(r, "soups", u->name);
    options.method = r->c.soup == RUN_FACTORS ? PSOUP_MERGE_FACTORS : PSOUP_MERGE_DELTA;
    psoup_status status = to ? psoup_merger_create(r->m.context, &options, &merger, error) : no_memory(error);
    for (size_t k = 0; status == PSOUP_OK && k < r->user_size; k++) {
        char *from = run_path(r, "policies", policy_of(r, u->members[k]));
        status = from ? psoup_merger_add(merger, from, 1.0 / (double)r->user_size, error) : no_memory(error);
        free(from);
    }
    if (status == PSOUP_OK)
        status = psoup_merger_write(merger, to, error);
    psoup_merger_free(merger);
    free(to);
    return status;
}

psoup_status run_make_soups(run *r, psoup_error *error) {
    if (launch_rank() > 0)
        return PSOUP_OK;
    char *directory = join(r->c.output, "soups");
    psoup_status status = directory ? run_make_directory(directory, error) : no_memory(error);
    run_say(r, "soups: %zu users", r->n_users);
    for (size_t u = 0; status == PSOUP_OK && u < r->n_users; u++)
        status = make_soup(r, &r->users[u], error);
    free(directory);
    return status;
}

/* Factors average A and B apart, which no mix of policies is: each user's soup is an adapter of its own. */
psoup_status run_load_soups(run *r, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t u = 0; status == PSOUP_OK && u < r->n_users; u++) {
        char *path = run_path(r, "soups", r->users[u].name), name[RUN_MEMBERS + 8];
        snprintf(name, sizeof name, "soup %s", r->users[u].name);
        status = path ? psoup_model_load_adapter(r->m.model, name, path, error) : no_memory(error);
        free(path);
    }
    return status;
}

/* ---- responses ------------------------------------------------------------------------------------- */

/* Who is asked: with one response for everybody there is one row for each prompt, else one for each user and prompt.
 * Of several ranks each asks for its share of the rows, and ends with all answers. */
typedef struct asking {
    run *r;
    size_t n_prompts, n_askers, n_rows, n_own; /* n_rows = n_askers · n_prompts */
    psoup_prompt *prompts;                     /* [n_own]: row own_row(i) each */
    float *mixes;                              /* [n_askers, adapters] */
    psoup_completion *answers;                 /* [n_askers, n_prompts], without log-probabilities */
    int32_t *tokens;                           /* theirs */
    int64_t done;
} asking;

static size_t own_row(size_t i) { return i * (size_t)launch_world() + (size_t)launch_rank(); }

static void add_to_mix(const run *r, float *mix, const char *adapter, size_t parts) {
    int32_t at = psoup_model_find_adapter(r->m.model, adapter);
    if (at >= 0)
        mix[at] = 1.0f / (float)parts;
}

/* The weights of the user's policies (Jang et al. 2023, equation 5: equal in the paper's experiments). */
static void fill_mix(const run *r, const run_user *u, float *mix) {
    char name[RUN_MEMBERS + 8];
    snprintf(name, sizeof name, "soup %s", u->name);
    if (r->method->scope == RUN_GENERAL || r->method->scope == RUN_ALL)
        add_to_mix(r, mix, r->policies[0].name, 1);
    else if (r->method->scope == RUN_EACH && r->c.soup == RUN_FACTORS)
        add_to_mix(r, mix, name, 1);
    else if (r->method->scope == RUN_EACH)
        for (size_t k = 0; k < r->user_size; k++)
            add_to_mix(r, mix, policy_of(r, u->members[k]), r->user_size);
}

static psoup_status ask(asking *a, psoup_error *error) {
    run *r = a->r;
    size_t adapters = (size_t)psoup_model_adapters(r->m.model);
    psoup_model_config model = PSOUP_MODEL_CONFIG_INIT;
    psoup_status status = psoup_model_get_config(r->m.model, &model, error);
    a->prompts = calloc(a->n_askers * a->n_prompts + 1, sizeof *a->prompts);
    a->mixes = calloc(a->n_askers * adapters + 1, sizeof *a->mixes);
    if (!a->prompts || !a->mixes)
        return no_memory(error);
    for (size_t u = 0; status == PSOUP_OK && u < a->n_askers; u++) {
        float *mix = a->mixes + u * adapters;
        const char *wishes = r->method->asks && r->c.evaluate_with_preference ? r->users[u].wishes : NULL;
        fill_mix(r, &r->users[u], mix);
        for (size_t i = 0; status == PSOUP_OK && i < a->n_prompts; i++) {
            const char *instruction, *input;
            psoup_prompt *p = &a->prompts[u * a->n_prompts + i];
            p->mix = mix;
            p->sequence = u * a->n_prompts + i;
            status = run_prompt_texts(&r->evaluation, i, &instruction, &input, error);
            if (status == PSOUP_OK)
                status = run_encode(r, instruction, input, wishes, &p->tokens, &p->n, error);
            if (status == PSOUP_OK && p->n >= (size_t)model.max_position_embeddings)
                status = cli_error(error, PSOUP_ERROR_ARGUMENT,
                                   "%s: row %zu is a prompt of %zu tokens%s%s; the model holds %d, prompt and response "
                                   "together", r->evaluation.path, i + 1, p->n, wishes ? " for user " : "",
                                   wishes ? r->users[u].name : "", model.max_position_embeddings);
        }
    }
    for (size_t i = 0; i < a->n_own; i++)
        a->prompts[i] = a->prompts[own_row(i)];
    return status;
}

static int on_token(void *user, int64_t id, int32_t token, float logprob, psoup_finish finish) {
    asking *a = user;
    (void)id, (void)token, (void)logprob;
    psoup_comm *comm = a->r->comm;
    psoup_error lost;
    if (finish != PSOUP_FINISH_NONE && !a->r->quiet && launch_rank() == 0)
        cli_progress(NULL, "responses", ++a->done, (int64_t)a->n_own);
    if (finish != PSOUP_FINISH_NONE && comm && comm->failed(comm->user, &lost) != PSOUP_OK)
        return 1;
    return cli_asked_to_stop();
}

/* The answers of this rank. */
static psoup_status answer(asking *a, const psoup_sampling *sampling, const psoup_session_options *session,
                           psoup_generation **g, psoup_error *error) {
    psoup_comm *comm = a->r->comm;
    psoup_error lost;
    psoup_status status = PSOUP_OK;
    if (a->n_own)
        status = psoup_generate(a->r->m.model, a->prompts, a->n_own, sampling, session, on_token, a, g, error);
    cli_progress_end();
    if (status == PSOUP_ERROR_CANCELLED && comm && comm->failed(comm->user, &lost) != PSOUP_OK) {
        *error = lost;
        return lost.status;
    }
    return status;
}

static psoup_status add_up(const asking *a, double *x, size_t n, psoup_error *error) {
    psoup_comm *comm = a->r->comm;
    return comm ? comm->sum(comm->user, x, n, PSOUP_F64, error) : PSOUP_OK;
}

/* The answers of all: sums in which a rank has zeros for the others'. */
static psoup_status gather(asking *a, const psoup_generation *g, psoup_error *error) {
    double *sizes = calloc(2 * a->n_rows + 1, sizeof *sizes), *tokens = NULL; /* length, finish */
    size_t total = 0, at = 0;
    a->answers = calloc(a->n_rows + 1, sizeof *a->answers);
    psoup_status status = sizes && a->answers ? PSOUP_OK : no_memory(error);
    for (size_t i = 0; status == PSOUP_OK && i < a->n_own; i++) {
        const psoup_completion *c = psoup_generation_get(g, i);
        a->answers[own_row(i)].tokens = c->tokens;
        sizes[2 * own_row(i)] = (double)c->n;
        sizes[2 * own_row(i) + 1] = c->finish;
    }
    if (status == PSOUP_OK)
        status = add_up(a, sizes, 2 * a->n_rows, error);
    for (size_t i = 0; status == PSOUP_OK && i < a->n_rows; i++)
        total += a->answers[i].n = (size_t)sizes[2 * i];
    if (status == PSOUP_OK) {
        tokens = calloc(total + 1, sizeof *tokens);
        a->tokens = calloc(total + 1, sizeof *a->tokens);
        status = tokens && a->tokens ? PSOUP_OK : no_memory(error);
    }
    for (size_t i = 0; status == PSOUP_OK && i < a->n_rows; i++) {
        psoup_completion *c = &a->answers[i];
        for (size_t t = 0; c->tokens && t < c->n; t++)
            tokens[at + t] = c->tokens[t];
        c->finish = (psoup_finish)sizes[2 * i + 1];
        c->tokens = a->tokens + at;
        at += c->n;
    }
    if (status == PSOUP_OK)
        status = add_up(a, tokens, total, error);
    for (size_t t = 0; status == PSOUP_OK && t < total; t++)
        a->tokens[t] = (int32_t)tokens[t];
    free(sizes);
    free(tokens);
    return launch_tell(a->r->comm, status, error);
}

/* {"prompt", "user", "preferences", "instruction", "input"?, "completion", "finish", "tokens"} */
static psoup_json *response_row(const asking *a, const run_user *u, size_t i, const psoup_completion *c,
                                psoup_error *error) {
    static const char *const finishes[] = {"none", "stop", "length", "error"};
    const run *r = a->r;
    const psoup_json *from = psoup_json_at(r->evaluation.rows, i), *id = psoup_json_get(from, "id");
    const char *instruction, *input;
    char *text = NULL, *clean = NULL;
    size_t length;
    if (run_prompt_texts(&r->evaluation, i, &instruction, &input, error) != PSOUP_OK)
        return NULL;
    if (cli_decode(r->m.tokenizer, c->tokens, c->n, &text, &length, error) == PSOUP_OK &&
        !(clean = cli_utf8(text, length)))
        no_memory(error);
    free(text);
    if (!clean)
        return NULL;
    psoup_json *row = psoup_json_new_object(), *members = psoup_json_new_array();
    for (size_t k = 0; k < r->user_size; k++)
        psoup_json_append(members, psoup_json_new_string(policy_of(r, u->members[k])));
    psoup_json_set(row, "prompt", id ? psoup_json_copy(id) : psoup_json_new_integer((int64_t)i));
    psoup_json_set(row, "user", psoup_json_new_string(u->name));
    psoup_json_set(row, "preferences", members);
    psoup_json_set(row, "instruction", psoup_json_new_string(instruction));
    if (input)
        psoup_json_set(row, "input", psoup_json_new_string(input));
    psoup_json_set(row, "completion", psoup_json_new_string(clean));
    psoup_json_set(row, "finish", psoup_json_new_string(finishes[c->finish]));
    psoup_json_set(row, "tokens", psoup_json_new_integer((int64_t)c->n));
    free(clean);
    return row;
}

static psoup_status write_responses(const asking *a, size_t u, psoup_error *error) {
    const run *r = a->r;
    char name[RUN_MEMBERS + 8];
    snprintf(name, sizeof name, "%s.jsonl", r->users[u].name);
    char *path = run_path(r, "responses", name);
    psoup_jsonl_writer *writer = NULL;
    psoup_status status = path ? psoup_jsonl_create(r->m.context, path, 0, &writer, error) : no_memory(error);
    for (size_t i = 0; status == PSOUP_OK && i < a->n_prompts; i++) {
        size_t at = (a->n_askers == 1 ? 0 : u) * a->n_prompts + i;
        psoup_json *row = response_row(a, &r->users[u], i, &a->answers[at], error);
        status = row ? psoup_jsonl_write(writer, row, error) : error->status;
        psoup_json_free(row);
    }
    if (status == PSOUP_OK)
        status = psoup_jsonl_close(writer, error);
    psoup_jsonl_writer_free(writer);
    free(path);
    return status;
}

static asking asking_of(run *r) {
    asking a = {.r = r, .n_prompts = psoup_json_size(r->evaluation.rows), .n_askers = r->method->asks ? r->n_users : 1};
    a.n_rows = a.n_askers * a.n_prompts;
    while (own_row(a.n_own) < a.n_rows)
        a.n_own++;
    return a;
}

static void asking_free(asking *a) {
    free(a->prompts);
    free(a->mixes);
    free(a->answers);
    free(a->tokens);
}

static void sampling_of(const run *r, psoup_sampling *sampling, psoup_session_options *session) {
    sampling_config_to(&r->c.generate, sampling);
    sampling->seed = r->c.seed;
    session->max_sequences = r->c.generate.max_sequences;
}

/* With soups by factors there will be an adapter more for each user. */
psoup_status run_responses_memory(run *r, psoup_memory *out, psoup_error *error) {
    asking a = asking_of(r);
    psoup_sampling sampling = PSOUP_SAMPLING_INIT;
    psoup_session_options session = PSOUP_SESSION_OPTIONS_INIT;
    const float *data;
    size_t count = 0;
    sampling_of(r, &sampling, &session);
    psoup_status status = ask(&a, error);
    if (status == PSOUP_OK)
        status = psoup_generate_memory(r->m.model, a.prompts, a.n_own ? a.n_own : 1, &sampling, &session, out, error);
    if (status == PSOUP_OK && r->method->scope == RUN_EACH && r->c.soup == RUN_FACTORS) {
        status = psoup_model_adapter_data(r->m.model, r->policies[0].name, &data, &count, error);
        int64_t more = (int64_t)(r->n_users * count * sizeof *data);
        out->adapters += more;
        *(out->device ? &out->device : &out->host) += more;
    }
    asking_free(&a);
    return status;
}

psoup_status run_respond(run *r, psoup_error *error) {
    asking a = asking_of(r);
    psoup_sampling sampling = PSOUP_SAMPLING_INIT;
    psoup_session_options session = PSOUP_SESSION_OPTIONS_INIT;
    psoup_generation *g = NULL;
    char *directory = join(r->c.output, "responses");
    psoup_status status = directory ? PSOUP_OK : no_memory(error);
    sampling_of(r, &sampling, &session);
    if (status == PSOUP_OK && launch_rank() == 0)
        status = run_make_directory(directory, error);
    if (status == PSOUP_OK)
        status = ask(&a, error);
    status = launch_agree(r->comm, status, error);
    if (status == PSOUP_OK)
        run_say(r, "responses: %zu prompts, %zu users", a.n_prompts, r->n_users);
    if (status == PSOUP_OK)
        status = launch_agree(r->comm, answer(&a, &sampling, &session, &g, error), error);
    if (status == PSOUP_OK)
        status = gather(&a, g, error);
    for (size_t i = 0; status == PSOUP_OK && i < a.n_rows; i++)
        if (a.answers[i].finish == PSOUP_FINISH_ERROR)
            status = cli_error(error, PSOUP_ERROR_STATE,
                               "%s: row %zu, user %s: the logits are not numbers: a weight or an adapter diverged",
                               r->evaluation.path, i % a.n_prompts + 1, r->users[i / a.n_prompts].name);
    for (size_t u = 0; status == PSOUP_OK && launch_rank() == 0 && u < r->n_users; u++)
        status = write_responses(&a, u, error);
    psoup_generation_free(g);
    asking_free(&a);
    free(directory);
    return status;
}
