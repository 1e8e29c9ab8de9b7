#!/bin/sh
# What is seen of a training: its progress on a terminal and off one, its samples, and the curves of psoup plot.
#   sh tests/seen.sh PATH_TO_PSOUP       its helpers are beside it, in tests/
psoup=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
helpers=$(dirname "$psoup")/tests
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
T=$(mktemp -d "${TMPDIR:-/tmp}/psoup-seen-XXXXXX") || exit 1
trap 'rm -rf "$T"' EXIT
trap 'exit 1' HUP INT TERM
LC_ALL=C.UTF-8
export LC_ALL
cd "$T" || exit 1
passed=0 failed=0

# check WHAT COMMAND…: the command succeeds.
check() {
    what=$1
    shift
    if "$@"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "seen: FAILED: $what"
        sed 's/^/    /' out err | head -8
    fi
}
# runs COMMAND…: psoup succeeds, with its output in out and err.
runs() { check "psoup $*" sh -c '"$@" >out 2>err' sh "$psoup" "$@"; }
has() { grep -q -e "$1" "$2"; }
left() { awk 'BEGIN { RS = "\f" } { last = $0 } END { print last }' screens | tr -d '\n'; }

# ---- a tiny world -----------------------------------------------------------------------------------
"$helpers/make_tiny" . >out 2>err || exit 1
for i in 1 2 3 4 5 6; do
    echo "{\"instruction\": \"Name thing $i.\"}" >>instructions.jsonl
    for p in P1A P2A; do
        echo "{\"id\": $i, \"user_input\": \"Name thing $i.\", \"completion_a\": \"yes yes $i\",
              \"completion_b\": \"no\", \"preference\": \"$p\"}" | tr -d '\n' >>comparisons.jsonl
        echo >>comparisons.jsonl
    done
done
cat >reward.json <<'END'
{"model": "base", "data": "comparisons.jsonl", "output": "rewards", "learning_rate": 0.01, "rank": 2, "epochs": 4,
 "validation_fraction": 0.25, "max_tokens": 0, "validate_every": 2, "metrics": "reward.jsonl"}
END
cat >ppo.json <<'END'
{"model": "base", "prompts": "instructions.jsonl", "validation": "instructions.jsonl", "output": "policies",
 "rank": 2, "steps": 6, "batch_size": 4, "ppo_epochs": 1, "max_new_tokens": 6, "learning_rate": 0.001,
 "validate_every": 2, "metrics": "ppo.jsonl", "samples": "samples.jsonl", "samples_every": 3, "samples_count": 2,
 "policies": [{"name": "P1A", "reward": "rewards/P1A", "preference": "P1A"},
              {"name": "P2A", "reward": "rewards/P2A", "preference": "P2A"}]}
END

# ---- progress ---------------------------------------------------------------------------------------
runs reward --config reward.json
check "off a terminal: a line for each validation" has '^P2A: step 2/.*, validation: loss .*  accuracy' err
check "and nothing else" test "$(grep -vc ', validation: ' err)" -eq 0
for size in "110 24" "50 3"; do
    rm -f ppo.jsonl samples.jsonl
    # shellcheck disable=SC2086 # two numbers
    check "psoup ppo on a terminal of $size" "$python" "$here/terminal.py" $size screens "$psoup" ppo --config ppo.json
    check "the screen that is left: the result alone" test "$(left)" = policies
    check "how far it is" has '^step 6/6 \[########################\]' screens
    if test "$size" = "50 3"; then
        check "no room: they are counted" has '^and 2 more' screens
    else
        check "a policy" has '^P1A  *-\{0,1\}[0-9.]' screens
    fi
done
rm -f ppo.jsonl samples.jsonl
check "wide enough for all" "$python" "$here/terminal.py" 160 24 screens "$psoup" ppo --config ppo.json
check "its columns" has '^  *reward  *kl  *kl coeff  *value loss .* validation  best at step$' screens
check "its speed and phases" has '[0-9] tokens/s .*rollout [0-9]* %, score [0-9]* %, evaluate [0-9]* %, update [0-9]* %' screens
check "who is done" has '^P2A  .* at [246]  done$' screens
rm -f ppo.jsonl samples.jsonl
check "--json: no progress" "$python" "$here/terminal.py" 110 24 screens "$psoup" ppo --config ppo.json --json
check "but the result" test "$(left)" = '{"output": "policies"}'
check "samples of both, before, between and after" test "$(grep -c '"policy": "P[12]A"' samples.jsonl)" -eq 12
check "they are texts" has '"step": 0, "policy": "P1A", "id": 0, "prompt": ".*Name thing 1.*", "response": "' samples.jsonl

echo "seen: $passed passed, $failed failed"
test $failed -eq 0
