/* world.c: the words, the truth, the questions and the writer. See world.h. */
#include "world.h"

#include <stdio.h>
#include <string.h>

/* ---- words
 * --------------------------------------------------------------------------------------- */

static const char *const aspects[WORLD_ASPECTS] = {"food", "home", "skin", "motion", "young"};

static const char *const verbs[WORLD_ASPECTS][2] = {{"eats", "ingests"},
                                                    {"likes", "inhabits"},
                                                    {"has", "bears"},
                                                    {"uses", "employs"},
                                                    {"raises", "rears"}};

static const char *const values[WORLD_ASPECTS][WORLD_VALUES][2] = {
    {{"plants", "flora"},
     {"meat", "fauna"},
     {"bugs", "insecta"},
     {"fish", "pisces"},
     {"seeds", "semina"}},
    {{"water", "aqua"},
     {"trees", "canopy"},
     {"soil", "humus"},
     {"caves", "karst"},
     {"fields", "steppe"}},
    {{"fur", "pelage"},
     {"feathers", "plumage"},
     {"scales", "squama"},
     {"shell", "carapace"},
     {"slime", "mucus"}},
    {{"legs", "gait"},
     {"wings", "volation"},
     {"fins", "natation"},
     {"jumps", "saltation"},
     {"tails", "caudae"}},
    {{"pups", "neonates"},
     {"chicks", "nidicoles"},
     {"eggs", "ova"},
     {"grubs", "larvae"},
     {"calves", "juveniles"}},
};

/* The truth: for each topic the value of food, home, skin, motion and young. */
static const struct {
    const char *name;
    unsigned char value[WORLD_ASPECTS];
} topics[WORLD_TOPICS] = {
    {"ant", {4, 2, 3, 0, 3}},   {"bat", {2, 3, 0, 1, 0}},  {"bee", {0, 1, 0, 1, 3}},
    {"carp", {0, 0, 2, 2, 2}},  {"cow", {0, 4, 0, 0, 4}},  {"crab", {3, 0, 3, 0, 2}},
    {"crow", {1, 1, 1, 1, 1}},  {"deer", {0, 1, 0, 3, 4}}, {"dove", {4, 1, 1, 1, 1}},
    {"duck", {4, 0, 1, 0, 1}},  {"eel", {3, 0, 4, 4, 2}},  {"fox", {1, 2, 0, 0, 0}},
    {"frog", {2, 0, 4, 3, 2}},  {"goat", {0, 4, 0, 3, 4}}, {"hare", {0, 4, 0, 3, 0}},
    {"hawk", {1, 3, 1, 1, 1}},  {"hen", {4, 4, 1, 0, 1}},  {"mole", {2, 2, 0, 0, 0}},
    {"moth", {0, 1, 2, 1, 3}},  {"newt", {2, 3, 4, 4, 2}}, {"owl", {1, 1, 1, 1, 1}},
    {"rat", {4, 2, 0, 0, 0}},   {"seal", {3, 0, 0, 2, 0}}, {"slug", {0, 4, 4, 4, 2}},
    {"snail", {0, 2, 3, 4, 2}}, {"swan", {0, 0, 1, 1, 1}}, {"toad", {2, 2, 2, 3, 2}},
    {"trout", {2, 0, 2, 2, 2}}, {"wasp", {2, 1, 3, 1, 3}}, {"wolf", {1, 3, 0, 0, 0}},
};

/* Two that open a response, one that closes it. */
static const char *const remarks[WORLD_STYLES][WORLD_REMARKS] = {
    {"Hi friend!", "Great question!", "Hope it helps!"},
    {"Silly question.", "You again.", "Go away."},
    {"Honey please.", "As if.", "Watch and learn."},
    {"Oh wow.", "What a mystery.", "How thrilling."},
};

static const char *const wordings[WORLD_WORDINGS] = {"what is the %2$s of the %1$s?",
                                                     "tell me about the %2$s of the %1$s.",
                                                     "the %1$s: which %2$s?", "explain %1$s %2$s."};

