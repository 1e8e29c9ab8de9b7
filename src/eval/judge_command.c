/* A judge that is another program: JSON Lines questions on its standard input, verdicts on its
 * standard output. Its input is a socket, so that a program that dies cannot raise SIGPIPE here.
 */
#include "eval/eval.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

enum { LINE_LIMIT = 1 << 20 };

typedef struct psoup__judge_process {
    psoup_context *context;
    char *name; /* argv[0], for messages */
    pid_t pid;
    int to, from;       /* our ends; −1 when closed */
    double patience;    /* seconds of silence; 0: any */
    bool torn;          /* a question was cut off in the middle: it would be read together with the next */
    int64_t next_id;    /* ids run on from ask to ask: a late answer is nobody else's */
    psoup__buffer line; /* output read so far that has no newline yet */
} process;

/* One call's questions, under the ids first … first + n − 1. */
typedef struct ask {
    int64_t first;
    size_t n, lines; /* lines: how many came that are not about earlier questions */
    bool *answered;    /* [n] */
    int32_t *verdicts; /* [n] */
} ask;

static psoup_status fail_with(int code, const char *name, const char *what, psoup_error *error) {
    errno = code;
    return psoup__fail(error, code == ENOMEM ? PSOUP_ERROR_MEMORY : PSOUP_ERROR_IO,
                       "judge %s: %s: %m", name, what);
}

static psoup_status spawn(process *p, const char *const *argv, psoup_error *error) {
    int in[2] = {-1, -1}, out[2] = {-1, -1};
    posix_spawn_file_actions_t actions;
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, in) != 0 || pipe2(out, O_CLOEXEC) != 0) {
        int code = errno;
        if (in[0] >= 0)
            close(in[0]), close(in[1]);
        return fail_with(code, p->name, "no pipe to it", error);
    }
    int code = posix_spawn_file_actions_init(&actions);
    if (code == 0) {
        code = posix_spawn_file_actions_adddup2(&actions, in[1], STDIN_FILENO);
        if (code == 0)
            code = posix_spawn_file_actions_adddup2(&actions, out[1], STDOUT_FILENO);
        if (code == 0)
            code = posix_spawnp(&p->pid, argv[0], &actions, NULL, (char *const *)argv, environ);
        posix_spawn_file_actions_destroy(&actions);
    }
    close(in[1]);
    close(out[1]);
    if (code != 0) {
        close(in[0]);
        close(out[0]);
        p->pid = 0;
        return fail_with(code, p->name, "cannot start it", error);
    }
    p->to = in[0];
    p->from = out[0];
    fcntl(p->to, F_SETFL, O_NONBLOCK);
    fcntl(p->from, F_SETFL, O_NONBLOCK);
    return PSOUP_OK;
}

/* Closes its input, by which it should end by itself; one that does not is terminated. */
void psoup__judge_process_free(process *p) {
    if (!p)
        return;
    if (p->to >= 0)
        close(p->to);
    if (p->from >= 0)
        close(p->from);
    if (p->pid > 0) {
        int tries = 0;
        while (waitpid(p->pid, NULL, WNOHANG) == 0) {
            if (++tries == 100)
                kill(p->pid, SIGTERM);
            if (tries == 200)
                kill(p->pid, SIGKILL);
            poll(NULL, 0, 10);
        }
    }
    psoup__buffer_free(&p->line);
    psoup__free(p->context, p->name);
    psoup__free(p->context, p);
}

psoup_status psoup__judge_process_start(psoup_context *context, const char *const *argv,
                                        process **out, psoup_error *error) {
    psoup_status status;
    process *p = psoup__alloc(context, 1, sizeof *p, error);
    *out = NULL;
    if (!p)
        return PSOUP_ERROR_MEMORY;
    *p = (process){.context = context, .to = -1, .from = -1, .line = {.context = context}};
    p->name = psoup__strdup(context, argv[0], error);
    PSOUP__TRY(p->name ? PSOUP_OK : PSOUP_ERROR_MEMORY);
    PSOUP__TRY(spawn(p, argv, error));
    *out = p;
    return PSOUP_OK;
fail:
    psoup__judge_process_free(p);
    return status;
}

