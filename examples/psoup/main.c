/* psoup: the command line of libpsoup. Thin: everything it does is in the public API. */
#include "launch.h"

#include <string.h>

static const command commands[] = {
    {"info", cmd_info, "what a model, adapter or tokenizer directory holds"},
    {"tokenize", cmd_tokenize, "token ids of a text, with their offsets"},
    {"generate", cmd_generate, "text from a model, every prompt with its own mix of adapters"},
    {"score", cmd_score, "log-probabilities of given tokens, or the logits"},
    {"feedback", cmd_feedback, "sample candidates, ask a judge, write comparisons"},
    {"sft", cmd_sft, "supervised fine-tuning of an adapter or of the base"},
    {"reward", cmd_reward, "reward models from comparisons, one per preference or one for all"},
    {"dpo", cmd_dpo, "policies from comparisons without a reward model, one per preference"},
    {"ppo", cmd_ppo, "one policy per preference, side by side on one base; or P-MORL; or RLHF"},
    {"plot", cmd_plot, "the curves of trainings, as a picture or a page"},
    {"run", cmd_run, "a method of the paper end to end: vb, pp, rlhf, mt, pmorl, psoups"},
    {"merge", cmd_merge, "adapters or models into one, by weights"},
    {"inspect", cmd_inspect, "norms, angles and interference of adapters, and what a cheaper soup loses"},
    {"judge", cmd_judge, "the responses of two runs before a judge: duels"},
    {"winrate", cmd_winrate, "win rates with intervals from judged duels"},
};

static void usage(FILE *to) {
    fprintf(to, "psoup %s: personal language models from one base\n\n", psoup_version());
    fputs("Usage: psoup COMMAND [OPTIONS]\n\nCommands:\n", to);
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        fprintf(to, "  %-10s %s\n", commands[i].name, commands[i].summary);
    fputs(
        "\npsoup COMMAND --help explains one. Results go to standard output, messages to standard "
        "error;\nthe exit status is 0, or 1 when the work failed, or 2 when the command line is "
        "wrong.\n",
        to);
}

/* Output that could not be written is a failure too: a full disk, a closed pipe. */
static int finish(int status) {
    if (fflush(stdout) == 0 && !ferror(stdout))
        return status;
    return status ? status : (cli_complain("standard output: cannot write the result"), 1);
}

int main(int argc, char **argv) {
    if (argc < 2) {
        usage(stderr);
        return 2;
    }
    if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "help")) {
        usage(stdout);
        return 0;
    }
    if (!strcmp(argv[1], "--version")) {
        printf("psoup %s\n", psoup_version());
        return 0;
    }
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        if (!strcmp(argv[1], commands[i].name))
            return launch_end(finish(commands[i].run(argc - 1, argv + 1)));
    return cli_complain("unknown command \"%s\" (see psoup --help)", argv[1]);
}
