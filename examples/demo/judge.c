/* judge.c: reads a response by the world's grammar and scores it. See judge.h. */
#include "judge.h"

#include <string.h>

enum { MAX_WORDS = 128, WORD = 24 };

/* Splits into words and closing marks; returns how many, or −1 when something cannot be a word. */
static int split(const char *text, char words[MAX_WORDS][WORD]) {
    int n = 0;
    while (*text) {
        size_t length = strcspn(text, " .!?,");
        if (!length && *text != ' ')
            length = 1;
        if (length) {
            if (n == MAX_WORDS || length >= WORD)
                return -1;
            memcpy(words[n], text, length);
            words[n++][length] = '\0';
        }
        text += length;
        text += *text == ' ';
    }
    return n;
}

/* If the words at `at` are one of the world's remarks, counts it and returns how many words it
 * took. */
static int read_remark(char words[MAX_WORDS][WORD], int at, int n, unsigned seen[WORLD_STYLES]) {
    char expected[MAX_WORDS][WORD];
    for (int style = 0; style < WORLD_STYLES; style++)
        for (int r = 0; r < WORLD_REMARKS; r++) {
            int length = split(world_remark(style, r), expected), same = at + length <= n;
            for (int i = 0; same && i < length; i++)
                same = !strcmp(words[at + i], expected[i]);
            if (same) {
                seen[style] |= 1u << r;
                return length;
            }
        }
    return 0;
}

typedef struct statement {
    int topic, aspect, value, simple, technical;
} statement;

static void count_level(statement *s, int level) {
    s->simple += level == WORLD_SIMPLE;
    s->technical += level == WORLD_TECHNICAL;
}

/* Reads subject, verb, value and "."; `topic` is what "It" stands for (−1: nothing yet). Returns
 * how many words it took, 0 when they are no statement. */
static int read_statement(char words[MAX_WORDS][WORD], int at, int n, int topic, statement *s) {
    int begin = at;
    *s = (statement){.topic = -1, .aspect = -1, .value = -1};
    if (at < n && !strcmp(words[at], "It")) {
        s->topic = topic;
        at++;
    } else if (at + 1 < n && !strcmp(words[at], "The")) {
        for (int t = 0; t < WORLD_TOPICS; t++)
            if (!strcmp(words[at + 1], world_topic(t)))
                s->topic = t;
        at += 2;
    }
    if (s->topic < 0 || at + 3 > n || strcmp(words[at + 2], "."))
        return 0;
    for (int a = 0; a < WORLD_ASPECTS; a++)
        for (int level = 0; level < 2; level++)
            if (!strcmp(words[at], world_verb(a, level))) {
                s->aspect = a;
                count_level(s, level);
            }
    if (s->aspect < 0)
        return 0;
    for (int v = 0; v < WORLD_VALUES; v++)
        for (int level = 0; level < 2; level++)
            if (!strcmp(words[at + 1], world_value(s->aspect, v, level))) {
                s->value = v;
                count_level(s, level);
            }
    return s->value < 0 ? 0 : at + 3 - begin;
}

judge_reading judge_read(const world_prompt *prompt, const char *response) {
    char words[MAX_WORDS][WORD];
    judge_reading reading = {0};
    unsigned told = 0, seen[WORLD_STYLES] = {0};
    int n = split(response, words), topic = -1, at = 0;

    while (at < n) {
        statement s;
        int took = read_statement(words, at, n, topic, &s);
        if (took) {
            topic = s.topic;
            reading.simple += s.simple;
            reading.technical += s.technical;
            if (s.topic == prompt->topic && s.value == world_truth(s.topic, s.aspect))
                told |= 1u << s.aspect;
            else
                reading.wrong++;
        } else {
            took = read_remark(words, at, n, seen);
        }
        if (!took)
            return reading;        /* not grammatical: valid stays 0 */
        reading.words += took - 1; /* without its closing mark */
        at += took;
    }
    for (int a = 0; a < WORLD_ASPECTS; a++)
        reading.facts += told >> a & 1;
    for (int style = 0; style < WORLD_STYLES; style++)
        for (int r = 0; r < WORLD_REMARKS; r++)
            reading.remarks[style] += seen[style] >> r & 1;
    reading.asked = told >> prompt->aspect & 1;
    reading.valid = topic >= 0;
    return reading;
}

double judge_score(const judge_reading *r, int preference) {
    if (!r->valid)
        return JUDGE_INVALID;
    double simple = (double)(r->simple - r->technical) / (r->simple + r->technical);
    switch (preference) {
    case -1: {
        int score = r->asked - r->wrong;
        return score < -1 ? -1 : score;
    }
    case 0:
        return simple;
    case 1:
        return -simple;
    case 2:
        return r->asked ? 1 - r->words / 16.0 : -1.5;
    case 3:
        return r->facts / 2.5 - 1;
    default: {
        int own = r->remarks[preference - 4], others = -own;
        for (int style = 0; style < WORLD_STYLES; style++)
            others += r->remarks[style];
        return ((own > 2 ? 2 : own) - others) / 2.0;
    }
    }
}

int judge_compare(const world_prompt *prompt, int preference, const char *a, const char *b) {
    judge_reading first = judge_read(prompt, a), second = judge_read(prompt, b);
    double difference = judge_score(&first, preference) - judge_score(&second, preference);
    return (difference > 1e-9) - (difference < -1e-9);
}