/* Shorter equivalents, in this world's words, of the prompts in the paper's table 4. */
const struct world_preference world_preferences[WORLD_PREFERENCES] = {
    {"P1A", "expertise", "Generate easy words.", "P1B"},
    {"P1B", "expertise", "Generate expert words.", "P1A"},
    {"P2A", "informativeness", "Generate little.", "P2B"},
    {"P2B", "informativeness", "Generate everything.", "P2A"},
    {"P3A", "style", "Generate friendly.", "P3B"},
    {"P3B", "style", "Generate unfriendly.", "P3A"},
    {"P3C", "style", "Generate sassy.", "P3D"},
    {"P3D", "style", "Generate sarcastic.", "P3C"},
};

const char *world_topic(int topic) {
    return topics[topic].name;
}
const char *world_aspect(int aspect) {
    return aspects[aspect];
}
const char *world_verb(int aspect, int level) {
    return verbs[aspect][level];
}
const char *world_value(int aspect, int value, int level) {
    return values[aspect][value][level];
}
const char *world_remark(int style, int remark) {
    return remarks[style][remark];
}
int world_truth(int topic, int aspect) {
    return topics[topic].value[aspect];
}

/* ---- randomness
 * ------------------------------------------------------------------------------------ */

uint64_t world_next(world_random *random) {
    uint64_t z = random->state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

double world_uniform(world_random *random) {
    return (double)(world_next(random) >> 11) * 0x1p-53;
}

int world_below(world_random *random, int n) {
    return (int)(world_uniform(random) * n);
}

/* Draws an index with probability proportional to weights[index]. */
static int pick(world_random *random, const double *weights, int n) {
    double total = 0;
    for (int i = 0; i < n; i++)
        total += weights[i];
    double left = world_uniform(random) * total;
    for (int i = 0; i < n - 1; i++) {
        left -= weights[i];
        if (left < 0)
            return i;
    }
    return n - 1;
}

/* ---- questions
 * ------------------------------------------------------------------------------------- */

int world_held_out(int topic, int aspect) {
    return (topic * 2 + topic / 5) % WORLD_ASPECTS == aspect;
}

size_t world_prompts(int held_out, world_prompt *out, size_t capacity) {
    size_t n = 0;
    for (int topic = 0; topic < WORLD_TOPICS; topic++)
        for (int aspect = 0; aspect < WORLD_ASPECTS; aspect++)
            for (int wording = 0; wording < WORLD_WORDINGS; wording++)
                if (world_held_out(topic, aspect) == !!held_out) {
                    if (n < capacity)
                        out[n] = (world_prompt){topic, aspect, wording};
                    n++;
                }
    return n;
}

void world_question(const world_prompt *prompt, char text[WORLD_TEXT]) {
    const char *from = wordings[prompt->wording];
    size_t n = 0;
    while (*from) { /* "%1$s" is the topic, "%2$s" the aspect */
        if (*from == '%') {
            const char *word =
                from[1] == '1' ? topics[prompt->topic].name : aspects[prompt->aspect];
            n += (size_t)snprintf(text + n, WORLD_TEXT - n, "%s", word);
            from += 4;
        } else {
            text[n++] = *from++;
        }
    }
    text[n] = '\0';
}

/* Whether `word` stands in `text` between characters that are no letters. */
static int contains(const char *text, const char *word) {
    size_t length = strlen(word);
    for (const char *at = text; (at = strstr(at, word)); at++) {
        int before = at > text && ((at[-1] | 32) >= 'a' && (at[-1] | 32) <= 'z');
        int after = (at[length] | 32) >= 'a' && (at[length] | 32) <= 'z';
        if (!before && !after)
            return 1;
    }
    return 0;
}

int world_understand(const char *question, world_prompt *out) {
    *out = (world_prompt){-1, -1, 0};
    for (int topic = 0; topic < WORLD_TOPICS; topic++)
        if (contains(question, topics[topic].name))
            out->topic = topic;
    for (int aspect = 0; aspect < WORLD_ASPECTS; aspect++)
        if (contains(question, aspects[aspect]))
            out->aspect = aspect;
    return out->topic < 0 || out->aspect < 0 ? -1 : 0;
}

/* ---- the writer
 * ------------------------------------------------------------------------------------ */

/* How many facts a response tells, by what was asked for: the weights of 1 … 5. */
static const double facts_neutral[] = {12, 25, 30, 20, 13};
static const double facts_concise[] = {48, 28, 14, 7, 3};
static const double facts_informative[] = {2, 6, 17, 30, 45};

enum { ASKS_EASY, ASKS_EXPERT, ASKS_LITTLE, ASKS_EVERYTHING, ASKS_STYLE };

static void add(char text[WORLD_TEXT], const char *unit) {
    size_t n = strlen(text);
    snprintf(text + n, WORLD_TEXT - n, "%s%s", n ? " " : "", unit);
}

/* A remark of the wanted style (−1: any) with the given chance, and seldom one of another style. */
static void remark(world_random *random, int style, int closes, double chance,
                   char text[WORLD_TEXT]) {
    if (world_uniform(random) >= chance)
        return;
    if (style < 0 || world_uniform(random) < 0.06)
        style = world_below(random, WORLD_STYLES);
    add(text, remarks[style][closes ? 2 : world_below(random, 2)]);
}

static void fact(world_random *random, int topic, int aspect, int first, double simple,
                 char text[WORLD_TEXT]) {
    int value = topics[topic].value[aspect];
    if (world_uniform(random) < 0.01)
        value = (value + 1 + world_below(random, WORLD_VALUES - 1)) % WORLD_VALUES;
    int verb_level = world_uniform(random) >= simple, value_level = world_uniform(random) >= simple;
    char unit[WORLD_TEXT];
    snprintf(unit, sizeof unit, "%s%s %s %s.", first ? "The " : "It",
             first ? topics[topic].name : "", verbs[aspect][verb_level],
             values[aspect][value][value_level]);
    add(text, unit);
}

/* Leaves one word out: the base has read bad grammar too, and the judge must be able to refuse it.
 */
static void damage(world_random *random, char text[WORLD_TEXT]) {
    int spaces = 0;
    for (const char *c = text; *c; c++)
        spaces += *c == ' ';
    if (spaces < 2)
        return;
    int which = world_below(random, spaces - 1);
    char *from = text;
    for (int i = 0; i <= which; i++)
        from = strchr(from, ' ') + 1;
    char *to = strchr(from, ' ');
    if (to)
        memmove(from, to + 1, strlen(to + 1) + 1);
}

void world_write(world_random *random, const world_prompt *prompt, int preference,
                 char text[WORLD_TEXT]) {
    /* A writer keeps mostly to one level; a preference makes the level likely, not certain. */
    double easy = preference == ASKS_EASY ? 0.85 : preference == ASKS_EXPERT ? 0.15 : 0.5;
    double simple = world_uniform(random) < easy ? 0.85 : 0.15;
    const double *weights = preference == ASKS_LITTLE       ? facts_concise
                            : preference == ASKS_EVERYTHING ? facts_informative
                                                            : facts_neutral;
    int style = preference >= ASKS_STYLE ? preference - ASKS_STYLE : -1;
    int order[WORLD_ASPECTS], n = 1 + pick(random, weights, WORLD_ASPECTS);

    /* The asked fact comes first, unless the writer wanders, and then it may be left out; the
     * others follow in any order. Who is asked for little keeps to the question. */
    double wanders = preference == ASKS_LITTLE ? 0.01 : preference == ASKS_EVERYTHING ? 0.25 : 0.15;
    for (int i = 0; i < WORLD_ASPECTS; i++)
        order[i] = (prompt->aspect + i) % WORLD_ASPECTS;
    for (int i = WORLD_ASPECTS - 1; i > 1; i--) {
        int j = 1 + world_below(random, i), other = order[i];
        order[i] = order[j];
        order[j] = other;
    }
    if (world_uniform(random) < wanders) {
        int j = 1 + world_below(random, WORLD_ASPECTS - 1);
        order[0] = order[j];
        order[j] = prompt->aspect;
    }

    text[0] = '\0';
    remark(random, style, 0, style < 0 ? 0.15 : 0.6, text);
    for (int i = 0; i < n; i++)
        fact(random, prompt->topic, order[i], i == 0, simple, text);
    remark(random, style, 1, style < 0 ? 0.15 : 0.5, text);
    if (world_uniform(random) < 0.015)
        damage(random, text);
}
