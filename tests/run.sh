#!/bin/sh
# psoup run: every method of the paper from one command, on a tiny model and rows in the layouts of the paper's released
# files; what is refused, and how a run goes on.
#   sh tests/run.sh PATH_TO_PSOUP        its helpers are beside it, in tests/
# shellcheck disable=SC2034,SC2086,SC2012 # shell_case.sh reads suite; lists of options and names are split on purpose

suite=run
docs=$(cd "$(dirname "$0")/../docs" && pwd)
test -z "$TMPDIR" && test -w /dev/shm && TMPDIR=/dev/shm # everything is synced, which no disk need wait for here
# shellcheck source=tests/shell_case.sh
. "$(dirname "$0")/shell_case.sh"

check "make_tiny" "$helpers/make_tiny" .
users="AAA AAB ABA ABB BAA BAB BBA BBB" symbols="P1A P1B P2A P2B P3A P3B"

# ---- the three layouts --------------------------------------------------------------------------
put alpaca.json '[{"instruction": "Why does it rain?", "input": "", "output": "Clouds."},
    {"instruction": "Name a colour.", "input": "Not red.", "output": "Blue."},
    {"instruction": "What is the sun made of?", "input": ""}, {"instruction": "Why?", "input": "Rain."}]'
put koala.json '[{"prompt": "What is rain?"}, {"prompt": "Name a star."}]'
put held.json '[{"prompt": "What is made of gas?"}]'
put mt.json '[{"instruction": "Why does it rain?", "input": "", "output": "Clouds.", "preference": "P1A"},
    {"instruction": "Name a colour. Be kind.", "input": "", "output": "Blue."}]'
