/* psoup run: a method of the paper end to end, from one configuration file. */
#include "launch.h"
#include "run.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Jang et al. 2023, section 3.1 and 2.2. */
static const run_method methods[] = {
    {"vb", "the base, without preference prompts", RUN_NOBODY, false, false},
    {"pp", "the base, told the user's three preferences", RUN_NOBODY, false, true},
    {"rlhf", "one policy of general preference, by PPO", RUN_GENERAL, false, false},
    {"mt", "one policy, supervised on the better positives of all preferences", RUN_ALL, true, true},
    {"pmorl", "one policy by PPO over all users, its reward the mean of their three", RUN_ALL, false, true},
    {"psoups", "a policy by PPO for each preference, side by side; soups of three", RUN_EACH, false, true},
};

#define FIELD(type, member, help)                                                                  \
    { #member, type, offsetof(run_config, member), NULL, help }
#define CHOICE(member, choices, help)                                                              \
    { #member, PSOUP_FIELD_ENUM, offsetof(run_config, member), choices, help }
static const psoup_field run_fields[] = {
    FIELD(PSOUP_FIELD_STRING, model, "Model directory; required."),
    FIELD(PSOUP_FIELD_STRING, tokenizer, "tokenizer.json; null: the model's own."),
    FIELD(PSOUP_FIELD_STRING, output, "Directory of the run, a new one; required."),
    FIELD(PSOUP_FIELD_JSON, prompts,
          "Training prompts, rows of instruction (or prompt), input: a file, or {\"POLICY\": FILE, …}; rlhf, pmorl, "
          "psoups."),
    FIELD(PSOUP_FIELD_STRING, validation, "The same, held out: the weights of the best mean reward on them stay."),
    FIELD(PSOUP_FIELD_STRING, evaluation, "The same: every user's responses to them are written; vb and pp need it."),
    FIELD(PSOUP_FIELD_JSON, reward_data,
          "Comparisons, rows of user_input, completion_a (better), completion_b, preference: a file, or "
          "{\"SYMBOL\": FILE, …, \"general\": FILE}, whose rows need no preference."),
    FIELD(PSOUP_FIELD_JSON, rewards,
          "Reward models trained before, instead: a directory with one below it for each, or {\"SYMBOL\" | "
          "\"told\" | \"general\": DIR, …}."),
    CHOICE(reward_form, "method|each|told",
           "A reward model for each preference, or one that is told by the preference prompt; method: each for "
           "psoups, told for pmorl."),
    CHOICE(user_input, "auto|instruction|prompt",
           "What user_input is: an instruction, which the template is put around, or a filled template. auto: a "
           "filled template in rows that have an instruction beside it, as psoup feedback writes them."),
    FIELD(PSOUP_FIELD_STRING, examples,
          "mt: rows of instruction, input, output, preference; or comparisons of kinds, whose better positives are "
          "taken; null: reward_data, where it is a file."),
    FIELD(PSOUP_FIELD_FLOAT, held_out, "How much of reward_data and examples validates, by prompt."),
    FIELD(PSOUP_FIELD_STRING, preferences, "Catalogue file; null: the paper's."),
    FIELD(PSOUP_FIELD_BOOL, new_preferences, "With the paper's catalogue: P3C and P3D too, which makes 16 users."),
    FIELD(PSOUP_FIELD_BOOL, train_with_preference,
          "psoups: whether a policy's prompts, and bare comparisons, carry its preference's prompt."),
    FIELD(PSOUP_FIELD_BOOL, evaluate_with_preference,
          "Whether evaluation prompts carry the user's preference prompts."),
    FIELD(PSOUP_FIELD_STRING, template, "tulu, alpaca, or a text with {instruction}."),
    FIELD(PSOUP_FIELD_INT, max_prompt_tokens, "Training and validation prompts this long are left out; 0: none."),
    CHOICE(soup, "delta|factors",
           "psoups: the weighted sum of the policies' changes, mixed row by row; or the A's and B's averaged apart, as "
           "the paper's code does."),
    FIELD(PSOUP_FIELD_BOOL, save_soups,
          "psoups: whether each user's soup is written as an adapter; factors always are."),
    FIELD(PSOUP_FIELD_UINT64, seed, "Policy k samples under seed + k; the rest under seed."),
    FIELD(PSOUP_FIELD_BOOL, resume, "Whether to go on with the run in output, skipping what is finished."),
    FIELD(PSOUP_FIELD_STRING, device, "\"cpu\", \"cuda\" or \"cuda:N\"; null: the CPU."),
    FIELD(PSOUP_FIELD_STRING, dtype,
          "The base in f32, f16 or bf16, or its linears in blocks of int8 or nf4; null: as stored."),
    FIELD(PSOUP_FIELD_INT, threads, "0 is one per processor."),
    {0}};
#undef FIELD
#undef CHOICE

static run_config paper_config(void) {
    run_config c = {.held_out = 0.1f,
                    .train_with_preference = 1,
                    .evaluate_with_preference = 1,
                    .max_prompt_tokens = 512,
                    .lora = {.options = PSOUP_ADAPTER_OPTIONS_INIT},
                    .reward_lora = {.options = PSOUP_ADAPTER_OPTIONS_INIT},
                    .ppo = PSOUP_PPO_OPTIONS_INIT,
                    .reward = PSOUP_REWARD_OPTIONS_INIT,
                    .sft = PSOUP_SFT_OPTIONS_INIT,
                    .generate = {.max_new_tokens = 512,
                                 .min_new_tokens = 32,
                                 .temperature = 1.0f,
                                 .top_p = 1.0f,
                                 .no_repeat_ngram_size = 3}};
    c.reward_lora.options.rank = 8; /* the paper's reward models */
    c.ppo.validate_every = 10;
    c.sft.weight_decay = 0.05f;
    return c;
}

/* The settings of the paper's released code: see docs/fidelity.md. */
static psoup_status set_preset(const char *name, run_config *c, psoup_error *error) {
    psoup_status status = psoup_ppo_preset(name, &c->ppo, error);
    if (status != PSOUP_OK || strcmp(name, "rlphf") != 0)
        return status;
    c->reward.lora_dropout = 0.1f;
    c->reward.max_grad_norm = 1.0f;
    c->sft.lora_dropout = 0.05f;
    c->sft.loss_on_prompt = 1;
    c->sft.accumulation = 64; /* 16 packed rows on each of 4 devices */
    c->sft.max_steps = 1000;
    c->soup = RUN_FACTORS;
    return PSOUP_OK;
}

/* ---- what a method needs --------------------------------------------------------------------------- */

static psoup_status add_reward(run *r, const char *name, psoup_error *error) {
    run_reward *w = &r->rewards[r->n_rewards];
    const psoup_json *given = r->c.rewards;
    size_t length = strlen(name) + sizeof "reward ";
    w->name = name;
    w->adapter = malloc(length);
    w->own = run_path(r, "rewards", name);
    r->n_rewards++;
    if (!w->adapter || !w->own)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    snprintf(w->adapter, length, "reward %s", name);
    if (psoup_json_kind(given) == PSOUP_JSON_NULL)
        return PSOUP_OK;
    if (psoup_json_kind(given) == PSOUP_JSON_STRING) {
        free(w->own);
        w->directory = w->own = join(psoup_json_string(given, ""), name);
        return w->own ? PSOUP_OK : cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    }
    w->directory = run_file_of(given, name);
    return w->directory ? PSOUP_OK
                        : cli_error(error, PSOUP_ERROR_ARGUMENT,
                                    "%s: rewards: expected a directory, or {\"%s\": DIR, …}", r->config_path, name);
}

static psoup_status choose_rewards(run *r, psoup_error *error) {
    const run_config *c = &r->c;
    psoup_status status = PSOUP_OK;
    if (r->method->scope == RUN_NOBODY || r->method->supervised)
        return PSOUP_OK;
    if (psoup_json_kind(c->rewards) == PSOUP_JSON_NULL && psoup_json_kind(c->reward_data) == PSOUP_JSON_NULL)
        return cli_error(error, PSOUP_ERROR_ARGUMENT,
                         "%s: %s needs reward models: expected \"rewards\", trained before, or \"reward_data\", "
                         "comparisons to train them on", r->config_path, r->method->name);
    r->told = r->method->scope == RUN_ALL ? c->reward_form != RUN_FORM_EACH
                                          : r->method->scope == RUN_EACH && c->reward_form == RUN_FORM_TOLD;
    if (r->method->scope == RUN_GENERAL)
        return add_reward(r, "general", error);
    if (r->told)
        return add_reward(r, "told", error);
    for (size_t k = 0; status == PSOUP_OK && k < r->n_preferences; k++)
        status = add_reward(r, psoup_preferences_get(r->preferences, k)->symbol, error);
    return status;
}

static psoup_status choose_policies(run *r, psoup_error *error) {
    if (r->method->scope == RUN_GENERAL || r->method->scope == RUN_ALL)
        r->policies[r->n_policies++] = (run_policy){.name = r->method->name, .preference = -1};
    for (size_t k = 0; r->method->scope == RUN_EACH && k < r->n_preferences; k++) {
        const char *symbol = psoup_preferences_get(r->preferences, k)->symbol;
        if (!*symbol || strchr(symbol, '/') || symbol[0] == '.')
            return cli_error(error, PSOUP_ERROR_ARGUMENT, "preference \"%s\" cannot name a directory", symbol);
        r->policies[r->n_policies++] = (run_policy){.name = symbol, .preference = (int32_t)k};
    }
    return PSOUP_OK;
}

static psoup_status check_config(run *r, psoup_error *error) {
    run_config *c = &r->c;
    if (!c->output)
        return cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: expected \"output\"", r->config_path);
    if (r->method->scope == RUN_NOBODY && !c->evaluation)
        return cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: %s trains nothing: expected \"evaluation\"", r->config_path,
                         r->method->name);
    if (r->method->supervised && !c->examples)
        c->examples = psoup_json_string(c->reward_data, NULL);
    if (r->method->supervised && !c->examples)
        return cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: %s needs \"examples\", or a file of \"reward_data\"",
                         r->config_path, r->method->name);
    if (!(c->held_out >= 0 && c->held_out < 1))
        return cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: held_out is %g, expected 0 to under 1", r->config_path,
                         (double)c->held_out);
    if (c->max_prompt_tokens < 0)
        return cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: max_prompt_tokens is %d, expected 0 or more", r->config_path,
                         c->max_prompt_tokens);
    psoup_status status = run_check_output(c->output, r->config_path, r->plan, error);
    if (status == PSOUP_OK)
        status = adapter_config_finish(&c->lora, r->config_path, error);
    return status == PSOUP_OK ? adapter_config_finish(&c->reward_lora, r->config_path, error) : status;
}

