/* examples/demo/world.h: a small world where the truth is known.
 *
 * Thirty animals, five aspects of each, one true fact for every pair, and for every word that
 * states a fact a plain and a technical form. A response is a row of sentences,
 *
 *     ("The owl" | "It") verb value "."       a fact: "The owl eats meat." "It inhabits canopy."
 *     one of three fixed remarks of a style   "Hi friend!" "Go away." "As if." "Oh wow."
 *
 * so that a program can say what a response states, whether it is true, how it is worded and how
 * long it is. The writer below makes the base model's instruction data: it is asked with at most
 * one preference and obeys it only in part, and now and then it is wrong or ungrammatical, as
 * people are.
 */
#ifndef DEMO_WORLD_H
#define DEMO_WORLD_H

#include <stddef.h>
#include <stdint.h>

enum {
    WORLD_TOPICS = 30,
    WORLD_ASPECTS = 5,
    WORLD_VALUES = 5,   /* of each aspect */
    WORLD_WORDINGS = 4, /* of a question */
    WORLD_STYLES = 4,   /* friendly, unfriendly, sassy, sarcastic */
    WORLD_REMARKS = 3,  /* of each style */
    WORLD_PREFERENCES = 8,
    WORLD_TEXT = 512 /* bytes that hold any prompt or response */
};

enum { WORLD_SIMPLE = 0, WORLD_TECHNICAL = 1 };

/* Random words: Steele and others' SplitMix64 (2014). */
typedef struct world_random {
    uint64_t state;
} world_random;
uint64_t world_next(world_random *random);
double world_uniform(world_random *random);   /* in [0, 1) */
int world_below(world_random *random, int n); /* in [0, n) */

typedef struct world_prompt {
    int topic, aspect, wording;
} world_prompt;

/* The words. Indices must be in range; all strings are static. */
const char *world_topic(int topic);
const char *world_aspect(int aspect);
const char *world_verb(int aspect, int level); /* level: WORLD_SIMPLE, WORLD_TECHNICAL */
const char *world_value(int aspect, int value, int level);
const char *world_remark(int style, int remark);
int world_truth(int topic, int aspect); /* the value that is true */

/* The preferences, in the order P1A P1B P2A P2B P3A P3B P3C P3D. */
extern const struct world_preference {
    const char *symbol, *dimension, *prompt, *opposite;
} world_preferences[WORLD_PREFERENCES];

/* Pairs kept out of all training prompts, one for each topic. Their facts are still told in answers
 * to other questions about the topic. */
int world_held_out(int topic, int aspect);
/* All prompts with (held_out = 1) held-out pairs or (0) the others, in a fixed order: writes at
 * most `capacity` and returns how many there are. */
size_t world_prompts(int held_out, world_prompt *out, size_t capacity);
/* The question as text. */
void world_question(const world_prompt *prompt, char text[WORLD_TEXT]);
/* Finds topic and aspect of a question; returns 0, or −1 when it names none. */
int world_understand(const char *question, world_prompt *out);

/* Writes a response as the base's instruction data has it. preference: an index, or −1 for none. */
void world_write(world_random *random, const world_prompt *prompt, int preference,
                 char text[WORLD_TEXT]);

#endif
