/* psoup ppo: policies from reward models, side by side on one base. */
#include "launch.h"
#include "ppo_policies.h"

#include <stdlib.h>
#include <string.h>

#define FIELD(type, member, help)                                                                  \
    { #member, type, offsetof(ppo_run, member), NULL, help }
static const psoup_field ppo_run_fields[] = {
    FIELD(PSOUP_FIELD_STRING, model, "Model directory; required."),
    FIELD(PSOUP_FIELD_STRING, tokenizer, "tokenizer.json; null: the model's own."),
    FIELD(PSOUP_FIELD_STRING, prompts, "JSON Lines of instruction (or prompt), input; required."),
    FIELD(PSOUP_FIELD_STRING, validation, "The same, held out, for the best checkpoint."),
    FIELD(
        PSOUP_FIELD_JSON, policies,
        "[{\"name\", \"reward\": DIR, \"preference\": SYMBOL | \"all\" | null, \"init\": DIR, \"seed\"}, …]; "
        "required. init: the PEFT directory it starts from, with its rank, alpha and targets. Or a soup, "
        "{\"name\", \"soup\": [{\"name\", \"reward\", \"preference\", \"init\"}, …], \"concentration\": 1, "
        "\"seed\"}. Several rewards of one policy, or of one adapter of a soup, instead of \"reward\": \"rewards\": "
        "{\"NAME\": DIR, \"OTHER\": {\"reward\": DIR, \"weight\": W}, …}."),
    FIELD(PSOUP_FIELD_STRING, preferences, "Catalogue file; null: the paper's."),
    FIELD(PSOUP_FIELD_BOOL, new_preferences, "With the paper's catalogue: P3C and P3D too."),
    FIELD(PSOUP_FIELD_STRING, template, "tulu, alpaca, or a text with {instruction}."),
    FIELD(PSOUP_FIELD_STRING, output, "Directory; each policy goes to output/NAME, a soup's adapters to "
                                       "output/NAME/ADAPTER; required."),
    FIELD(PSOUP_FIELD_UINT64, seed, "Policy k samples under seed + k, unless it has its own."),
    FIELD(PSOUP_FIELD_STRING, device, "\"cpu\", \"cuda\" or \"cuda:N\"; null: the CPU."),
    FIELD(PSOUP_FIELD_STRING, dtype,
          "The base in f32, f16 or bf16, or its linears in blocks of int8 or nf4; null: as stored."),
    FIELD(PSOUP_FIELD_INT, threads, "0 is one per processor."),
    {0}};
#undef FIELD

static psoup_status train(ppo_state *s, psoup_error *error) {
    psoup_ppo_policy policies[MAX_POLICIES] = {0};
    psoup_ppo *ppo = NULL;
    for (size_t i = 0; i < s->n; i++)
        policies[i] = ppo_policy(&s->policies[i]);
    s->run->options.tokenizer = s->m.tokenizer;
    s->run->options.comm = s->m.comm;
    psoup_memory memory = {.size = sizeof memory};
    psoup_status status = psoup_ppo_memory(s->m.model, policies, s->n, &s->run->options, &memory, error);
    if (status == PSOUP_OK)
        status = plan_work_fits(s->plan, s->config_path, "", PLAN_PPO, s->m.model, &memory, error);
    if (status != PSOUP_OK || s->plan->only)
        return status;
    status = psoup_ppo_create(s->m.model, policies, s->n, &s->run->options, &ppo, error);
    psoup_status saved = status;
    if (status == PSOUP_OK)
        status = psoup_ppo_run(ppo, error);
    cli_progress_end();
    /* A policy that diverged does not cost the others: they are done, and saved. */
    bool finished = status == PSOUP_OK;
    for (size_t i = 0; ppo && status == PSOUP_ERROR_STATE && i < s->n; i++)
        finished = finished || psoup_ppo_diverged(ppo, i);
    for (size_t i = 0; saved == PSOUP_OK && finished && launch_rank() == 0 && i < s->n; i++) {
        psoup_error trouble;
        if (!psoup_ppo_diverged(ppo, i))
            saved = ppo_save(s, &s->policies[i], &trouble);
        if (saved != PSOUP_OK) {
            *error = trouble;
            status = saved;
        }
    }
    psoup_ppo_free(ppo);
    return status;
}

static psoup_status ppo(ppo_state *s, psoup_error *error) {
    ppo_run *run = s->run;
    psoup_status status = PSOUP_OK;
    if (!run->prompts || !run->output)
        return cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: expected \"prompts\" and \"output\"",
                         s->config_path);
    status = adapter_config_finish(&run->lora, s->config_path, error);
    if (status == PSOUP_OK)
        status = run_open_ranks(run->model, run->tokenizer, run->device, run->dtype, run->threads, &s->m, error);
    if (status == PSOUP_OK)
        status = run_check_output(run->output, s->config_path, s->plan, error);
    if (status == PSOUP_OK)
        status = run->preferences ? psoup_preferences_load(s->m.context, run->preferences,
                                                           &s->preferences, error)
                                  : psoup_preferences_default(s->m.context, run->new_preferences,
                                                              &s->preferences, error);
    if (status == PSOUP_OK)
        status = ppo_read_policies(s, error);
    if (status == PSOUP_OK)
        status = ppo_load_adapters(s, error);
    if (status == PSOUP_OK)
        status = read_rows(s->m.context, run->prompts, &s->rows[0], error);
    if (status == PSOUP_OK)
        status = read_rows(s->m.context, run->validation, &s->rows[1], error);
    for (size_t i = 0; i < s->n; i++)
        for (int part = 0; status == PSOUP_OK && part < 2; part++)
            status = ppo_make_prompts(s, &s->policies[i], part, error);
    if (status == PSOUP_OK)
        status = train(s, error);
    return launch_finish(s->m.comm, status, error);
}