/* ---- the run --------------------------------------------------------------------------------------- */

enum { PLACES = 5 };

/* Where the trainers keep themselves, their metrics, and whom they tell. */
static psoup_status set_places(run *r, char *paths[PLACES], psoup_error *error) {
    run_config *c = &r->c;
    static const char *const names[] = {"checkpoints/rewards", "checkpoints/policies", "metrics-rewards.jsonl",
                                        "metrics-policies.jsonl", "samples.jsonl"};
    for (int i = 0; i < PLACES; i++)
        if (!(paths[i] = join(c->output, names[i])))
            return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    c->reward.checkpoint_dir = paths[0];
    c->ppo.checkpoint_dir = c->sft.checkpoint_dir = paths[1];
    c->reward.metrics = paths[2];
    c->ppo.metrics = c->sft.metrics = paths[3];
    c->ppo.samples = c->ppo.samples_every > 0 ? paths[4] : NULL;
    c->reward.resume = c->ppo.resume = c->sft.resume = c->resume;
    c->reward.seed = c->sft.seed = c->seed;
    c->reward.on_step = c->ppo.on_step = c->sft.on_step = cli_training_step;
    c->reward.user = c->ppo.user = c->sft.user = &r->training;
    c->ppo.tokenizer = r->m.tokenizer;
    c->reward.comm = c->ppo.comm = c->sft.comm = r->comm;
    return PSOUP_OK;
}