for p in $symbols general; do
    put $p.json "[{\"user_input\": \"Why does it rain?\", \"completion_a\": \" Clouds, $p.\", \"completion_b\": \" No.\"},
        {\"user_input\": \"Name a colour.\", \"completion_a\": \" Red and $p.\", \"completion_b\": \" A.\"}]"
done
rows='"reward_data": {'
for p in $symbols; do rows="$rows\"$p\": \"$p.json\", "; done
rows="$rows\"general\": \"general.json\"}, \"examples\": \"mt.json\", \"held_out\": 0"
files='"model": "base", "prompts": "alpaca.json", "validation": "held.json", "evaluation": "koala.json"'
sizes='"adapter": {"rank": 2}, "reward_adapter": {"rank": 2}, "sft": {"learning_rate": 0.01},
    "reward": {"learning_rate": 0.01, "batch_size": 2},
    "ppo": {"batch_size": 4, "max_new_tokens": 6, "ppo_epochs": 2, "steps": 2, "validate_every": 1},
    "generate": {"max_new_tokens": 6, "min_new_tokens": 0}'
# config OUTPUT [MORE MEMBERS [ROWS [SIZES]]]
config() { put run.json "{$files, \"output\": \"$1\", ${3:-$rows}, ${4:-$sizes} $2}"; }

# ---- each method, end to end --------------------------------------------------------------------
for m in vb pp rlhf mt pmorl psoups; do
    config $m
    trains run $m --config run.json
    check "$m: prints where it is" has "^$m\$"
    check "$m: a file for every user" test "$(ls $m/responses | tr '\n' ' ')" = "$(for u in $users; do echo "$u.jsonl"; done | tr '\n' ' ')"
    check "$m: a response to every prompt" lines $m/responses/ABA.jsonl 2
    check "$m: its members" grep -q '"prompt": 1, "user": "ABA", "preferences": \["P1A", "P2B", "P3A"\], "instruction": "Name a star.", "completion"' $m/responses/ABA.jsonl
    ok run $m --config $m/config.json --print-config
    check "$m: the configuration as it was used" has '"output": "'$m'"'
    no 1 "$m: has a run already; --resume" run $m --config run.json
    "$psoup" run $m --config run.json --resume >out 2>err
    check "$m: nothing is done twice" test $? -eq 0 -a "$(grep -c 'finished before' err)" -ge 1
done
sed -n 's/.*"completion"/"completion"/p' vb/responses/AAA.jsonl >one
sed -n 's/.*"completion"/"completion"/p' vb/responses/BBB.jsonl >two
check "vb: one response serves all users" cmp -s one two
sed -n 's/.*"completion"/"completion"/p' pp/responses/BBB.jsonl >two
check "pp: preferences change it" differ one two
check "rlhf: one reward, of general preference" test "$(ls rlhf/rewards rlhf/policies | tr '\n' ' ')" = "rlhf/policies: rlhf  rlhf/rewards: general "
check "pmorl: one reward, told by prompt" test "$(ls pmorl/rewards pmorl/policies | tr '\n' ' ')" = "pmorl/policies: pmorl  pmorl/rewards: told "
check "psoups: one reward for each" test "$(ls psoups/rewards | tr '\n' ' ')" = "$symbols "
check "psoups: one policy for each" test "$(ls psoups/policies | tr '\n' ' ')" = "$symbols "
check "psoups: they were trained" grep -q '"subject": "P3B"' psoups/metrics-policies.jsonl
check "psoups: validated" grep -q '"phase": "validation", "subject": "P1A"' psoups/metrics-policies.jsonl
check "mt: supervised" grep -q '"subject": "mt".*"loss"' mt/metrics-policies.jsonl
for a in rlhf/policies/rlhf pmorl/policies/pmorl mt/policies/mt psoups/policies/P2B; do
    ok generate --model base --adapter a=$a --mix a=1 --prompt "Why?" --max-new-tokens 4
done

# The responses are those that the same prompts, mixes and words give elsewhere.
put check.jsonl '{"prompt": "<|user|>\\nName a star. Generate a response that can be easily understood by an elementary school student. Generate a response that is very informative, without missing any background information. Generate a response that is friendly, witty, funny, and humorous, like a close friend.\\n<|assistant|>\\n", "mix": {"P1A": 0.33333334, "P2B": 0.33333334, "P3A": 0.33333334}}\n'
ok generate --model base --adapter P1A=psoups/policies/P1A --adapter P2B=psoups/policies/P2B --adapter P3A=psoups/policies/P3A \
    --prompts check.jsonl --max-new-tokens 6 --temperature 0 --no-repeat-ngram 3
sed 's/.*"completion": \("[^"]*"\).*/\1/' out >one
config greedy ', "rewards": "psoups/rewards"' "$rows" "$(echo "$sizes" | sed 's/"min_new_tokens": 0/"min_new_tokens": 0, "temperature": 0/')"
trains run psoups --config run.json
sed -n '2s/.*"completion": \("[^"]*"\).*/\1/p' greedy/responses/ABA.jsonl >two
check "a soup's response is the mix's" cmp -s one two
check "rewards trained before, the same policies" cmp -s greedy/policies/P1B/adapter_model.safetensors psoups/policies/P1B/adapter_model.safetensors
check "and none are trained" test ! -e greedy/rewards -a ! -e greedy/metrics-rewards.jsonl

# ---- forms --------------------------------------------------------------------------------------
config factors ', "soup": "factors"'
trains run psoups --config run.json
check "factors: a file for each user" test "$(ls factors/soups | tr '\n' ' ')" = "$users "
ok merge --method factors --out soup factors/policies/P1A=0.3333333333333333 factors/policies/P2B=0.3333333333333333 factors/policies/P3A=0.3333333333333333
check "factors: as psoup merge makes it" cmp -s soup/adapter_model.safetensors factors/soups/ABA/adapter_model.safetensors
config told ', "reward_form": "told", "save_soups": true'
trains run psoups --config run.json
check "told: one reward for all policies" test "$(ls told/rewards told/policies | tr '\n' ' ')" = "told/policies: $symbols  told/rewards: told "
check "delta: a soup of rank 6" grep -q '"r": 6' told/soups/ABA/adapter_config.json
config said '' "$rows" "$(echo "$sizes" | sed 's/"ppo": {/"ppo": {"samples_every": 1, "samples_count": 1, /')"
trains run rlhf --config run.json
check "what the policy says, before, between and after" test "$(grep -c '"policy": "rlhf".*"response"' said/samples.jsonl)" -eq 3
config each ', "reward_form": "each", "new_preferences": true' "$(echo "$rows" | sed 's/"P3B": "P3B.json"/"P3B": "P3B.json", "P3C": "P3A.json", "P3D": "P3B.json"/')"
trains run pmorl --config run.json
check "pmorl with a reward for each of eight" test "$(ls each/rewards | tr '\n' ' ')" = "$symbols P3C P3D "
check "sixteen users" test "$(ls each/responses | wc -l)" -eq 16

# ---- before a judge -----------------------------------------------------------------------------
ok judge --judge "$helpers/judge" --judge first --helpfulness --out duels.jsonl psoups pp
check "a duel for every user and prompt" lines duels.jsonl 16
check "by the user's criteria" grep -q '^{"prompt": 1, "user": "ABA", "criteria": {"P1A": 1, "P2B": 1, "P3A": 1}, "helpfulness": 1}$' duels.jsonl
ok winrate duels.jsonl
check "and won" has '^aggregate  *100.0 %'
ok judge --judge "$helpers/judge" --judge first --swap --out swapped.jsonl psoups/responses/AAA.jsonl pp/responses/AAA.jsonl --json
check "a verdict by place alone is a tie" test "$(grep -c '"criteria": {"P1A": 0, "P2A": 0, "P3A": 0}}' swapped.jsonl)" -eq 2
check "json" has '{"output": "swapped.jsonl", "duels": 2}'
no 2 'expected two sides' judge --judge x --out left/d psoups
no 2 'expected --judge' judge --out left/d psoups pp
no 1 'none.jsonl' judge --judge x --out left/d none.jsonl pp
no 1 'psoups has 16 responses, .*AAA.jsonl 2' judge --judge x --out left/d psoups pp/responses/AAA.jsonl
no 1 'row 1 answers other prompts or users' judge --judge x --out left/d psoups/responses/AAA.jsonl pp/responses/BBB.jsonl
no 1 'left: has no responses/: expected a directory of psoup run' judge --judge x --out left/d left pp
no 2 'unexpected "--join"' run psoups --config run.json --join
no 1 'judge' judge --judge none-such-judge --out left/d psoups pp
no 1 'judge sleep: silent for 0.2 seconds' judge --judge sleep --judge 60 --patience 0.2 --out left/d psoups pp
no 1 'judge cat: none of its 48 answers was understood' judge --judge cat --out left/d psoups pp
no 1 'patience of -1 seconds' judge --judge sleep --judge 60 --patience -1 --out left/d psoups pp
# where duels cannot go is known before the judge is asked
no 1 'left/no/d: cannot create' judge --judge "$helpers/judge" --judge dies --out left/no/d psoups pp
put odd.jsonl '{"prompt": 1, "user": "A", "preferences": ["P9"], "instruction": "a", "completion": "b"}\n'
no 1 'odd.jsonl: row 1: "preferences": "P9" is not' judge --judge x --out left/d odd.jsonl odd.jsonl
put odd.jsonl '{"prompt": 1, "user": "A", "instruction": "a", "completion": "b"}\n'
no 1 'odd.jsonl: row 1: "preferences" is missing' judge --judge x --out left/d odd.jsonl odd.jsonl

# ---- the preset ---------------------------------------------------------------------------------
ok run psoups --print-config
check "delta" has '"soup": "delta"'
check "validated" has '"validate_every": 10'
ok run psoups --preset rlphf --print-config
for s in '"soup": "factors"' '"ignore_stop": true' '"draw_new_tokens_from": 32' '"lora_dropout": 0.1' '"max_steps": 1000' \
    '"loss_on_prompt": true' '"whiten_groups": 4'; do check "preset: $s" has "$s"; done
# flat: a printed configuration as lines of section.name value
flat() { awk -F'"' '/^  "[a-z_]*": {$/ { s = $2 "." } /^  }/ { s = "" } / [^{}]*$/ && NF > 2 { print s $2, $0 }' "$1"; }
cp out preset
"$psoup" run psoups --print-config >default
flat default >flat.default
flat preset | diff flat.default - | sed -n 's/^> \([a-z_.]*\) .*/\1/p' >changed
check "preset: it changes settings" test "$(wc -l <changed)" -ge 17
while read -r name; do
    section=${name%"${name##*.}"} member=${name##*.}
    check "preset: docs/fidelity.md says of $name" grep -q "^| \`$section.*\b$member\`" "$docs/fidelity.md"
done <changed
cp preset out
check "what the run sets itself is not asked for" test "$(grep -c 'checkpoint_dir\|"metrics"' out)" -eq 0
config rlphf '' "$rows" "$(echo "$sizes" | sed 's/"batch_size": 4/"batch_size": 4, "draw_new_tokens_from": 2/')"
trains run psoups --preset=rlphf --config run.json
check "preset: soups by factors" test -f rlphf/soups/AAA/adapter_model.safetensors
ok run --help
for name in $("$psoup" run psoups --print-config | sed -n 's/^ *"\([a-z_0-9]*\)": [^{]*$/\1/p'); do
    check "--help: $name is documented" has "^  $name  *[A-Za-z0-9\"\\[{].*[.;:].*("
done

# ---- what is refused ----------------------------------------------------------------------------
no 2 'expected a method' run
no 2 'not "soup"' run soup --config run.json
no 2 'expected --config' run vb
no 2 'rlphg' run vb --preset rlphg --config run.json
put bad.json '{"modle": "base"}'
no 1 'bad.json: unknown member "modle"; the nearest known one is "model"' run vb --config bad.json
put bad.json '{"ppo": {"setps": 1}}'
no 1 'bad.json: ppo: unknown member "setps"; the nearest known one is "steps"' run vb --config bad.json
put bad.json '{"ppo": 3}'
no 1 'bad.json: ppo: expected an object' run vb --config bad.json
put bad.json '{"ppo": {"checkpoint_dir": "x"}}'
no 1 'unknown member "checkpoint_dir"' run vb --config bad.json
bad() { # PATTERN METHOD MEMBERS
    put bad.json "{\"output\": \"left/r\", $3}"
    no 1 "$1" run $2 --config bad.json
}
only='"model": "base", "evaluation": "koala.json"'
bad 'names no "model"' vb '"evaluation": "koala.json"'
bad 'vb trains nothing: expected "evaluation"' vb '"model": "base"'
bad 'psoups needs reward models: expected "rewards".*or "reward_data"' psoups "$only, \"prompts\": \"alpaca.json\""
bad 'mt needs "examples"' mt "$only"
bad 'expected "prompts", a file or {"rlhf"' rlhf "$only, \"reward_data\": \"general.json\""
bad 'held_out is 1' rlhf "$only, \"held_out\": 1"
bad 'none.json' pp '"model": "base", "evaluation": "none.json"'
put odd.json '[{"prompt": "a"}, {"text": "b"}]'
bad 'odd.json: row 2: "instruction" (or "prompt") is missing' psoups "$only, \"prompts\": \"odd.json\", $rows"
bad 'odd.json: row 2: "instruction" (or "prompt") is missing' vb '"model": "base", "evaluation": "odd.json"'
put odd.json '[{"user_input": "a", "completion_a": "b", "completion_b": "c"}, {"user_input": "a", "completion_a": "b"}]'
bad 'odd.json: row 2: "completion_b" is missing' rlhf "$only, \"prompts\": \"alpaca.json\", \"reward_data\": \"odd.json\""
bad 'odd.json: row 1: "preference" is missing' pmorl "$only, \"prompts\": \"alpaca.json\", \"reward_data\": \"odd.json\""
bad 'reward_data: no comparisons .* "P1B"' psoups "$only, \"prompts\": \"alpaca.json\", \"reward_data\": {\"P1A\": \"P1A.json\"}"
bad 'reward_data: "P9Z": expected' psoups "$only, \"prompts\": \"alpaca.json\", \"reward_data\": {\"P9Z\": \"P1A.json\"}"
bad 'P1A.json: row 1: "kind" is missing' mt "$only, \"examples\": \"P1A.json\""
bad 'rewards: expected a directory, or {"told"' pmorl "$only, \"prompts\": \"alpaca.json\", \"rewards\": {\"P1A\": \"psoups/rewards/P1A\"}"
bad 'left/none/told' pmorl "$only, \"prompts\": \"alpaca.json\", \"rewards\": \"left/none\""
put odd.json '[{"user_input": "a", "completion_a": "b", "completion_b": "c", "preference": "P1A"}]'
bad 'odd.json: row 1: "preference": rlhf compares by general' rlhf "$only, \"prompts\": \"alpaca.json\", \"reward_data\": \"odd.json\""
bad 'alpaca.json: all 4 prompts have max_prompt_tokens, 3, or more' rlhf "$only, \"prompts\": \"alpaca.json\", $rows, \"max_prompt_tokens\": 3"

put bad.json "{$only, \"output\": \"koala.json/r\"}"
no 1 'bad.json: output: "koala.json/r" cannot be made in' run vb --config bad.json
put bad.json "{$only, \"output\": \"\"}"
no 1 'bad.json: output is empty' run vb --config bad.json
# what the last stage would refuse is refused before the first
for last in '"temperature": -1|temperature is -1' '"max_new_tokens": 0|max_new_tokens 0' '"max_sequences": -1|max_sequences -1'; do
    put bad.json "{\"output\": \"left/r\", $files, $rows, \"generate\": {${last%|*}}}"
    no 1 "${last#*|}" run psoups --config bad.json --json
done

long=$(printf 'why? %.0s' $(seq 120)) # nor does a week of training end at a prompt that the model cannot hold
put long.json "[{\"prompt\": \"a\"}, {\"prompt\": \"$long\"}]"
put bad.json "{\"output\": \"left/r\", \"model\": \"base\", \"prompts\": \"alpaca.json\", \"evaluation\": \"long.json\", $rows}"
no 1 'long.json: row 2 is a prompt of [0-9]* tokens for user AAA; the model holds 256, prompt and response together' run psoups --config bad.json --json
no 1 'long.json: row 2 is a prompt of [0-9]* tokens; the model holds' run vb --config bad.json --json

for bad in 'ppo|"ppo": {"batch_size": 0}|batch_size is 0: expected 1 to 2147483647' 'sft|"sft": {"beta1": 1}|beta1 is 1: expected 0 to below 1' \
    'reward|"reward": {"batch_size": -1}|batch_size is -1: expected 1' 'generate|"generate": {"temperature": -1}|temperature is -1'; do
    case $bad in sft*) m=mt ;; *) m=psoups ;; esac
    put bad.json "{\"output\": \"left/r\", $files, $rows, $(echo "$bad" | cut -d'|' -f2)}"
    no 1 "^psoup: bad.json: ${bad%%|*}: ${bad##*|}" run $m --config bad.json --json