static void ppo_close(ppo_state *s) {
    ppo_free_policies(s);
    psoup_json_free(s->rows[0]);
    psoup_json_free(s->rows[1]);
    pool_free(&s->pool);
    psoup_preferences_free(s->preferences);
    cli_close(&s->m);
}

int cmd_ppo(int argc, char **argv) {
    ppo_run run = {.lora = {.options = PSOUP_ADAPTER_OPTIONS_INIT},
                   .options = PSOUP_PPO_OPTIONS_INIT};
    psoup_error error = {0};
    config c;
    int status, kept = 1;
    /* --preset NAME comes before the file's own values. */
    for (int i = 1; i < argc; i++) {
        const char *name = !strncmp(argv[i], "--preset=", 9)              ? argv[i] + 9
                           : !strcmp(argv[i], "--preset") && i + 1 < argc ? argv[++i]
                                                                          : NULL;
        if (!name)
            argv[kept++] = argv[i];
        else if (psoup_ppo_preset(name, &run.options, &error) != PSOUP_OK)
            return cli_complain("%s", error.message);
    }
    run_directory directory = {0};
    const config_section sections[] = {{"Files", ppo_run_fields, &run},
                                       {"A directory of its own", run_dir_fields, &directory},
                                       {"New adapters", adapter_fields, &run.lora},
                                       {"Training", psoup_ppo_fields(), &run.options}};
    if (!config_read(
            kept, argv,
            "Usage: psoup ppo [--preset default|rlphf] --config FILE.json\n\n"
            "PPO against learned rewards, all policies side by side: one base in memory, one "
            "batch,\n"
            "each policy with its own optimiser, moments, KL coefficient and early stop. A "
            "policy's\n"
            "\"preference\" is added to its prompts and to what its reward model reads: a symbol "
            "for\n"
            "Personalized Soups, \"all\" for P-MORL (every user's prompts; the mean of the reward\n"
            "told by each preference), null for plain RLHF. A \"soup\" is several adapters that learn as\n"
            "one policy, on what they will be used for: each prompt is made for a user for whose every\n"
            "preference there is an adapter, and answered under a mix of those, whose weights are drawn\n"
            "from a Dirichlet distribution (\"concentration\" 1: any; large: near equal; 0: one of them)\n"
            "and weigh the adapters' rewards too. Where no adapter has a preference all are mixed.\n" LAUNCH_HELP,
            sections, 4, &c, &status))
        return status;
    ppo_state *s = calloc(1, sizeof *s);
    cli_training training = {.quiet = c.json};
    if (!s)
        return cli_complain("out of memory"), 1;
    s->run = &run;
    s->config_path = c.path;
    s->plan = &c.plan;
    run.options.on_step = cli_training_step;
    run.options.user = &training;
    psoup_status done = run_directory_open(&directory, sections, 4, &c.plan, &training, &error);
    cli_training_begin(run.options.checkpoint_dir);
    if (done == PSOUP_OK)
        done = ppo(s, &error);
    status = done != PSOUP_OK ? config_fail(&c, &error)
             : c.plan.only    ? 0
                              : run_print_output(run.output, c.json);
    run_directory_close(&directory);
    ppo_close(s);
    free(s);
    config_free(&c);
    return status;
}