typedef psoup_status (*stage_fn)(run *r, psoup_error *error);

static psoup_status stage(run *r, run_book *book, const char *name, stage_fn fn, psoup_error *error) {
    if (run_finished(book, name)) {
        run_say(r, "%s: finished before", name);
        return PSOUP_OK;
    }
    psoup_error lost, whole;
    psoup_status status = fn(r, error);
    if (status == PSOUP_OK && launch_rank() == 0)
        status = run_finish(r, book, name, error);
    status = launch_agree(r->comm, status, error);
    if (status == PSOUP_ERROR_IO && r->comm && r->comm->failed(r->comm->user, &lost) != PSOUP_OK) {
        whole = *error;
        cli_error(error, status, "%.900s; the same command with --resume goes on", whole.message);
    }
    return status;
}

/* Reads all that the stages need and adds their adapters, so that what is wrong is known before anything is trained. */
static psoup_status prepare(run *r, const run_book *book, bool trains_rewards, psoup_error *error) {
    bool trained = run_finished(book, "policies");
    psoup_status status = run_read_prompts(r, error);
    if (status == PSOUP_OK && r->method->supervised && !trained)
        status = run_read_examples(r, error);
    if (status == PSOUP_OK && trains_rewards && !run_finished(book, "rewards"))
        status = run_read_comparisons(r, error);
    if (status == PSOUP_OK && !trained)
        status = run_add_rewards(r, run_finished(book, "rewards"), error);
    return status == PSOUP_OK ? run_add_policies(r, trained, error) : status;
}

