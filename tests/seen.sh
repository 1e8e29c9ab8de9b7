#!/bin/sh
# What is seen of a training: its progress on a terminal and off one, its samples, and the curves of psoup plot.
#   sh tests/seen.sh PATH_TO_PSOUP       its helpers are beside it, in tests/
# shellcheck disable=SC2012,SC2016 # names of our own; what another shell expands
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
left() { awk 'BEGIN { RS = "\f" } { last = $0 } END { print last }' screens | grep -v "$around" | tr -d '\n'; }
around="^memory of \|^psoup: [a-z]*: '.*' ends with the weights of step " # what is said before and after

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
check "and nothing else but the memory it takes and whose weights are kept" test "$(grep -v "$around" err | grep -vc ', validation: ')" -eq 0
for size in "110 24" "50 3"; do
    rm -f ppo.jsonl samples.jsonl
    # shellcheck disable=SC2086 # two numbers
    check "psoup ppo on a terminal of $size" "$python" "$here/terminal.py" $size screens "$psoup" ppo --config ppo.json
    check "the screen that is left: the memory it takes, whose weights are kept, the result" test "$(left)" = policies
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

# ---- a directory of its own --------------------------------------------------------------------------
sed 's/"metrics": "ppo.jsonl", "samples": "samples.jsonl",/"run_dir": "runs\/one",/' ppo.json >one.json
sed 's/runs\/one/runs\/two/; s/"seed": 1/"seed": 9/; s/0.001/0.004/' one.json >two.json
runs ppo --config one.json
runs ppo --config two.json
check "what is in it" test "$(ls runs/one | tr '\n' ' ')" = "checkpoints config.json metrics.jsonl samples.jsonl "
check "the same as with files of one's own" cmp runs/one/metrics.jsonl ppo.jsonl
check "and the samples" cmp runs/one/samples.jsonl samples.jsonl
check "how it was configured" has '"batch_size": 4,' runs/one/config.json
cp runs/one/config.json kept.json
sed 's/0.001/0.002/' one.json >other.json
"$psoup" ppo --config other.json --resume >out 2>err
check "another run is refused there" has 'is of another run: its learning_rate was 0.001, is 0.002' err
check "and leaves its configuration" cmp runs/one/config.json kept.json
sed 's/rewards\/P1A/nothing/; s/runs\/one/runs\/none/' one.json >other.json
"$psoup" ppo --config other.json >out 2>err
check "a run that does not begin leaves no directory" test ! -e runs/none

# ---- curves ------------------------------------------------------------------------------------------
cat >look.py <<'END'
"""look.py FILE: checks that it is well-formed, and prints what is in it."""
import sys
import xml.etree.ElementTree as tree

root = tree.parse(sys.argv[1]).getroot()
every = [(e.tag.split("}")[1], e.get("class") or "", e) for e in root.iter() if isinstance(e.tag, str)]
count = {"polyline": 0, "ring": 0, "chart": 0, "said": 0, "button": 0}
for tag, style, e in every:
    count["polyline"] += tag == "polyline"
    count["ring"] += tag == "circle" and style.startswith("ri ")
    count["chart"] += tag == "svg" and style == "plot"
    count["said"] += style == "said"
    count["button"] += tag == "button"
    assert not any(a in e.attrib for a in ("src", "href")), "something from elsewhere"
    for point in (e.get("points") or "").split():
        x, y = map(float, point.split(","))
        assert -1e4 < x < 1e4 and -1e4 < y < 1e4, point
print(" ".join("%s %d" % pair for pair in count.items()))
END
# shows FILE WHAT: look.py prints that.
shows() {
    "$python" look.py "$1" >out 2>err || return 1
    test "$(cat out)" = "$2" || { cat out >err; return 1; }
}
runs plot runs/one --metric reward --smooth 0 --out one.svg
check "two policies, their validations, the best of each" shows one.svg 'polyline 4 ring 2 chart 1 said 0 button 0'
runs plot runs/one runs/two --metric reward --metric kl --out both.svg
check "of two runs, in two charts" shows both.svg 'polyline 16 ring 4 chart 2 said 0 button 0'
check "their names" has '>two · P2A<' both.svg
runs plot runs/one
check "says where" has '^plot.html$' out
check "the page has samples of both: 2 prompts, 3 times" \
    sh -c '"$0" look.py plot.html | grep -q "chart 1[0-9] said 12 button 2$"' "$python"
