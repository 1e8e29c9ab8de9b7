/* The keys of rank_pattern and alpha_pattern. PEFT reads each as a regular expression that must match
 * the end of a module's name, at its beginning or after a dot (peft, tuners/lora/model.py and
 * utils/other.py, get_pattern_key). Here: characters, '.', escapes, \d \w, [sets] and the quantifiers
 * * + ?, run as a set of states, so that no key can take more than |key| · |module| steps. */
#include "format/format.h"

#include <string.h>

#define MAX_ITEMS 256

typedef struct item {
    uint32_t set[8]; /* the bytes it takes */
    char quantifier; /* 0, '*', '+', '?' */
} item;

static void take(item *it, unsigned char c) {
    it->set[c / 32] |= 1u << (c % 32);
}

static void take_range(item *it, unsigned first, unsigned last) {
    for (unsigned c = first; c <= last; c++)
        take(it, (unsigned char)c);
}

static bool takes(const item *it, unsigned char c) {
    return it->set[c / 32] >> (c % 32) & 1;
}

/* Reads the escape after a backslash; false for those that are not characters. */
static bool read_escape(item *it, char c) {
    if (c == 'd') {
        take_range(it, '0', '9');
    } else if (c == 'w') {
        take_range(it, '0', '9');
        take_range(it, 'A', 'Z');
        take_range(it, 'a', 'z');
        take(it, '_');
    } else if (c != '\0' && strchr(".\\-_[](){}*+?^$|/", c) != NULL) {
        take(it, (unsigned char)c);
    } else {
        return false;
    }
    return true;
}

/* Reads one item at *at and steps over it; false where the key uses what is not known here. */
static bool read_item(const char **at, item *it) {
    const char *p = *at;
    if (strchr("()|^${}*+?]", *p) != NULL)
        return false;
    if (*p == '.') {
        take_range(it, 1, 255);
        p++;
    } else if (*p == '\\') {
        if (!read_escape(it, p[1]))
            return false;
        p += 2;
    } else if (*p == '[') {
        bool inverted = *++p == '^';
        if (inverted)
            p++;
        if (*p == ']')
            return false;
        while (*p != ']') {
            if (*p == '\0' || *p == '[')
                return false;
            if (*p == '\\') {
                if (!read_escape(it, p[1]))
                    return false;
                p += 2;
            } else if (p[1] == '-' && p[2] != ']' && p[2] != '\0') {
                if ((unsigned char)p[2] < (unsigned char)p[0])
                    return false;
                take_range(it, (unsigned char)p[0], (unsigned char)p[2]);
                p += 3;
            } else {
                take(it, (unsigned char)*p++);
            }
        }
        p++;
        if (inverted)
            for (int i = 0; i < 8; i++)
                it->set[i] = ~it->set[i];
    } else {
        take(it, (unsigned char)*p++);
    }
    if (*p == '*' || *p == '+' || *p == '?') {
        it->quantifier = *p++;
        if (*p == '*' || *p == '+' || *p == '?')
            return false;
    }
    *at = p;
    return true;
}

/* states[i]: items before i are done. An item that may take nothing lets the next begin too. */
static void close_states(const item *items, size_t n, bool *states) {
    for (size_t i = 0; i < n; i++)
        if (states[i] && (items[i].quantifier == '*' || items[i].quantifier == '?'))
            states[i + 1] = true;
}

psoup_status psoup__peft_match(const char *key, const char *module, const char *where,
                               bool *matched, psoup_error *error) {
    item items[MAX_ITEMS];
    bool states[MAX_ITEMS + 1] = {false}, next[MAX_ITEMS + 1];
    size_t n = 0;
    *matched = false;
    for (const char *p = key; *p != '\0'; n++) {
        if (n == MAX_ITEMS)
            return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED, "%s: pattern key %.60s… is too long",
                               where, key);
        items[n] = (item){.quantifier = 0};
        if (!read_item(&p, &items[n]))
            return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                               "%s: pattern key %.200s: expected a module name or a regular "
                               "expression of characters, '.', sets and * + ? alone",
                               where, key);
    }
    states[0] = true;
    close_states(items, n, states);
    for (const char *c = module; *c != '\0'; c++) {
        memset(next, 0, sizeof next);
        for (size_t i = 0; i < n; i++) {
            if (!states[i] || !takes(&items[i], (unsigned char)*c))
                continue;
            next[i + 1] = true;
            if (items[i].quantifier == '*' || items[i].quantifier == '+')
                next[i] = true;
        }
        if (*c == '.') /* a match may begin after any dot */
            next[0] = true;
        close_states(items, n, next);
        memcpy(states, next, sizeof states);
    }
    *matched = states[n];
    return PSOUP_OK;
}