/* What the stages that are still to come will take. */
static psoup_status plan(run *r, const run_book *book, bool trains_rewards, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    if (trains_rewards && !run_finished(book, "rewards") && !run_finished(book, "policies"))
        status = run_plan_stage(r, "rewards", error);
    if (status == PSOUP_OK && r->n_policies && !run_finished(book, "policies"))
        status = run_plan_stage(r, "policies", error);
    if (status == PSOUP_OK && r->c.evaluation && !run_finished(book, "responses"))
        status = run_plan_stage(r, "responses", error);
    return status;
}

/* The directories that the run will fill, and the configuration as it was used. */
static psoup_status begin(const run *r, const run_book *book, char *const paths[PLACES], bool trains_rewards,
                          psoup_error *error) {
    psoup_status status = run_make_directory(r->c.output, error);
    if (status == PSOUP_OK && access(book->config_path, F_OK) != 0)
        status = psoup_json_write(r->m.context, book->config_path, book->config, error);
    for (int i = 0; i < 2 && status == PSOUP_OK && r->n_policies; i++)
        if (i || trains_rewards)
            status = run_make_directory(paths[i], error);
    return status;
}

static psoup_status go(run *r, run_book *book, psoup_error *error) {
    const run_config *c = &r->c;
    char *paths[PLACES] = {NULL};
    bool soups = r->method->scope == RUN_EACH && (c->save_soups || c->soup == RUN_FACTORS);
    bool trains_rewards = r->n_rewards && !r->rewards[0].directory;
    psoup_status status = run_open_book(r, book, error);
    if (status == PSOUP_OK)
        status = set_places(r, paths, error);
    if (status == PSOUP_OK)
        status = prepare(r, book, trains_rewards, error);
    if (status == PSOUP_OK)
        status = plan(r, book, trains_rewards, error);
    status = launch_agree(r->comm, status, error);
    if (status != PSOUP_OK || r->plan->only)
        goto done;
    if (launch_rank() == 0)
        status = begin(r, book, paths, trains_rewards, error);
    status = launch_agree(r->comm, status, error);
    if (status == PSOUP_OK && trains_rewards)
        status = stage(r, book, "rewards", run_train_rewards, error);
    if (status == PSOUP_OK && r->n_policies)
        status = stage(r, book, "policies", run_train_policies, error);
    if (status == PSOUP_OK && soups)
        status = stage(r, book, "soups", run_make_soups, error);
    if (status == PSOUP_OK && soups && c->soup == RUN_FACTORS && c->evaluation && !run_finished(book, "responses"))
        status = launch_agree(r->comm, run_load_soups(r, error), error);
    if (status == PSOUP_OK && c->evaluation)
        status = stage(r, book, "responses", run_respond, error);
done:
    for (int i = 0; i < PLACES; i++)
        free(paths[i]);
    return status;
}

/* The other ranks, before anything can go wrong in one of them alone. */
static psoup_status meet(run *r, psoup_error *error) {
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    options.threads = 1;
    options.log = cli_log;
    psoup_status status = launch_look(error);
    if (status == PSOUP_OK && launch_world() > 1)
        status = psoup_context_create(&options, &r->meeting, error);
    return status == PSOUP_OK && r->meeting ? launch_connect(r->meeting, &r->comm, error) : status;
}