done

# ---- memory -------------------------------------------------------------------------------------
config plan
"$psoup" run psoups --config run.json --plan >out 2>err
check "--plan" test $? -eq 0 -a ! -e plan
for stage in rewards policies responses; do
    check "--plan: $stage" has "^memory of $stage: [0-9.]* [KM]iB: base [0-9].*, adapters .*, learning .*, activations .*, logits .*, cache .*, rows "
done
no 1 'run.json: rewards need [0-9.]* MiB (base .*, rows .*), --memory-limit is 100 KiB: ' run psoups --config run.json --memory-limit 100K --json
check "nothing was begun" test ! -e plan
config blocks ', "dtype": "nf4"'
trains run rlhf --config run.json
check "a base in blocks" grep -q 'memory of policies: .*; the base is f32, its linears nf4$' err
config left/huge '' "$rows" "$(echo "$sizes" | sed 's/"batch_size": 4, "max_new/"batch_size": 100000000, "mini_batch_size": 4, "max_new/')"
no 1 'run.json: policies need [0-9.]* [TG]iB (.*), there are .* GiB: ppo.batch_size makes it less' run psoups --config run.json --json
no 2 '--memory-limit: "much"' run psoups --config run.json --memory-limit much

# ---- killed, and going on -----------------------------------------------------------------------
# alike WHAT: kept/ has the bytes of psoups/.
alike() {
    for f in rewards/P2A/adapter_model.safetensors policies/P1A/adapter_model.safetensors policies/P3B/adapter_model.safetensors \
        responses/AAA.jsonl responses/BBA.jsonl; do
        check "$1: $f" cmp -s psoups/$f kept/$f
    done
}
config kept
killed=0 seed=$(date +%s) most=3
test -n "$PSOUP_LONG" && most=20
while test $killed -lt $most; do
    seed=$(((seed * 1103515245 + 12345) % 2147483648))
    "$psoup" run psoups --config run.json --resume >out 2>err &
    sleep "$(echo "$seed" | awk '{printf "%.3f", $1 / 2147483648 * 0.5}')"
    kill -KILL $! 2>/dev/null
    if wait $! 2>/dev/null; then
        alike "killed $killed times"
        rm -rf kept
    fi
    killed=$((killed + 1))
done
"$psoup" run psoups --config run.json --resume >out 2>err
check "a killed run goes on" test $? -eq 0
alike "killed $killed times"
rm -rf kept/policies/P2A kept/responses
"$psoup" run psoups --config run.json --resume >out 2>err
check "what is missing is made again" test $? -eq 0
check "and only that" grep -q 'rewards: finished before' err
alike "made again"
check "the policy that was missing" cmp -s psoups/policies/P2A/adapter_model.safetensors kept/policies/P2A/adapter_model.safetensors
config kept ', "seed": 7'
no 1 'kept/config.json: is of another run: its seed was 0, is 7' run psoups --config run.json --resume
config kept '' "$rows" "$(echo "$sizes" | sed 's/"steps": 2/"steps": 3/')"
no 1 'is of another run: its ppo.steps was 2, is 3' run psoups --config run.json --resume

echo "run: $passed passed, $failed failed"
test $failed -eq 0
