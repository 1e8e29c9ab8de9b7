/* A judge for the tests of psoup_judge_command: JSON Lines questions on standard input, verdicts on
 * standard output. Its argument says how it behaves.
 */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void answer(long long id, const char *verdict) {
    printf("{\"id\": %lld, \"verdict\": \"%s\"}\n", id, verdict);
}

/* Which response has the word "good"; of two or none, neither. */
static const char *good(const char *line) {
    const char *b = strstr(line, ", \"b\": \""), *first = strstr(line, "good");
    int in_a = first && first < b, in_b = b && strstr(b, "good") != NULL;
    return in_a == in_b ? "tie" : in_a ? "a" : "b";
}

int main(int argc, char **argv) {
    const char *how = argc > 1 ? argv[1] : "good";
    char *line = NULL, *kept = NULL;
    size_t room = 0;
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (!strcmp(how, "deaf")) { /* reads nothing, and does not leave by itself */
        close(STDIN_FILENO);
        sleep(60);
        return 0;
    }
    if (!strcmp(how, "endless")) { /* one line without an end */
        for (int i = 0; i < 1 << 21; i++)
            putchar('x');
        fflush(stdout);
    }
    if (!strcmp(how, "banner"))
        puts("loading a large judge …");
    for (long long n = 0; getline(&line, &room, stdin) > 0; n++) {
        long long id = -1;
        if (sscanf(line, "{\"id\": %lld", &id) != 1 || !strchr(line, '\n'))
            break;
        if (!strcmp(how, "good"))
            answer(id, good(line));
        else if (!strcmp(how, "first") || !strcmp(how, "banner")) {
            bool late = !strcmp(how, "banner") && id % 12 == 11; /* the last of each ask of 12 */
            if (late)
                usleep(200000);
            answer(id, late && id == 11 ? "b" : "a");
        } else if (!strcmp(how, "pairs")) { /* the second before the first; odd ids are for a */
            if (n % 2 == 0) {
                kept = strdup(line);
                continue;
            }
            answer(id, id % 2 ? "a" : "b");
            sscanf(kept, "{\"id\": %lld", &id);
            answer(id, id % 2 ? "a" : "b");
            free(kept);
        } else if (!strcmp(how, "noise")) { /* one of five ways to be misunderstood, or a tie */
            if (n % 6 == 0)
                puts("I think that they are both fine.");
            else if (n % 6 == 1)
                printf("{\"id\": %lld}\n", id);
            else if (n % 6 == 2)
                answer(id, "maybe");
            else if (n % 6 == 3)
                printf("\n  \n{\"id\": \"%lld\", \"verdict\": \"a\"}\n", id);
            else if (n % 6 == 4)
                answer(id + 1000000, "a");
            else
                answer(id, "tie");
        } else if (!strcmp(how, "unended")) { /* no newline after the last word */
            printf("{\"id\": %lld, \"verdict\": \"b\"}", id);
            break;
        } else if (!strcmp(how, "silent")) { /* after two answers */
            if (n < 2)
                answer(id, "a");
        } else if (!strcmp(how, "dies")) {
            if (n == 2)
                break;
            answer(id, "a");
        }
    }
    free(line);
    return 0;
}