static bool is_text(const char *text) {
    return text && psoup__is_utf8(text);
}

static psoup_status write_questions(process *p, const psoup_question *questions, size_t n,
                                    psoup__buffer *to, psoup_error *error) {
    for (size_t i = 0; i < n; i++) {
        const psoup_question *q = &questions[i];
        const psoup_preference *preference = q->preference;
        if (!is_text(q->prompt) || !is_text(q->a) || !is_text(q->b) ||
            (preference && (!is_text(preference->symbol) || !is_text(preference->criterion))))
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "judge %s: question %zu is not UTF-8",
                               p->name, i);
        psoup_json *row = psoup_json_new_object();
        int bad = psoup_json_set(row, "id", psoup_json_new_integer(p->next_id + (int64_t)i));
        bad |= psoup_json_set(row, "prompt", psoup_json_new_string(q->prompt));
        bad |= psoup_json_set(row, "preference",
                              preference ? psoup_json_new_string(preference->symbol)
                                         : psoup_json_new_null());
        bad |= psoup_json_set(row, "criterion",
                              psoup_json_new_string(preference
                                                        ? preference->criterion
                                                        : "Choose the more helpful response."));
        bad |= psoup_json_set(row, "a", psoup_json_new_string(q->a));
        bad |= psoup_json_set(row, "b", psoup_json_new_string(q->b));
        char *text = bad ? NULL : psoup_json_text(row, 0);
        psoup_json_free(row);
        if (!text)
            return psoup__out_of_memory(error, 0);
        psoup__buffer_append(to, text, strlen(text));
        psoup__buffer_append(to, "\n", 1);
        psoup_text_free(text);
    }
    return to->failed ? psoup__out_of_memory(error, to->length) : PSOUP_OK;
}

/* Takes the line in p->line and empties it. Every line counts, understood or not, so that a judge
 * which answers each question with one line has answered all when there are n; but an answer that
 * comes after its own ask has ended does not stand for one of this. */
static psoup_status take_line(process *p, ask *a, psoup_error *error) {
    psoup_json *row = NULL;
    bool blank = strspn(p->line.data ? p->line.data : "", " \t\r") == p->line.length;
    psoup_status status =
        blank ? PSOUP_OK : psoup_json_parse(p->line.data, p->line.length, "judge", &row, NULL);
    if (status == PSOUP_ERROR_MEMORY)
        return psoup__out_of_memory(error, p->line.length);
    if (row) {
        const char *verdict = psoup_json_string(psoup_json_get(row, "verdict"), "");
        int64_t id = psoup_json_integer(psoup_json_get(row, "id"), a->first + (int64_t)a->n);
        uint64_t i = (uint64_t)id - (uint64_t)a->first;
        if (id >= 0 && id < a->first)
            blank = true;
        else if (i < a->n && !a->answered[i]) {
            a->answered[i] = true;
            a->verdicts[i] = !strcmp(verdict, "a")     ? PSOUP_A_WINS
                             : !strcmp(verdict, "b")   ? PSOUP_B_WINS
                             : !strcmp(verdict, "tie") ? PSOUP_TIE
                                                       : PSOUP_UNPARSED;
        }
        psoup_json_free(row);
    }
    a->lines += !blank;
    p->line.length = 0;
    return PSOUP_OK;
}

