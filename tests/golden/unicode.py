"""Writes src/text/unicode.c from Python's unicodedata (Unicode Character Database).

    python3 tests/golden/unicode.py > src/text/unicode.c
"""
import sys
import unicodedata as u

HANGUL = range(0xAC00, 0xAC00 + 11172)
excluded, decomposed, classes = [], [], []
for c in range(0x110000):
    if u.combining(chr(c)):
        if classes and classes[-1][1] == c - 1 and classes[-1][2] == u.combining(chr(c)):
            classes[-1][1] = c
        else:
            classes.append([c, c, u.combining(chr(c))])
    d = u.decomposition(chr(c))
    if d and not d.startswith("<") and c not in HANGUL:
        parts = [int(x, 16) for x in d.split()] + [0]
        # Excluded from composition: its own normal form C is another.
        composes = parts[1] != 0 and u.normalize("NFC", chr(c)) == chr(c)
        decomposed.append((c, parts[0], parts[1], int(composes)))
composable = sorted((d[1], d[2], i) for i, d in enumerate(decomposed) if d[3])


def table(rows, form, columns):
    out, line = [], "    "
    for row in rows:
        item = form % tuple(row)
        if len(line) + len(item) > columns:
            out.append(line)
            line = "    "
        line += item
    return "\n".join(out + [line])


print(f"""/* Canonical decompositions, compositions and combining classes of Unicode {u.unidata_version}, Hangul by rule
 * (Unicode, section 3.12). Written by tests/golden/unicode.py. */
#include "text/text.h"

/* character, first, second (0: none), by character */
static const uint32_t decompositions[][3] = {{
{table([d[:3] for d in decomposed], "{%d,%d,%d},", 120)}
}};

/* rows of decompositions that compose again, by first and second */
static const uint16_t compositions[] = {{
{table([(c[2],) for c in composable], "%d,", 120)}
}};

/* first and last of a range, class */
static const uint32_t classes[][3] = {{
{table(classes, "{%d,%d,%d},", 120)}
}};

#define COUNT(table) (sizeof(table) / sizeof *(table))
enum {{ S = 0xAC00, L = 0x1100, V = 0x1161, T = 0x11A7, NL = 19, NV = 21, NT = 28 }}; /* Hangul */

bool psoup__unicode_decompose(uint32_t code, uint32_t out[2]) {{
    if (code >= S && code < S + NL * NV * NT) {{
        uint32_t index = code - S, tail = index % NT;
        out[0] = tail ? code - tail : L + index / (NV * NT);
        out[1] = tail ? T + tail : V + index % (NV * NT) / NT;
        return true;
    }}
    for (size_t low = 0, high = COUNT(decompositions); low < high;) {{
        size_t middle = (low + high) / 2;
        const uint32_t *row = decompositions[middle];
        if (row[0] == code) {{
            out[0] = row[1];
            out[1] = row[2];
            return true;
        }}
        if (row[0] < code)
            low = middle + 1;
        else
            high = middle;
    }}
    return false;
}}

uint32_t psoup__unicode_compose(uint32_t first, uint32_t second) {{
    if (first >= L && first < L + NL && second >= V && second < V + NV)
        return S + ((first - L) * NV + (second - V)) * NT;
    if (first >= S && first < S + NL * NV * NT && (first - S) % NT == 0 && second > T &&
        second < T + NT)
        return first + (second - T);
    for (size_t low = 0, high = COUNT(compositions); low < high;) {{
        size_t middle = (low + high) / 2;
        const uint32_t *row = decompositions[compositions[middle]];
        if (row[1] == first && row[2] == second)
            return row[0];
        if (row[1] < first || (row[1] == first && row[2] < second))
            low = middle + 1;
        else
            high = middle;
    }}
    return 0;
}}

int psoup__unicode_class(uint32_t code) {{
    for (size_t low = 0, high = COUNT(classes); low < high;) {{
        size_t middle = (low + high) / 2;
        if (code >= classes[middle][0] && code <= classes[middle][1])
            return (int)classes[middle][2];
        if (classes[middle][1] < code)
            low = middle + 1;
        else
            high = middle;
    }}
    return 0;
}}""")
