/* A judge that is another program: JSON Lines questions on its standard input, verdicts on its
 * standard output. Its input is a socket, so that a program that dies cannot raise SIGPIPE here.
 */
#include "eval/eval.h"

#include <errno.h>
#include <fcntl.h>
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
    psoup__buffer line; /* output read so far that has no newline yet */
} process;

static psoup_status spawn(process *p, const char *const *argv, psoup_error *error) {
    int in[2] = {-1, -1}, out[2] = {-1, -1};
    posix_spawn_file_actions_t actions;
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, in) != 0 || pipe2(out, O_CLOEXEC) != 0) {
        int code = errno;
        if (in[0] >= 0)
            close(in[0]), close(in[1]);
        return psoup__fail(error, PSOUP_ERROR_IO, "judge %s: %s", p->name, strerror(code));
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
        return psoup__fail(error, PSOUP_ERROR_IO, "judge %s: cannot start it: %s", p->name,
                           strerror(code));
    }
    p->to = in[0];
    p->from = out[0];
    fcntl(p->to, F_SETFL, O_NONBLOCK);
    fcntl(p->from, F_SETFL, O_NONBLOCK);
    return PSOUP_OK;
}

psoup_status psoup_judge_command(psoup_context *context, const char *const *argv,
                                 psoup_judge **out, psoup_error *error) {
    psoup_status status;
    *out = NULL;
    if (!argv || !argv[0] || !*argv[0])
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "judge: the command is empty");
    psoup_judge *judge = psoup__alloc(context, 1, sizeof *judge, error);
    process *p = psoup__alloc(context, 1, sizeof *p, error);
    if (!judge || !p) {
        psoup__free(context, judge);
        psoup__free(context, p);
        return PSOUP_ERROR_MEMORY;
    }
    *p = (process){.context = context, .to = -1, .from = -1, .line = {.context = context}};
    *judge = (psoup_judge){.context = context, .process = p};
    p->name = psoup__strdup(context, argv[0], error);
    PSOUP__TRY(p->name ? PSOUP_OK : PSOUP_ERROR_MEMORY);
    PSOUP__TRY(spawn(p, argv, error));
    *out = judge;
    return PSOUP_OK;
fail:
    psoup_judge_free(judge);
    return status;
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

static psoup_status write_questions(process *p, const psoup_question *questions, size_t n,
                                    psoup__buffer *to, psoup_error *error) {
    for (size_t i = 0; i < n; i++) {
        const psoup_question *q = &questions[i];
        psoup_json *row = psoup_json_new_object();
        int bad = psoup_json_set(row, "id", psoup_json_new_integer((int64_t)i));
        bad |= psoup_json_set(row, "prompt", psoup_json_new_string(q->prompt));
        bad |= psoup_json_set(row, "preference",
                              q->preference ? psoup_json_new_string(q->preference->symbol)
                                            : psoup_json_new_null());
        bad |= psoup_json_set(row, "criterion",
                              psoup_json_new_string(q->preference
                                                        ? q->preference->criterion
                                                        : "Choose the more helpful response."));
        bad |= psoup_json_set(row, "a", psoup_json_new_string(q->a));
        bad |= psoup_json_set(row, "b", psoup_json_new_string(q->b));
        char *text = bad ? NULL : psoup_json_text(row, 0);
        psoup_json_free(row);
        if (!text)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "judge %s: question %zu is not UTF-8 or memory is out", p->name, i);
        psoup__buffer_append(to, text, strlen(text));
        psoup__buffer_append(to, "\n", 1);
        psoup_text_free(text);
    }
    return to->failed ? psoup__out_of_memory(error, to->length) : PSOUP_OK;
}

/* Takes one answer line; true when it answers a question that had no answer yet. */
static bool take_answer(const char *line, size_t length, size_t n, bool *answered,
                        int32_t *verdicts) {
    psoup_json *row = NULL;
    if (psoup_json_parse(line, length, "judge", &row, NULL) != PSOUP_OK)
        return false;
    int64_t id = psoup_json_integer(psoup_json_get(row, "id"), -1);
    const char *verdict = psoup_json_string(psoup_json_get(row, "verdict"), "");
    bool fresh = id >= 0 && (uint64_t)id < n && !answered[id];
    if (fresh) {
        answered[id] = true;
        verdicts[id] = !strcmp(verdict, "a")     ? PSOUP_A_WINS
                       : !strcmp(verdict, "b")   ? PSOUP_B_WINS
                       : !strcmp(verdict, "tie") ? PSOUP_TIE
                                                 : PSOUP_UNPARSED;
    }
    psoup_json_free(row);
    return fresh;
}

/* Reads what is there and takes whole lines. *lines counts every line, understood or not: a judge
 * that answers each question with one line has answered all when there are n. */
static psoup_status read_answers(process *p, size_t n, bool *answered, int32_t *verdicts,
                                 size_t *lines, psoup_error *error) {
    char block[16384];
    ssize_t got = read(p->from, block, sizeof block);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return PSOUP_OK;
    if (got <= 0)
        return psoup__fail(error, PSOUP_ERROR_IO,
                           "judge %s: it ended after %zu of %zu answers", p->name, *lines, n);
    for (char *at = block, *end = block + got; at < end;) {
        char *newline = memchr(at, '\n', (size_t)(end - at));
        psoup__buffer_append(&p->line, at, (size_t)((newline ? newline : end) - at));
        if (p->line.failed || p->line.length > LINE_LIMIT)
            return psoup__fail(error, PSOUP_ERROR_FORMAT, "judge %s: a line of over %d bytes",
                               p->name, LINE_LIMIT);
        if (!newline)
            break;
        bool blank = strspn(p->line.data ? p->line.data : "", " \t\r") == p->line.length;
        if (!blank) {
            take_answer(p->line.data, p->line.length, n, answered, verdicts);
            ++*lines;
        }
        psoup__buffer_free(&p->line);
        p->line.context = p->context;
        at = newline + 1;
    }
    return PSOUP_OK;
}

psoup_status psoup__judge_process_ask(process *p, const psoup_question *questions, size_t n,
                                      int32_t *verdicts, psoup_error *error) {
    psoup__buffer text = {.context = p->context};
    bool *answered = psoup__alloc(p->context, n, sizeof *answered, error);
    psoup_status status = answered ? PSOUP_OK : PSOUP_ERROR_MEMORY;
    if (status != PSOUP_OK)
        goto fail;
    PSOUP__TRY(write_questions(p, questions, n, &text, error));
    for (size_t sent = 0, lines = 0; lines < n;) {
        struct pollfd fds[2] = {{p->from, POLLIN, 0}, {p->to, POLLOUT, 0}};
        if (poll(fds, sent < text.length ? 2 : 1, -1) < 0 && errno != EINTR) {
            status = psoup__fail(error, PSOUP_ERROR_IO, "judge %s: %s", p->name, strerror(errno));
            goto fail;
        }
        if (sent < text.length && fds[1].revents) {
            ssize_t put = send(p->to, text.data + sent, text.length - sent, MSG_NOSIGNAL);
            if (put > 0)
                sent += (size_t)put;
            else if (put < 0 && errno != EAGAIN && errno != EINTR) {
                status = psoup__fail(error, PSOUP_ERROR_IO,
                                     "judge %s: it stopped reading after %zu of %zu answers",
                                     p->name, lines, n);
                goto fail;
            }
        }
        if (fds[0].revents)
            PSOUP__TRY(read_answers(p, n, answered, verdicts, &lines, error));
    }
fail:
    psoup__buffer_free(&text);
    psoup__free(p->context, answered);
    return status;
}
