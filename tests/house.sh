#!/bin/sh
# house.sh [TREE]: a room of src includes only itself and what stands below it (docs/house.md, "Floors"); examples and
# bindings see public headers alone. Prints what does not hold.
set -eu
cd "${1:-.}"
floors='base 0
ops.h 1
text 1
format 1
blend 1
comm 1
cpu 2
gpu 2
merge 2
model 3
train 4
ppo 5
eval 6'

grep -Hn '^ *# *include "' src/*.h src/*/*.[chS] | awk -v floors="$floors" '
    BEGIN { n = split(floors, f, /[ \n]/); for (i = 1; i < n; i += 2) floor[f[i]] = f[i + 1] }
    {
        split($0, line, ":"); file = line[1]
        split(file, path, "/"); own = path[2]
        split($0, quoted, "\""); split(quoted[2], included, "/"); other = included[1]
        if (!(own in floor)) { print file ": " own " is no room of docs/house.md"; bad = 1 }
        else if (own == "merge" && other == "ops.h") { print file ": merging knows no ops"; bad = 1 }
        else if (other in floor && other != own && floor[other] + 0 >= floor[own] + 0) {
            print file ":" line[2] ": " own " includes " quoted[2] ", which does not stand below it"; bad = 1
        }
    }
    END { exit bad }'
rooms=$(printf '%s\n' "$floors" | sed 's/ .*//; s/\.h$//' | paste -sd'|')
if grep -rnE "^ *# *include \"($rooms)(/|\.h)" examples bindings --include='*.[ch]' --include='*.hpp'; then
    echo "the above are the library's own: expected public headers" >&2
    exit 1
fi
for room in src/*/; do
    grep -q "$(basename "$room")" docs/house.md || { echo "$room is not in docs/house.md"; exit 1; }
done
test "$(wc -l <examples/personalized_soup.c)" -lt 200 || { echo "examples/personalized_soup.c has 200 lines or more"; exit 1; }
echo "house: $(printf '%s\n' "$floors" | wc -l) rooms, each on those below it"