static psoup_status read_answers(process *p, ask *a, psoup_error *error) {
    char block[16384];
    ssize_t got = read(p->from, block, sizeof block);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return PSOUP_OK;
    if (got <= 0) {
        /* the last one need not have a newline */
        if (take_line(p, a, error) != PSOUP_OK)
            return PSOUP_ERROR_MEMORY;
        return a->lines >= a->n
                   ? PSOUP_OK
                   : psoup__fail(error, PSOUP_ERROR_IO, "judge %s: it ended after %zu of %zu answers",
                                 p->name, a->lines, a->n);
    }
    for (char *at = block, *end = block + got; at < end;) {
        char *newline = memchr(at, '\n', (size_t)(end - at));
        psoup__buffer_append(&p->line, at, (size_t)((newline ? newline : end) - at));
        if (p->line.failed) {
            psoup__buffer_free(&p->line);
            return psoup__out_of_memory(error, (size_t)got);
        }
        if (p->line.length > LINE_LIMIT)
            return psoup__fail(error, PSOUP_ERROR_FORMAT, "judge %s: a line of over %d bytes",
                               p->name, LINE_LIMIT);
        if (!newline)
            break;
        if (take_line(p, a, error) != PSOUP_OK)
            return PSOUP_ERROR_MEMORY;
        at = newline + 1;
    }
    return PSOUP_OK;
}

static psoup_status send_questions(process *p, const psoup__buffer *text, size_t *sent,
                                   const ask *a, psoup_error *error) {
    ssize_t put = send(p->to, text->data + *sent, text->length - *sent, MSG_NOSIGNAL);
    if (put < 0 && errno != EAGAIN && errno != EINTR)
        return psoup__fail(error, PSOUP_ERROR_IO,
                           "judge %s: it stopped reading after %zu of %zu answers", p->name,
                           a->lines, a->n);
    *sent += put > 0 ? (size_t)put : 0;
    return PSOUP_OK;
}

void psoup__judge_process_patience(process *p, double seconds) {
    p->patience = seconds;
}

/* poll's milliseconds: at least one, so that a short patience is not endless. */
static int patience_of(const process *p) {
    const double milliseconds = ceil(1000 * p->patience);
    return p->patience == 0 ? -1 : milliseconds < INT_MAX ? (int)milliseconds : INT_MAX;
}

/* Writes and reads at once: neither side's pipe may fill up while the other waits. */
psoup_status psoup__judge_process_ask(process *p, const psoup_question *questions, size_t n,
                                      int32_t *verdicts, psoup_error *error) {
    psoup__buffer text = {.context = p->context};
    ask a = {.first = p->next_id, .n = n, .verdicts = verdicts};
    psoup_status status;
    size_t sent = 0;
    if (p->torn)
        return psoup__fail(error, PSOUP_ERROR_STATE,
                           "judge %s: it was given up in the middle of a question", p->name);
    a.answered = psoup__alloc(p->context, n, sizeof *a.answered, error);
    PSOUP__TRY(a.answered ? PSOUP_OK : PSOUP_ERROR_MEMORY);
    PSOUP__TRY(write_questions(p, questions, n, &text, error));
    p->next_id += (int64_t)n;
    while (a.lines < n) {
        struct pollfd fds[2] = {{p->from, POLLIN, 0}, {p->to, POLLOUT, 0}};
        bool sending = sent < text.length;
        const int ready = poll(fds, sending ? 2 : 1, patience_of(p));
        if (ready < 0 && errno == EINTR)
            continue;
        if (ready < 0)
            PSOUP__TRY(fail_with(errno, p->name, "cannot wait for it", error));
        if (ready == 0)
            PSOUP__TRY(psoup__fail(error, PSOUP_ERROR_IO,
                                   "judge %s: silent for %g seconds after %zu of %zu answers",
                                   p->name, p->patience, a.lines, a.n));
        if (fds[0].revents)
            PSOUP__TRY(read_answers(p, &a, error));
        if (sending && fds[1].revents)
            PSOUP__TRY(send_questions(p, &text, &sent, &a, error));
    }
fail:
    p->torn = sent > 0 && sent < text.length;
    psoup__buffer_free(&text);
    psoup__free(p->context, a.answered);
    return status;
}