static psoup_status open_model(run *r, psoup_error *error) {
    const run_config *c = &r->c;
    char own[LAUNCH_DEVICE];
    psoup_status status = run_open(c->model, c->tokenizer, launch_device(c->device, own), c->dtype,
                                   launch_threads(c->threads), &r->m, error);
    r->m.comm = status == PSOUP_OK ? r->comm : NULL;
    return status;
}

static psoup_status start(run *r, run_book *book, psoup_error *error) {
    const run_config *c = &r->c;
    psoup_status status = check_config(r, error);
    if (status == PSOUP_OK)
        status = open_model(r, error);
    if (status == PSOUP_OK)
        status = run_read_preferences(r, error);
    if (status == PSOUP_OK)
        status = choose_rewards(r, error);
    if (status == PSOUP_OK)
        status = choose_policies(r, error);
    if (status == PSOUP_OK && c->validation && c->evaluation && !strcmp(c->validation, c->evaluation))
        run_say(r, "warning: the checkpoint is chosen on the prompts that are reported: %s", c->evaluation);
    status = launch_agree(r->comm, status, error);
    if (status == PSOUP_OK && r->comm && c->device && !strncmp(c->device, "cuda", 4)) {
        status = launch_join_gpus(&r->m, error);
        r->comm = r->m.comm;
    }
    return status == PSOUP_OK ? go(r, book, error) : status;
}

static void run_close(run *r) {
    for (size_t i = 0; i < r->n_rewards; i++) {
        psoup_reward_free(r->handles[i]);
        free(r->rewards[i].adapter);
        free(r->rewards[i].own);
    }
    run_free_data(r);
    if (!r->m.comm)
        psoup_comm_free(r->comm);
    cli_close(&r->m);
    psoup_context_free(r->meeting);
}

/* ---- the command ----------------------------------------------------------------------------------- */

static const char about[] =
    "Usage: psoup run METHOD [--preset default|rlphf] --config FILE.json\n\n"
    "A method of the paper (Jang et al. 2023) end to end: reward models, policies, soups, and every\n"
    "user's responses to the evaluation prompts. METHOD is\n"
    "  vb      the base, without preference prompts\n"
    "  pp      the base, told the user's three preferences\n"
    "  rlhf    one policy of general preference, by PPO\n"
    "  mt      one policy, supervised on the better positives of all preferences\n"
    "  pmorl   one policy by PPO over all users; its reward is the mean of their three\n"
    "  psoups  a policy by PPO for each preference, side by side; soups of three for each user\n\n"
    "The output directory receives rewards/NAME, policies/NAME and soups/USER (PEFT), responses/USER.jsonl,\n"
    "metrics-*.jsonl, checkpoints/, and config.json, the configuration as it was used. Defaults are the\n"
    "paper's, and sizes are: a small model on a small machine wants smaller batches and fewer tokens.\n"
    "--preset rlphf sets the released code's settings before the file's own (docs/fidelity.md).\n"
    "An output that has a run is refused, unless --resume goes on with it.\n\n"
    "Before it begins it says what each stage will take of memory, and ends where there is less: in the\n"
    "GPU, in the machine or its control group, or than --memory-limit says. --plan says it and stops.\n\n"
    "Rows: an array of objects or JSON Lines, as in the released alpaca_gpt4_10k.json (instruction, input),\n"
    "koala_eval_50.json (prompt), and reward rows (user_input, completion_a, completion_b).\n"
    LAUNCH_HELP;

enum { MOST_FIELDS = 128 };

/* A trainer's fields without those that the run sets. */
static const psoup_field *without_places(const psoup_field *from, psoup_field *to) {
    static const char *const ours[] = {"metrics", "samples", "checkpoint_dir", "resume", "seed"};
    size_t n = 0;
    for (; from->name && n + 1 < MOST_FIELDS; from++) {
        bool kept = true;
        for (size_t i = 0; i < sizeof ours / sizeof *ours; i++)
            kept = kept && strcmp(from->name, ours[i]) != 0;
        if (kept)
            to[n++] = *from;
    }
    to[n] = (psoup_field){0};
    return to;
}

