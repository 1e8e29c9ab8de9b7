/* examples/demo/judge.h: what a response says, and how good that is by each preference.
 *
 * The judge is a program that knows the world. It labels the reward models' training data, with
 * some of its verdicts flipped, and it is kept without noise for evaluation; no policy ever sees
 * it.
 */
#ifndef DEMO_JUDGE_H
#define DEMO_JUDGE_H

#include "world.h"

typedef struct judge_reading {
    int valid; /* grammatical to the end, and states at least one thing about something */
    int asked; /* the asked fact is told */
    int facts; /* distinct true facts */
    int wrong; /* false statements */
    int simple, technical; /* words of facts, by level */
    int words;
    int remarks[WORLD_STYLES]; /* distinct ones */
} judge_reading;

judge_reading judge_read(const world_prompt *prompt, const char *response);

/* The score by a preference (its index in world_preferences), or by general helpfulness (−1); about
 * −1 … 1, and JUDGE_INVALID for what is not valid, under every criterion.
 *   expertise        (simple − technical) / (simple + technical), or its negative
 *   concise          1 − words / 16 where the asked fact is told, −1.5 where it is not
 *   informative      distinct true facts / 2.5 − 1
 *   style            (at most two remarks of the style − remarks of others) / 2
 *   helpfulness      1 if the asked fact is told − false statements, at least −1 */
#define JUDGE_INVALID (-2.0)
double judge_score(const judge_reading *reading, int preference);

/* 1, 0 or −1: whether a is better, as good or worse than b. */
int judge_compare(const world_prompt *prompt, int preference, const char *a, const char *b);

#endif