check "its configuration" has 'run_dir&quot;: &quot;runs/one&quot;' plot.html
check "all is well" has 'No update was skipped, nothing was warned of, and every number is finite' plot.html
check "what never changed" has 'Never changed: .*epochs 1' plot.html
runs plot reward.jsonl --out r.svg --out r.html --json
check "accuracy, and what the best is" has '"subject": "P1A", "step": 4, "total": 4, .*"best": "accuracy", "best_value": 1.0, "best_step": 4' out
check "both are written" test -s r.svg -a -s r.html
mkdir several
cp reward.jsonl several/metrics-rewards.jsonl
cp ppo.jsonl several/metrics-policies.jsonl
runs plot several --metric reward --metric accuracy --smooth 0 --out several.svg
check "a directory of two trainings, as psoup run leaves it" shows several.svg 'polyline 8 ring 4 chart 2 said 0 button 0'
check "each by its file's name" has '>metrics-rewards · P1A<' several.svg
# Long, smoothed, appended to, with what is no number and names that XML must be told with care.
"$python" - >long.jsonl <<'END'
import json, math
for total in (3000, 40):
    for step in range(1, total + 1):
        loss = None if step in (17, 900) else math.exp(-step / 500) + 0.1 * math.sin(7 * step)
        print(json.dumps({"phase": "train", "subject": "<a & \"b\">", "step": step, "total": total, "loss": loss,
                          "grad_norm": 1e9 if step == 5 else 1.0, "warnings": float(step == 7), "reward/kind": step % 3, "skipped": float(step in (3, 4))}))
END
runs plot long.jsonl --out long.svg --metric loss
check "a gap parts the short run's curves, pale and smoothed" shows long.svg 'polyline 6 ring 0 chart 1 said 0 button 0'
check "many points are thinned out" test "$(wc -c <long.svg)" -lt 60000
runs plot long.jsonl --out long.html
check "the second run in it" has 'long #2 · &lt;a &amp; &quot;b&quot;&gt;' long.html
check "what was skipped" has 'long · .*: updates were skipped at step 3, 4<' long.html
check "what was warned of" has 'there were warnings of a collapse at step 7<' long.html
check "one of several rewards" has '>reward/kind <small>what this reward gave' long.html
check "what is no number" has 'no finite loss at step 17, 900<' long.html

# no STATUS PATTERN COMMAND…: one line that matches, and no file.
no() {
    status=$1 pattern=$2
    shift 2
    "$psoup" "$@" >out 2>err
    check "psoup $*: status $status and \"$pattern\"" \
        test $? -eq "$status" -a ! -s out -a "$(wc -l <err)" -eq 1 -a ! -e left.html
    check "psoup $*: \"$pattern\"" has "$pattern" err
}
row='{"phase": "train", "subject": "a", "step": 1, "total": 2, "loss": 1}'
for bad in "{\"phase\": \"train\"|bad.jsonl:3" '[1]|bad.jsonl:3' '{"phase": "test"}|bad.jsonl:3: expected a row of metrics, with "phase"' \
    '{"phase": "train", "subject": "a", "total": 2}|bad.jsonl:3: .* "step", a whole number from 1' \
    '{"phase": "train", "subject": "a", "step": 2, "total": 2, "loss": "x"}|bad.jsonl:3: "loss" is no number' \
    '{"response": "x"}|bad.jsonl:3: expected a sample'; do
    printf '%s\n\n%s\n' "$row" "${bad%|*}" >bad.jsonl
    no 1 "${bad##*|}" plot bad.jsonl --out left.html
done
mkdir -p empty
: >empty.jsonl
no 1 'empty: has no metrics.jsonl' plot empty --out left.html
no 1 'empty.jsonl: no row of metrics in it' plot empty.jsonl --out left.html
no 1 'none.jsonl' plot none.jsonl --out left.html
no 1 'no run has it' plot reward.jsonl --metric reward --out left.html
no 1 'nowhere/left.html: cannot write' plot reward.jsonl --out nowhere/left.html
no 2 'ends in .html or .svg' plot reward.jsonl --out left.pdf
no 2 'expected 0 to below 1' plot reward.jsonl --smooth 1
no 2 'expected at least one' plot

echo "seen: $passed passed, $failed failed"
test $failed -eq 0