static int run_command(run *r, int argc, char **argv) {
    static psoup_field trainers[3][MOST_FIELDS];
    const config_section sections[] = {
        {"Files and form", run_fields, &r->c},
        {"New adapters of policies", adapter_fields, &r->c.lora},
        {"New adapters of reward models", adapter_fields, &r->c.reward_lora},
        {"PPO", without_places(psoup_ppo_fields(), trainers[0]), &r->c.ppo},
        {"Reward models", without_places(psoup_reward_fields(), trainers[1]), &r->c.reward},
        {"Supervised training, of mt", without_places(psoup_sft_fields(), trainers[2]), &r->c.sft},
        {"Responses", sampling_fields, &r->c.generate}};
    static const char *const keys[] = {NULL, "adapter", "reward_adapter", "ppo", "reward", "sft", "generate"};
    enum { N = sizeof sections / sizeof *sections };
    run_book book = {0};
    psoup_error error = {0}, apart;
    config c;
    int status;
    if (!config_read_parts(argc, argv, about, sections, keys, N, &c, &status, &error) && error.status == PSOUP_OK)
        return status;
    psoup_status done = error.status, met = meet(r, &apart);
    if (done == PSOUP_OK && met != PSOUP_OK) {
        error = apart;
        done = met;
    }
    done = launch_agree(r->comm, done, &error);
    r->config_path = c.path;
    r->plan = &c.plan;
    r->quiet = r->training.quiet = c.json;
    made_place output = {0};
    if (done == PSOUP_OK) {
        book.config = config_values(sections, keys, N);
        cli_training_begin(r->c.output);
        done = place_note(&output, r->c.output, &error);
    }
    if (done == PSOUP_OK)
        done = start(r, &book, &error);
    done = launch_finish(r->comm, done, &error);
    status = done != PSOUP_OK ? config_fail(&c, &error)
             : c.plan.only    ? 0
                              : run_print_output(r->c.output, c.json);
    place_leave(&output);
    run_close_book(&book);
    run_close(r);
    config_free(&c);
    return status;
}

/* The value of an option at argv[*i], "--name VALUE" or "--name=VALUE"; NULL where that is another. */
static const char *option_value(int argc, char **argv, int *i, const char *name) {
    size_t length = strlen(name);
    if (!strncmp(argv[*i], name, length) && argv[*i][length] == '=')
        return argv[*i] + length + 1;
    return !strcmp(argv[*i], name) && *i + 1 < argc ? argv[++*i] : NULL;
}

static const run_method *method_named(const char *name) {
    for (size_t k = 0; k < sizeof methods / sizeof *methods; k++)
        if (!strcmp(name, methods[k].name))
            return &methods[k];
    return NULL;
}

/* Takes what is read before the file out of argv: the method and the preset. Returns 0, or an exit status. */
static int read_arguments(run *r, int *argc, char **argv) {
    psoup_error error = {0};
    int kept = 1;
    for (int i = 1; i < *argc; i++) {
        const char *preset = option_value(*argc, argv, &i, "--preset");
        if (preset && set_preset(preset, &r->c, &error) != PSOUP_OK)
            return cli_complain("%s", error.message);
        if (preset)
            continue;
        if (!r->method && method_named(argv[i]))
            r->method = method_named(argv[i]);
        else {
            argv[kept++] = argv[i];
            if ((!strcmp(argv[i], "--config") || !strcmp(argv[i], "--memory-limit")) && i + 1 < *argc)
                argv[kept++] = argv[++i];
        }
    }
    *argc = kept;
    if (r->method || (kept > 1 && (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h"))))
        return 0;
    return cli_complain("run: expected a method, vb, pp, rlhf, mt, pmorl or psoups%s%s%s", kept > 1 ? ", not \"" : "",
                        kept > 1 ? argv[1] : "", kept > 1 ? "\"" : "");
}

int cmd_run(int argc, char **argv) {
    run *r = calloc(1, sizeof *r);
    if (!r)
        return cli_complain("out of memory"), 1;
    r->c = paper_config();
    int status = read_arguments(r, &argc, argv);
    if (status == 0)
        status = run_command(r, argc, argv);
    free(r);
    return status;
}
