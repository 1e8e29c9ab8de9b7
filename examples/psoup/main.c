/* psoup: the command line of libpsoup. Thin: everything it does is in the public API. */
#include "launch.h"

#include <fcntl.h>
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

/* What leads from a base to personal answers. */
static const char path[] =
    "The way from a base to personal answers:\n"
    "  psoup COMMAND --print-config >COMMAND.json    begins a configuration; fill in what is required\n"
    "  psoup feedback --config feedback.json         samples answers and asks a judge: comparisons\n"
    "  psoup reward --config reward.json             trains a reward model for each preference\n"
    "  psoup ppo --config ppo.json                   trains a policy for each, side by side\n"
    "  psoup generate --model base --adapter P1A=policies/P1A --adapter P3A=policies/P3A \\\n"
    "                 --mix P1A=0.5,P3A=0.5 --prompt \"Why is the sky blue?\"    answers one user\n"
    "  psoup merge --base base --out mine policies/P1A=0.5 policies/P3A=0.5    makes it one model\n"
    "psoup dpo needs no reward models; psoup run does all of it, as the paper did, from one file.\n";

static void usage(FILE *to) {
    fprintf(to, "psoup %s: personal language models from one base\n\n", psoup_version());
    fprintf(to, "Usage: psoup COMMAND [OPTIONS]\n\n%s\nCommands:\n", path);
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        fprintf(to, "  %-10s %s\n", commands[i].name, commands[i].summary);
    fputs(
        "\npsoup COMMAND --help explains one. Results go to standard output, messages to standard "
        "error;\nthe exit status is 0, or 1 when the work failed, or 2 when the command line is "
        "wrong.\n",
        to);
}

static const command *command_named(const char *name) {
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        if (!strcmp(name, commands[i].name))
            return &commands[i];
    return NULL;
}

/* Output that could not be written is a failure too: a full disk, a closed pipe. */
static int finish(int status) {
    if (fflush(stdout) == 0 && !ferror(stdout))
        return status;
    return status ? status : (cli_complain("standard output: cannot write the result"), 1);
}

/* Takes the standard descriptors that the caller closed, so that no file of ours gets one and with it what is meant
 * for the terminal. They are opened the wrong way round: reading and writing fail as before. */
static void take_closed(void) {
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", fd ? O_RDONLY : O_WRONLY) < 0)
            return;
}

int main(int argc, char **argv) {
    take_closed();
    if (argc < 2) {
        usage(stderr);
        return 2;
    }
    char *help[] = {argc > 2 ? argv[2] : NULL, (char[]){"--help"}, NULL};
    bool asked = !strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") || !strcmp(argv[1], "help");
    const command *named = command_named(asked && argc > 2 ? argv[2] : argv[1]);
    if (asked && argc > 2 && named) /* psoup help COMMAND */
        return finish(named->run(2, help));
    if (asked && argc == 2) {
        usage(stdout);
        return finish(0);
    }
    if (!strcmp(argv[1], "--version")) {
        printf("psoup %s\n", psoup_version());
        return finish(0);
    }
    if (named && !asked)
        return launch_end(finish(named->run(argc - 1, argv + 1)));
    return cli_complain("unknown command \"%s\" (see psoup --help)", argv[asked ? 2 : 1]);
}
