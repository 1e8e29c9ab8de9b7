/* What the benches of merging share: the peer that takes turns, buffers, and the linears of TinyLlama-1.1B. */
#ifndef BENCH_PEER_H
#define BENCH_PEER_H

#include <math.h>
#include <stdio.h>
#include <unistd.h>

#include "base/base.h"
#include "bench_limits.h"
#include "psoup/merge.h"

static const char *python, *script;
static FILE *to_peer, *from_peer;

static inline void must(psoup_status status, const psoup_error *error) {
    if (status != PSOUP_OK) {
        fprintf(stderr, "bench: %s\n", error->message);
        exit(1);
    }
}

static inline void *buffer(size_t bytes, int value) {
    void *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (memory == NULL) {
        fprintf(stderr, "bench: no memory for %zu bytes\n", bytes);
        exit(1);
    }
    memset(memory, value, bytes); /* touched: page faults are not what is measured */
    return memory;
}

static inline void least(double *best, double seconds) {
    if (*best == 0 || seconds < *best)
        *best = seconds;
}

/* ---- the peer -------------------------------------------------------------------------------------- */

static inline void start_peer(void) {
    int down[2], up[2];
    if (python == NULL || pipe(down) != 0 || pipe(up) != 0)
        return;
    if (fork() == 0) {
        dup2(down[0], 0);
        dup2(up[1], 1);
        close(down[1]);
        close(up[0]);
        execlp(python, python, script, (char *)NULL);
        _exit(127);
    }
    close(down[0]);
    close(up[1]);
    to_peer = fdopen(down[1], "w");
    from_peer = fdopen(up[0], "r");
}

/* Asks; the answer without its newline, or "absent". */
static inline const char *ask(const char *question) {
    static char answer[512];
    strcpy(answer, "absent");
    if (to_peer == NULL)
        return answer;
    if (fprintf(to_peer, "%s\n", question) < 0 || fflush(to_peer) != 0 ||
        fgets(answer, sizeof answer, from_peer) == NULL) {
        to_peer = NULL;
        return strcpy(answer, "absent");
    }
    answer[strcspn(answer, "\n")] = '\0';
    return answer;
}

/* "ours, theirs, ratio and goal" of seconds. */
static inline void beside(const char *what, double ours, const char *answer, double goal) {
    double theirs = strtod(answer, NULL);
    if (theirs > 0)
        printf("  %-34s %9.4f s   ours is %.2f times as fast (goal %.1f)   %s\n", what, theirs, theirs / ours,
               goal, strchr(answer, ' ') != NULL ? strchr(answer, ' ') + 1 : "");
    else
        printf("  %-34s    absent\n", what);
}

enum { LINEARS = 7, HIDDEN = 2048, FFN = 5632, KV = 256, VOCAB = 32000, RANK = 16, ADAPTERS = 3 };
static const struct {
    const char *name;
    int64_t rows, columns;
} linears[LINEARS] = {{"self_attn.q_proj", HIDDEN, HIDDEN}, {"self_attn.k_proj", KV, HIDDEN},
                      {"self_attn.v_proj", KV, HIDDEN},     {"self_attn.o_proj", HIDDEN, HIDDEN},
                      {"mlp.gate_proj", FFN, HIDDEN},       {"mlp.up_proj", FFN, HIDDEN},
                      {"mlp.down_proj", HIDDEN, FFN}};

#endif
