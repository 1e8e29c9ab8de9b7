#!/bin/sh
# Every command of the psoup program for real, on a tiny world of its own, and what it says to bad
# input: one line, exit status 1 (2 for a wrong command line), nothing half-written.
#   sh tests/cli.sh PATH_TO_PSOUP        its helpers are beside it, in tests/
# shellcheck disable=SC2086,SC2013,SC2012,SC2059 # lists of options and names are split on purpose

suite=cli
docs=$(cd "$(dirname "$0")/../docs" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tests/shell_case.sh
. "$here/shell_case.sh"

# near A B [D]: the numbers in "logprobs" of two files agree within D (1e-4), and there are some.
near() {
    for f in "$1" "$2"; do
        sed 's/.*"logprobs": \[\([^]]*\)\].*/\1/' "$f" | tr -d ' ' | tr ',' '\n' >"$f.numbers"
    done
    paste "$1.numbers" "$2.numbers" |
        awk -v most="${3:-1e-4}" '{ d = $1 - $2; n++; if (d > most || d < -most || NF != 2 && NF != 0) bad = 1 }
             END { exit bad || n < 3 }'
}

# plan_of MEMBER [FILE]: what a plan as JSON says of it.
plan_of() { sed -n "s/.*\"$1\": \([0-9]*\).*/\1/p" "${2:-out}"; }

check "make_tiny" "$helpers/make_tiny" .
A="--adapter P1A=P1A --adapter P2A=P2A"

# ---- the command line ---------------------------------------------------------------------------
"$psoup" >out 2>err
check "no command: 2" test $? -eq 2
ok --version
check "version" has '^psoup [0-9]'
ok --help
check "help shows the way" test "$(sed -n '/^The way/,/^$/p' out | grep -c '^  psoup\|^psoup dpo')" -eq 7
cp out help
ok help
check "help, as --help" cmp -s help out
ok -h
check "-h, as --help" cmp -s help out
ok help merge
check "help of one" has '^Usage: psoup merge'
no 2 'unknown command "soup"' help soup
cp help out
commands="info tokenize generate score feedback sft reward dpo ppo run plot merge inspect judge winrate"
for c in $commands; do check "help lists $c" has "^  $c "; done
for c in $commands; do
    ok $c --help
    check "$c --help: usage" has "^Usage: psoup $c"
    check "$c --help: --json" has '^  --json'
    cp out help
    ok $c -h
    check "$c -h: the same" cmp -s help out
    no 2 "--nonsense" $c --nonsense
done
for pair in "tokenize --model --no-special --decode" "merge --out --base --method --dtype --any-sum --strength" \
    "generate --model --adapter --mix --mix-method --strength --any-sum --prompt --prompts --template --preference \
     --max-new-tokens --min-new-tokens --temperature --top-k --top-p --no-repeat-ngram --seed --batch --best-of --reward --out" \
    "score --model --adapter --mix --mix-method --strength --any-sum --tokens --prompts --logits" "winrate --seed"; do
    set -- $pair
    c=$1
    shift
    "$psoup" $c --help >out
    for option; do check "$c --help: $option" has "^  $option"; done
done
no 2 'unknown command "soup"' soup
no 2 'expected one directory' info
no 2 '--model needs a value' generate --model
no 2 '--seed: "x"' generate --seed x
no 2 '--top-k: "1.5"' generate --top-k 1.5
no 2 '--temperature: "nan"' generate --temperature nan
no 2 'takes no value' generate --json=1
no 2 'expected --model' generate --prompt x
no 2 'expected --model' score --tokens 1
no 2 'either --prompt' generate --model base
no 2 'either --prompt' generate --model base --prompt x --prompts y
no 2 'either --tokens' score --model base
no 2 'expected --model DIR and one TEXT' tokenize --model base
no 2 'expected one file' winrate

# ---- info ---------------------------------------------------------------------------------------
ok info base
check "model" has '^kind  *model'
ok info base --json
check "json" has '"kind": "model", "parameters": 14800, "vocab_size": 300, "hidden_size": 16'
check "tokens" has '"tokenizer_tokens": 300'
ok info base --dtype nf4 --json
check "blocks" has '"linear_dtype": "nf4"'
no 1 '"int3", expected f32, f16, bf16, int8 or nf4' info base --dtype int3
ok info P1A --json
check "adapter" has '"kind": "adapter", "parameters": 256, "modules": 4.*"r": 2, .*"target_modules": \["q_proj", "v_proj"\]'
no 1 'none' info none
cp -r base broken
put broken/tokenizer.json '{"model": '
no 1 'broken/tokenizer.json' info broken

# ---- tokenize -----------------------------------------------------------------------------------
ok tokenize --model base "Why does it rain? é</s>"
ids=$(cat out)
check "ids" has '^[0-9 ]* 256$'
ok tokenize --model base --decode "$ids"
check "round trip" has '^Why does it rain? é$'
ok tokenize --model base/tokenizer.json --json "é</s>"
check "offsets" has '"tokens": \[.*"</s>"\], "offsets": \[.*\[2, 6\]\]'
no 1 '300' tokenize --model base --decode 300
no 1 '"x2"' tokenize --model base --decode "1 x2"
no 1 'none' tokenize --model none x

# ---- generate -----------------------------------------------------------------------------------
sample="--max-new-tokens 12 --seed 5"
ok generate --model base --prompt "Why?" $sample
mv out one
ok generate --model base --prompt "Why?" $sample --threads 1
check "one thread, the same text" cmp -s out one
ok generate --model base --prompt "Why?" --max-new-tokens 12 --seed 6
check "another seed, another text" differ out one
ok generate --model base --prompt "Why?" $sample --dtype f32
check "f32, the same text" cmp -s out one
ok generate --model base $A --mix P1A=0.5,P2A=0.5 --prompt "Why?" $sample --dtype int8
ok generate --model base $A --mix P1A=0.5,P2A=0.5 --prompt "Why?" $sample
check "a soup, another text" differ out one
ok generate --model base --prompt "Why?" $sample --json
check "json" has '"prompt": "Why?", "completion": ".*", "finish": "[a-z]*", "tokens": [0-9]*, "logprob": -'
put prompts.jsonl '{"prompt": "Why?", "mix": {"P1A": 1}}\n
{"instruction": "Why?", "input": "Rain", "preference": "Be kind.", "mix": {"P1A": 0.25, "P2A": 0.75}, "mark": [7]}
{"prompt": "Why?", "mix": {}}\n{"prompt": "Why?"}\n'
ok generate --model base $A --mix P2A=1 --prompts prompts.jsonl $sample --out mixed.jsonl.zst
check "nothing printed" lines out 0
ok generate --model base $A --mix P2A=1 --prompts prompts.jsonl $sample --batch 1
mv out mixed.jsonl
check "four rows" lines mixed.jsonl 4
check "rows keep their members" grep -q '"mark": \[7\], "completion"' mixed.jsonl
put head.jsonl '{"prompt": "Why?", "mix": {"P1A": 1}}\n'
ok generate --model base $A --prompts head.jsonl $sample
head -n 1 mixed.jsonl >first
check "a row alone, the same text" cmp -s out first
ok generate --model base --prompt "$(printf 'a\377')" $sample --json
check "a prompt that is not UTF-8" has '"prompt": "a�", "completion"'
# written rows are prompts again: their "prompt" is still there
ok generate --model base $A --prompts mixed.jsonl.zst --temperature 0 --max-new-tokens 2
check "compressed rows are read" lines out 4
# every token that generation_config.json names ends a text
ok generate --model base --prompt "Why?" $sample --json
check "not ended" has '"finish": "length", "tokens": 12'
letters=$(sed 's/.*"completion": "//; s/", "finish".*//' out | tr -cd 'A-Za-z' | cut -c1-6)
cp -r base ended
ids=$("$psoup" tokenize --model base --json "$(echo "$letters" | sed 's/./& /g')" | sed 's/.*"ids": \[\([^]]*\)\].*/\1/')
put ended/generation_config.json "{\"eos_token_id\": [256, $(echo "$ids" | tr -d ' ' | tr , '\n' | sort -u | head -7 | paste -sd,)], \"temperature\": 0.1}"
ok info ended --json
check "end tokens" has '"eos_token_id": 256, "end_tokens": \[256, [0-9]*, [0-9]*'
ok generate --model ended --prompt "Why?" $sample --json
check "ended" has '"finish": "stop", "tokens": \([1-9]\|1[01]\),'
ok generate --model ended --prompt "Why?" $sample --json --ignore-stop
check "or not, where it is told to go on" has '"finish": "length", "tokens": 12'
put ended/generation_config.json '{"eos_token_id": "</s>"}'
no 1 'ended/generation_config.json: eos_token_id: expected a token id or a list' generate --model ended --prompt x
ok generate --model base --template tulu --preference "Be kind." --prompt "Why?" $sample
no 1 'none/adapter_config.json' generate --model base --adapter P1A=none --prompt x
no 1 'expected NAME=DIR' generate --model base --adapter P1A --prompt x
no 1 'P1A' generate --model base --adapter P1A=P1A --adapter P1A=P2A --prompt x
no 1 'P3A' generate --model base $A --mix P3A=1 --prompt x
no 1 'sum to 1.25' generate --model base $A --mix P1A=0.5,P2A=0.75 --prompt x
no 1 'mix' generate --model base $A --mix P1A=x --prompt x
no 1 'mix' generate --model base $A --mix P1A --prompt x
ok generate --model base $A --mix P1A=0.5,P2A=0.75 --any-sum --prompt x $sample
no 1 '--mix-method: mix method "sum"; expected delta' generate --model base $A --mix P1A=1 --mix-method sum --prompt x
put methods.jsonl '{"prompt": "Why?", "mix": {"P1A": 0.5, "P2A": 0.5}, "mix_method": "factors"}
{"prompt": "Why?", "mix": {"P1A": 0.5, "P2A": 0.5}}\n'
ok generate --model base $A --prompts methods.jsonl $sample
head -n 1 out | sed 's/.*"finish"/"finish"/' >first
ok generate --model base $A --mix P1A=0.5,P2A=0.5 --mix-method factors --prompt "Why?" $sample --json
sed -i 's/.*"finish"/"finish"/' out
check "a row's own method, the same log-prob" cmp -s out first
put methods.jsonl '{"prompt": "Why?", "mix": {"P1A": 0.5, "P2A": 0.5}, "mix_method": "logits", "strength": 1.5}\n'
ok generate --model base $A --prompts methods.jsonl $sample
sed 's/.*"finish"/"finish"/' out >first
ok generate --model base $A --mix P1A=0.5,P2A=0.5 --mix-method logits --strength 1.5 --prompt "Why?" $sample --json
sed -i 's/.*"finish"/"finish"/' out
check "a row's own strength, the same log-prob" cmp -s out first
no 1 'sum to 1.5' generate --model base $A --mix P1A=0.75,P2A=0.75 --strength 1 --prompt x
no 1 'prompt 0 mixes the logits of 3 policies' generate --model base $A --mix P1A=0.5,P2A=0.5 --mix-method logits \
    --strength 1.5 --batch 2 --prompt x
put strength.jsonl '{"prompt": "Why?", "strength": "big"}\n'
no 1 'strength.jsonl:1: strength: expected a number' generate --model base --prompts strength.jsonl
for bad in '{"prompt": "a", "mix": {"P9Z": 1}}|:2: mix: no adapter is named "P9Z"' \
    '{"prompt": "a", "mix": {"P1A": 0.5}}|:2: mix: the weights sum to 0.5' \
    '{"prompt": "a", "mix": {"P1A": "x"}}|:2: mix: the weight of "P1A"' \
    '{"prompt": "a", "mix": "P1A"}|:2: mix: expected an object' \
    '{"text": "a"}|:2: expected a text "prompt"' '{"prompt": ""}|:2: no tokens' '{"prompt": 5}|:2: prompt: expected a text' \
    '{"instruction": "a", "input": [1]}|:2: input: expected a text' "{\"prompt\": \"$(seq -s ' ' 99)\"}|:2: [0-9]* tokens, expected at most 255" \
    '{"prompt": |:2' '[1]|:2'; do
    put bad.jsonl '{"prompt": "Why?"}\n'
    printf '%s\n' "${bad%|*}" >>bad.jsonl
    no 1 "${bad##*|}" generate --model base $A --prompts bad.jsonl --out left/g.jsonl
done
no 1 'none.jsonl' generate --model base --prompts none.jsonl --out left/g.jsonl
put empty.jsonl ''
no 1 'empty.jsonl: no prompts in it' generate --model base --prompts empty.jsonl --out left/g.jsonl
ok generate --model base --prompt x --plan
check "--plan says it alone" has '^memory of answers: [0-9.]* [KM]iB: base .*, cache .*, rows '
check "and no answer" lines out 1
ok generate --model base --prompt x --batch 1 --plan --json
cp out one
ok generate --model base $A --mix P1A=0.5,P2A=0.5 --mix-method logits --prompt x --batch 3 --plan --json
check "three policies at once take more" test "$(plan_of cache)" -gt "$(plan_of cache one)"
no 1 'base: answers need .* (base .*, rows .*), --memory-limit is 100 KiB: --batch makes it less' generate --model base --prompt x \
    --memory-limit 100K --out left/g.jsonl
no 2 '--memory-limit: "much", expected a size as 24G' generate --model base --prompt x --memory-limit much
no 1 'left/no/g.jsonl' generate --model base --prompt x --out left/no/g.jsonl
no 1 'name of the file to write is empty' generate --model base --prompt x --out ""
no 1 'temperature' generate --model base --prompt x --temperature -1 --out left/g.jsonl
no 2 'max-new-tokens' generate --model base --prompt x --max-new-tokens 0; no 2 'with a --template' generate --model base --prompt x --preference y

# ---- score --------------------------------------------------------------------------------------
tokens="5 17 262 88 30"
ok score --model base --tokens "$tokens"
check "four scores and their sum" lines out 5
check "the sum is last" grep -q '^sum -' out
ok score --model base $A --mix P1A=0.5,P2A=0.5 --tokens "$tokens" --json --logits logits.safetensors
mv out soup
header=$(od -An -tu8 -N8 logits.safetensors | tr -d ' ')
check "logits: f32 [5, 300]" test "$(size logits.safetensors)" -eq $((8 + header + 4 * 5 * 300))
check "their shape" grep -q '"shape": *\[5, *300\]' logits.safetensors
put score.jsonl '{"tokens": [5, 17, 262, 88, 30], "mix": {"P1A": 0.5, "P2A": 0.5}}
{"prompt": "Why", "completion": " does it rain?"}\n{"tokens": [5]}\n'
ok score --model base $A --prompts score.jsonl --json
head -n 1 out >first
check "a row's own mix, the same bits" cmp -s first soup
check "three rows" lines out 3
ok score --model base $A --prompts score.jsonl --json --threads 1
head -n 1 out >first
check "one thread, the same bits" cmp -s first soup
no 1 '300' score --model base --tokens "5 300" --logits left/l.safetensors
no 1 '"-1"' score --model base --tokens "5 -1"
no 1 'no tokens' score --model base --tokens ""
no 1 'unknown\|no adapter' score --model base $A --mix X=1 --tokens "$tokens" --logits left/l
put bad.jsonl '{"tokens": [1, "x"]}\n'
no 1 'bad.jsonl:1: tokens\[1\]' score --model base --prompts bad.jsonl
for bad in '{"tokens": []}|no tokens' '{"tokens": "1 2"}|tokens: expected a list' '{"tokens": [5, 300]}|token 300, expected 0 to 299' \
    '{"prompt": "a", "completion": 1}|completion: expected a text' "{\"tokens\": [$(seq -s, 257)]}|257 tokens, expected at most 256"; do
    printf '{"tokens": [5, 6]}\n%s\n' "${bad%|*}" >bad.jsonl
    no 1 "bad.jsonl:2: ${bad##*|}" score --model base --prompts bad.jsonl --logits left/l
done
no 1 'empty.jsonl: no rows in it' score --model base --prompts empty.jsonl --logits left/l

# ---- bad files ----------------------------------------------------------------------------------
# spoil NAME: a fresh copy of the base to break
spoil() {
    rm -rf broken
    cp -r base broken
}
weights=broken/model.safetensors
use="score --model broken --tokens 1 --logits left/l"
spoil; rm $weights; no 1 'model.safetensors' $use
spoil; rm broken/config.json; no 1 'config.json' $use
spoil; put broken/config.json '{"hidden_size": 16'; no 1 'config.json' $use
spoil; put broken/config.json '[]'; no 1 'config.json' $use
spoil; sed -i 's/"hidden_size": 16/"hidden_size": 32/' broken/config.json; no 1 'shape\|expected' $use
spoil; sed -i 's/"hidden_size": 16/"hidden_size": -16/' broken/config.json; no 1 'hidden_size' $use
spoil; sed -i 's/"hidden_size": 16/"hidden_size": "x"/' broken/config.json; no 1 'hidden_size' $use
spoil; sed -i 's/"num_attention_heads": 2/"num_attention_heads": 0/' broken/config.json
no 1 'num_attention_heads' $use
spoil; head -c 30000 base/model.safetensors >$weights; no 1 'model.safetensors' $use
spoil; head -c 5 base/model.safetensors >$weights; no 1 'model.safetensors' $use
spoil; : >$weights; no 1 'model.safetensors' $use
spoil; patch $weights 0 '\377\377\377\377\377\377\377\177'; no 1 'model.safetensors' $use
spoil; patch $weights 8 'xx'; no 1 'model.safetensors' $use
spoil; echo more >>$weights; no 1 'model.safetensors' $use
spoil; LC_ALL=C sed -i 's/"shape":\( *\)\[300/"shape":\1[301/' $weights; no 1 'model.safetensors' $use
spoil; LC_ALL=C sed -i 's/"data_offsets":\( *\)\[0,/"data_offsets":\1[4,/' $weights
no 1 'model.safetensors' $use
spoil; patch $weights $(($(size $weights) - 4)) '\377\377\377\377'; no 1 'NaN' $use
spoil; put broken/tokenizer.json '{"model": {"type": "WordPiece"}}'
no 1 'tokenizer.json' generate --model broken --prompt x
spoil; rm broken/tokenizer.json; no 1 'tokenizer.json' generate --model broken --prompt x
ok score --model broken --tokens "1 2"

adapt() {
    rm -rf bent
    cp -r P1A bent
}
bent=bent/adapter_model.safetensors
use="score --model base --adapter bent=bent --mix bent=1 --logits left/l --tokens 1"
adapt; rm $bent; no 1 'bent' $use
adapt; rm bent/adapter_config.json; no 1 'adapter_config.json' $use
adapt; put bent/adapter_config.json '{}'; no 1 'adapter_config.json' $use
adapt; sed -i 's/"r": 2/"r": 3/' bent/adapter_config.json; no 1 'bent' $use
adapt; sed -i 's/"r": 2/"r": 0/' bent/adapter_config.json; no 1 'adapter_config.json' $use
adapt; sed -i 's/"LORA"/"LOHA"/' bent/adapter_config.json; no 1 'LOHA' $use
adapt; head -c 1500 P1A/adapter_model.safetensors >$bent; no 1 'adapter_model.safetensors' $use
no 1 'bent/adapter_model.safetensors' info bent
adapt; LC_ALL=C sed -i 's/\[16,\( *\)2\]/[2,\116]/' $bent; no 1 'lora_B \[2, 16\]' $use
# An adapter that diverged: only who uses it hears of it.
adapt; patch $bent $(($(size $bent) - 4)) '\377\377\377\377'
no 1 'bent: .* holds a NaN' info bent
bent="--adapter P1A=P1A --adapter P2A=P2A --adapter bent=bent"
ok score --model base $bent --mix P1A=0.5,P2A=0.5 --tokens "$tokens" --json
check "a NaN beside, the same bits" cmp -s out soup
no 1 'not numbers\|NaN' score --model base $bent --mix bent=1 --tokens "1 2 3"
no 1 'the logits are not numbers' generate --model base $bent --mix bent=1 --prompt "Why?"
put prompts.nan '{"prompt": "Why?", "mix": {"P1A": 1}}\n{"prompt": "Why?", "mix": {"bent": 1}}\n'
"$psoup" generate --model base $bent --prompts prompts.nan $sample >out 2>err
check "a diverged row: status 1" test $? -eq 1
check "a diverged row: it is named" grep -q '^psoup: prompts.nan:2: the logits are not numbers' err
head -n 1 out >first
"$psoup" generate --model base $A --prompts head.jsonl $sample >out
check "a diverged row: its neighbour is well" cmp -s out first

# ---- merge --------------------------------------------------------------------------------------
ok merge --out m-delta P1A=0.5 P2A=0.5 --json
check "report" has '"tensors": 8, "worst_error": 0'
ok score --model base --adapter m=m-delta --mix m=1 --tokens "$tokens" --json
check "the merged adapter is the mix" near out soup
ok merge --base base --out m-base P1A=0.5 P2A=0.5
ok score --model m-base --tokens "$tokens" --json
check "the folded model is the mix" near out soup
ok merge --method svd:4 --out m-svd4 P1A=0.5 P2A=0.5
ok score --model base --adapter m=m-svd4 --mix m=1 --tokens "$tokens" --json
check "svd of the full rank is the mix" near out soup
ok merge --method svd:2 --out m-svd P1A=0.5 P2A=0.5 --json
check "svd:2 loses something" has '"worst_error": 0\.[0-9]*[1-9]'
ok merge --method factors --out m-factors P1A=0.5 P2A=0.5
check "factors says what it loses" has 'mean 0\.[0-9]*, worst 0\.'
ok score --model base --adapter m=m-svd --mix m=1 --tokens "$tokens"
ok score --model base $A --mix P1A=0.5,P2A=0.5 --mix-method factors --tokens "$tokens" --json
mv out soup-factors
ok score --model base --adapter m=m-factors --mix m=1 --tokens "$tokens" --json
check "factors per row are the merged ones" near out soup-factors
check "and not the soup" differ soup-factors soup
ok score --model base $A --mix P1A=0.5,P2A=0.5 --strength 1.2 --tokens "$tokens" --json
mv out stronger
ok score --model base $A --mix P1A=0.6,P2A=0.6 --any-sum --tokens "$tokens" --json
check "a strength multiplies the weights" near out stronger
ok merge --out m-models --dtype bf16 base=0.5 m-base=0.5
ok info m-models --json
check "bf16" has '"dtype": "bf16"'
no 1 'sum' merge --out left/m P1A=0.5 P2A=0.6
ok merge --any-sum --out m-any P1A=0.5 P2A=0.6
ok merge --strength 1.5 --out m-strong P1A=0.5 P2A=0.5
ok merge --any-sum --out m-strong2 P1A=0.75 P2A=0.75
ok score --model base --adapter m=m-strong2 --mix m=1 --tokens "$tokens" --json
mv out stronger
ok score --model base --adapter m=m-strong --mix m=1 --tokens "$tokens" --json
check "a strength multiplies the weights" cmp -s out stronger
no 1 'strength 1.5 with method ties' merge --strength 1.5 --method ties --base base --out left/m P1A=0.5 P2A=0.5
no 1 'expected DIR=WEIGHT' merge --out left/m P1A
no 1 'expected DIR=WEIGHT' merge --out left/m P1A=x
no 1 'none' merge --out left/m none=1
no 1 'expected delta' merge --method mean --out left/m P1A=1
no 1 'svd:RANK' merge --method svd:0 --out left/m P1A=1
no 1 'f31' merge --dtype f31 --out left/m P1A=1
no 1 'base\|kind' merge --out left/m P1A=0.5 base=0.5
no 1 'bent' merge --out left/m P1A=0.5 bent/none=0.5
no 2 'expected --out' merge P1A=1
ok merge --verify m-models
check "verified" has '21 tensors\|[0-9]* tensors'
ok merge --replay m-models/psoup-merge.json
ok merge --replay m-models/psoup-merge.json --out m-again
check "replayed byte by byte" diff -r m-models m-again
ok merge --method ties --param density=0.5 --param density:1@mlp=0.2,0.8 --base base --out m-ties P1A=1 P2A=1
ok merge --verify m-ties
ok merge --method ties:4 --param density=0.5 --out m-ties4 P1A=1 P2A=1
ok merge --shard-size 20KB --resume --sha256 --out m-shards base=0.5 m-base=0.5
check "an index" test -f m-shards/model.safetensors.index.json
check "sha256" grep -q sha256 m-shards/psoup-merge.json
ok info m-shards
printf 'merge_method: slerp\nbase_model: base\nmodels: [{model: m-base}]\nparameters: {t: 0.5}\n' > mix.yaml
ok merge mix.yaml --out m-recipe
ok merge --verify m-recipe
ok merge --out m.gguf --dtype f16 base=1
ok merge --verify m.gguf
ok info m.gguf --json
check "a model in one file" has '"parameters": 14800.*"tokenizer_tokens": null'
no 1 'psoup merge --out DIRECTORY m.gguf=1' generate --model m.gguf --prompt x
ok merge --out a.gguf --reference base P1A=1
ok info a.gguf --json
check "an adapter of another format" has '"kind": "adapter", "parameters": 256, "modules": 4'
ok merge --base m.gguf --out m-of-gguf a.gguf=1
no 2 'a recipe says its method itself' merge mix.yaml --method ties --out left/m
no 2 'does what the certificate says' merge --replay m.psoup-merge.json --dtype f32 --out left/m
ok merge --base base --method ties --param density=0.5 --param vote=frequency --out m-votes m-base=1
no 1 'vote is 7' merge --base base --method ties --param vote=7 --out left/m m-base=1
printf 'merge_method: linear\ntop: 1\n' > mixed.yaml
no 1 'mixed.yaml:2: top: is not supported' merge mixed.yaml --out left/m
no 1 'expected NAME=VALUE' merge --param density --out left/m P1A=1
no 1 'parameter "heat"' merge --param heat=1 --out left/m P1A=1
no 1 'expected numbers' merge --param density=x --out left/m P1A=1
no 1 'expected a size' merge --shard-size big --out left/m P1A=1
no 1 'expected paper' merge --peer me --out left/m P1A=1
no 1 'expected safetensors or gguf' merge --format onnx --out left/m P1A=1
no 2 'take no sources' merge --verify m-models base=1

# ---- inspect ------------------------------------------------------------------------------------
ok inspect P1A P2A --weights 0.25,0.75 --plot m.svg
check "inspect prints the cosines" has '^cosine'
check "and the picture" grep -q '</svg>' m.svg
ok inspect P1A P2A --json
check "inspect --json names the modules" has '"modules": *\[{"name"'
no 2 'at least one adapter' inspect
no 1 'expected 2 numbers' inspect P1A P2A --weights 0.5
no 1 'left/none' inspect left/none
no 1 'cannot create' inspect P1A --plot left/none/m.svg

# ---- configurations -----------------------------------------------------------------------------
for c in feedback sft reward dpo ppo; do
    ok $c --print-config
    mv out $c.config
    ok $c --print-config --config $c.config
    check "$c: printed configurations are read" cmp -s out $c.config
    ok $c --help
    for name in $(sed -n 's/^  "\([a-z_0-9]*\)":.*/\1/p' $c.config); do
        check "$c: $name is documented" has "^  $name  *[A-Za-z0-9\"\\[{].*[.;:].*("
    done
    no 2 'expected --config' $c
    no 2 'needs a value' $c --config
    no 1 'none.json' $c --config none.json
    put bad.json '{"modle": "base"}'
    no 1 'bad.json: unknown member "modle"; the nearest known one is "model"' $c --config bad.json
    put bad.json '{"threads": "two"}'
    no 1 'bad.json: member "threads"' $c --config bad.json
    put bad.json '{"threads": 1'
    no 1 'bad.json' $c --config bad.json
    put bad.json '[]'
    no 1 'bad.json: expected an object' $c --config bad.json
    put bad.json '{}'
    no 1 'expected\|names no' $c --config bad.json
done
ok ppo --preset rlphf --print-config
check "the preset" has '"ignore_stop": true'
check "the preset's draw" has '"draw_new_tokens_from": 32'
no 2 'rlphg' ppo --preset rlphg --print-config

# ---- feedback -----------------------------------------------------------------------------------
put instructions.jsonl '{"id": 3, "instruction": "Why does it rain?"}
{"id": 4, "prompt": "Name a colour.", "input": "Not red."}\n{"id": 5, "prompt": "Why?"}\n{"id": 6, "prompt": "What?"}\n'
feedback() { # OUTPUT MORE MEMBERS
    put feedback.json "{\"model\": \"base\", \"prompts\": \"instructions.jsonl\", \"output\": \"$1\",
        \"max_new_tokens\": 6, \"seed\": 2, \"threads\": 2, \"judge\": [\"$helpers/judge\", \"first\"] $2}"
}
feedback comparisons.jsonl
ok feedback --config feedback.json
check "four comparisons of 4 prompts and 6 preferences" lines comparisons.jsonl 96
check "counts" has '^comparisons.jsonl: 96 comparisons, 0 ties'
for kind in positive-positive positive-neutral positive-negative neutral-negative; do
    check "$kind" test "$(grep -c "\"kind\": \"$kind\"" comparisons.jsonl)" -eq 24
done
check "the input is in the prompt" grep -q \
    '"id": 4, .*"user_input": "<|user|>\\nName a colour. Not red. Generate .*\\n<|assistant|>\\n"' comparisons.jsonl
feedback soup.jsonl.zst ', "adapters": {"P1A": "P1A", "P2A": "P2A"}, "mix": "P1A=0.5,P2A=0.5"'
ok feedback --config feedback.json --json
check "json" has '{"output": "soup.jsonl.zst", "written": 96, "ties": 0, "unparsed": 0}'
# candidates are the answers that the same mix gives elsewhere
for how in delta factors logits; do
    feedback soup.jsonl ", \"adapters\": {\"P1A\": \"P1A\", \"P2A\": \"P2A\"}, \"mix\": \"P1A=0.5,P2A=0.5\", \"mix_method\": \"$how\",
        \"strength\": 1.5, \"temperature\": 0, \"no_repeat_ngram_size\": 2"
    ok feedback --config feedback.json
    sed -n '/"id": 5, .*neutral-negative/s/.*"completion_a": \(".*"\), "completion_b".*/\1/p' soup.jsonl | sort -u >told
    ok generate --model base $A --mix P1A=0.5,P2A=0.5 --mix-method $how --strength 1.5 --template tulu --prompt "Why?" \
        --temperature 0 --max-new-tokens 6 --no-repeat-ngram 2 --json
    sed -n 's/.*"completion": \(".*"\), "finish".*/\1/p' out >asked
    check "feedback by $how: the answer of generate" cmp -s told asked
    cp asked asked.$how
done
check "they are not all alike" test "$(cat asked.* | sort -u | wc -l)" -gt 1
feedback sums.jsonl ', "adapters": {"P1A": "P1A"}, "mix": "P1A=2", "any_sum": true'
ok feedback --config feedback.json
for bad in ', "mix_method": "sum"|mix_method' ', "adapters": {"P1A": "P1A"}, "mix": "P1A=2"|sum to 2' \
    ', "prompts": "none.jsonl"|none.jsonl' ', "adapters": ["P1A"]|adapters: expected an object' \
    ', "adapters": {"P1A": 1}|adapters: "P1A"' ', "mix": "P1A=1"|P1A' \
    ', "adapters": {"nan": "bent"}, "mix": "nan=1"|not numbers' ', "template": "none"|template' \
    ', "temperature": -1|temperature' ', "preferences": "none.json"|none.json' ', "model": "none"|none'; do
    feedback left/f.jsonl
    # later members would be duplicates: the bad one takes the first's place
    key=${bad#, }
    key=${key%%:*}
    sed -i "s|$key: \"[^\"]*\",||" feedback.json
    sed -i "s|\\]  *}|] ${bad%|*}}|" feedback.json
    no 1 "${bad##*|}" feedback --config feedback.json
done
feedback left/f.jsonl ', "judge_patience": 0.2'
sed -i 's|"judge": \[.*\]|"judge": ["sleep", "60"]|' feedback.json
no 1 'judge sleep: silent for 0.2 seconds' feedback --config feedback.json
sed -i 's|"judge": \[.*\]|"judge": ["cat"]|; s|, "judge_patience": 0.2||' feedback.json
no 1 'judge cat: none of its [0-9]* answers was understood: expected {"id"' feedback --config feedback.json
for judge in '"none-such-judge"' '"/etc/passwd"' "\"$helpers/judge\", \"dies\"" '1' ''; do
    feedback left/f.jsonl
    sed -i "s|\"judge\": \\[.*\\]|\"judge\": [$judge]|" feedback.json
    no 1 'judge' feedback --config feedback.json
done

# ---- sft ----------------------------------------------------------------------------------------
put sft.jsonl '{"prompt": "Why?", "completion": " Rain."}\n{"instruction": "Name a colour.", "output": "Red", "preference": "Be kind."}
{"instruction": "Why?", "input": "Sun", "output": "Light."}\n'
put sft.json '{"model": "base", "data": "sft.jsonl", "validation": "sft.jsonl", "output": "sft-adapter",
    "adapter": "mt", "rank": 2, "targets": ["q_proj", "down_proj"], "learning_rate": 0.02, "max_steps": 20,
    "epochs": 20, "batch_tokens": 64, "metrics": "sft-metrics.jsonl"}'
trains sft --config sft.json
check "prints where it is" has '^sft-adapter$'
check "validation on standard error" grep -q 'mt: step .* validation: loss' err
check "whose weights are kept" grep -q "^psoup: sft: 'mt' ends with the weights of step [0-9]* of 20, the best in validation" err
check "metrics" grep -q '"loss": [0-9]' sft-metrics.jsonl
ok info sft-adapter --json
check "its targets" has '"r": 2, .*"target_modules": \["q_proj", "down_proj"\]'
ok tokenize --model base "Why? Rain."
rain=$(cat out)
sum() { sed -n 's/^sum //p' out; }
better() { awk "BEGIN { exit !($1 > $2 + 0.1) }"; }
ok score --model base --tokens "$rain"
before=$(sum)
ok score --model base --adapter mt=sft-adapter --mix mt=1 --tokens "$rain"
check "the adapter has learned" better "$(sum)" "$before"
sed 's/"model"/"dtype": "nf4", "model"/; s/"output": "sft-adapter"/"output": "sft-nf4"/; s/sft-metrics/sft-metrics-nf4/' sft.json >nf4.json
trains sft --config nf4.json
ok generate --model base --dtype nf4 --adapter mt=sft-nf4 --mix mt=1 --prompt "Why?" $sample
sed 's/"adapter": "mt", "rank": 2, "targets": \[[^]]*\],//' nf4.json >nf4-base.json
no 1 'nf4 blocks, which cannot train' sft --config nf4-base.json
sed -i 's/"adapter": "mt", "rank": 2, "targets": \[[^]]*\],//; s/sft-adapter/sft-base/; s/sft-metrics/sft-metrics-base/' sft.json
trains sft --config sft.json --json
check "json" has '{"output": "sft-base"}'
ok score --model sft-base --tokens "$rain"
check "the base has learned" better "$(sum)" "$before"
ok generate --model sft-base --prompt "Why?" $sample
sft() { put bad.json "{\"model\": \"base\", \"output\": \"left/s\", $1}"; }
put odd.jsonl '{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n'
put self.json '{"model": "base", "data": "sft.jsonl", "output": "./base/", "adapter": "a"}'
no 1 "^psoup: self.json: output \"./base/\" is the model's own directory: expected another\$" sft --config self.json
sft '"data": "none.jsonl"'; no 1 'none.jsonl' sft --config bad.json
sft '"data": "odd.jsonl"'; no 1 'odd.jsonl: row 2: "completion"' sft --config bad.json
sft '"data": "empty.jsonl"'; no 1 'empty.jsonl: no rows' sft --config bad.json
sft '"data": "sft.jsonl", "init": "P1A"'; no 1 '"init" needs' sft --config bad.json
for own in '"rank": 3' '"alpha": 7' '"rslora": true' '"targets": ["o_proj"]' '"adapter_seed": 5'; do
    name=${own#\"} name=${name%%\"*}
    sft '"data": "sft.jsonl", "adapter": "a", "init": "sft-adapter", '"$own"
    no 1 "\"$name\" is of new adapters: the one in \"init\", sft-adapter, has another" sft --config bad.json
done
check "nothing was made" test ! -e left/s
put again.json '{"model": "base", "data": "sft.jsonl", "output": "sft-again", "adapter": "mt", "init": "sft-adapter", "rank": 2,
    "targets": ["down_proj", "q_proj"], "max_steps": 1}'
trains sft --config again.json
sft '"data": "sft.jsonl", "adapter": "a", "alpha": 0'
no 1 '^psoup: bad.json: alpha is 0; expected a finite number above 0$' sft --config bad.json
sed 's/"lora_alpha": [0-9.]*/"lora_alpha": 0/' sft-adapter/adapter_config.json >config && cp -r sft-adapter alpha-0 && mv config alpha-0/adapter_config.json
ok generate --model base --adapter mt=alpha-0 --mix mt=1 --prompt "Why?" $sample
sft '"data": "sft.jsonl", "targets": ["x_proj"]'; no 1 'targets\[0\]' sft --config bad.json
sft '"data": "sft.jsonl", "targets": []'; no 1 'targets' sft --config bad.json
sft '"data": "sft.jsonl", "adapter": "a", "rank": 0'; no 1 'rank' sft --config bad.json
sft '"data": "sft.jsonl", "learning_rate": -1'; no 1 'learning_rate' sft --config bad.json
sft '"data": "sft.jsonl", "schedule": "square"'; no 1 'constant|linear|cosine' sft --config bad.json

# ---- reward -------------------------------------------------------------------------------------
put reward.json '{"model": "base", "data": "comparisons.jsonl", "output": "rewards", "learning_rate": 0.01,
    "rank": 2, "validation_fraction": 0.25, "max_tokens": 0}'
trains reward --config reward.json
check "accuracy on held-out prompts" has '^accuracy [01]\.[0-9]*, loss .* on 24 held-out comparisons'
check "whose weights are kept" test "$(grep -c "^psoup: reward: '.*' ends with the weights of step" err)" -eq 6
check "one for each preference" test "$(ls rewards | tr '\n' ' ')" = "P1A P1B P2A P2B P3A P3B "
ok info rewards/P1A --json
check "a scalar head" has '"task_type": "SEQ_CLS"'
no 1 'a scalar head' merge --out r.gguf --reference base rewards/P1A=1
check "nothing is left" test ! -e r.gguf -a ! -e r.psoup-partial.lock
put reward.json '{"model": "base", "data": "comparisons.jsonl", "validation": "soup.jsonl.zst", "output": "rewards",
    "per_preference": false, "name": "all", "learning_rate": 0.01, "rank": 2, "max_tokens": 0}'
trains reward --config reward.json --json
check "json" has '{"output": "rewards", "held_out": 96, "accuracy": [01]\.'
check "one for all" test -f rewards/all/adapter_model.safetensors
use="generate --model base $A --prompts head.jsonl $sample --reward rewards/P1A --best-of"
ok $use 4 --json
cp out best.jsonl
check "four answers each" test "$(grep -c '"score": -*[0-9.e-]*, "scores": \[[^,]*,[^,]*,[^,]*,[^,]*\]}' best.jsonl)" -eq "$(wc -l <head.jsonl)"
check "the best has the highest score" awk -F'"score": |, "scores": \\[|\\]}' '{
    n = split($3, all, ", "); most = all[1]; for (i in all) if (all[i] + 0 > most + 0) most = all[i]
    if (most != $2) exit 1 }' best.jsonl
ok $use 4 --batch 1
check "the same in any batch" cmp -s out best.jsonl
ok $use 1
sed 's/, "score": .*/}/' out >one.jsonl
ok generate --model base $A --prompts head.jsonl $sample
check "best of one is the answer itself" cmp -s out one.jsonl
ok generate --model base --prompt "Why?" $sample --reward rewards/P1A --best-of 3
check "its text" test -s out
ok generate --model base --prompt "Why?" $sample --plan --json
planned=$(sed -n 's/.*"adapters": \([0-9]*\),.*/\1/p' out)
ok generate --model base --prompt "Why?" $sample --reward rewards/P1A --best-of 3 --plan --json
check "the plan counts the reward model" test "$(sed -n 's/.*"adapters": \([0-9]*\),.*/\1/p' out)" -gt "$planned"
no 2 'expected --best-of N, at least 1, and --reward DIR together' generate --model base --prompt x --best-of 3
scores_of() { sed -n 's/.*"scores": \[\([^]]*\)\].*/\1/p' "$1" | tr -d ' ' | tr ',' '\n'; }
for r in "--reward rewards/P1A" "--reward rewards/P2A" "--reward rewards/P1A=0.5 --reward rewards/P2A=-2"; do
    ok generate --model base $A --prompts head.jsonl $sample --best-of 3 --json $r
    scores_of out >>by-reward
done
check "weighed rewards" awk '{ s[NR] = $1 } END { n = NR / 3; for (i = 1; i <= n; i++) { d = 0.5 * s[i] - 2 * s[n + i] - s[2 * n + i]
    if (d > 1e-4 || d < -1e-4) exit 1 }; exit n < 3 || n % 3 }' by-reward
no 1 "the weight of source 'reward 1 of --best-of' is 0" generate --model base --prompt x $sample --reward rewards/P1A=0 --best-of 2
no 2 'expected --best-of N' generate --model base --prompt x --reward rewards/P1A
no 2 'all answers would be the same' generate --model base --prompt x --reward rewards/P1A --best-of 2 --temperature 0
no 1 'none' generate --model base --prompt x --reward none --best-of 2
no 1 'head' generate --model base $A --prompt x --reward P1A --best-of 2 --out left/g.jsonl
put odd.jsonl '{"user_input": "a", "completion_a": "b", "completion_b": "c"}\n'
reward() { put bad.json "{\"model\": \"base\", \"output\": \"left/r\", $1}"; }
reward '"data": "none.jsonl"'; no 1 'none.jsonl' reward --config bad.json
reward '"data": "odd.jsonl"'; no 1 'odd.jsonl: row 1: "preference"' reward --config bad.json
reward '"data": "comparisons.jsonl", "validation_fraction": 1.5'; no 1 'validation_fraction' reward --config bad.json
reward '"data": "empty.jsonl"'; no 1 'empty.jsonl: no rows' reward --config bad.json
sed '1s/{/{"margin": "much", /' comparisons.jsonl >margin.jsonl
reward '"data": "margin.jsonl"'; no 1 'margin.jsonl: row 1: margin: expected a number' reward --config bad.json
reward '"data": "comparisons.jsonl", "batch_size": 0'; no 1 'batch_size' reward --config bad.json
put odd.jsonl '{"user_input": "a", "completion_a": "b", "completion_b": "c", "preference": "../x"}\n'
reward '"data": "odd.jsonl"'; no 1 '"../x" cannot name' reward --config bad.json

# ---- dpo ----------------------------------------------------------------------------------------
put dpo.json '{"model": "base", "data": "comparisons.jsonl", "output": "direct", "learning_rate": 0.01,
    "rank": 2, "validation_fraction": 0.25, "max_tokens": 0, "label_smoothing": 0.1}'
trains dpo --config dpo.json
check "whose weights are kept" test "$(grep -c "^psoup: dpo: '.*' ends with the weights of step" err)" -eq 6
check "one for each preference" test "$(ls direct | tr '\n' ' ')" = "P1A P1B P2A P2B P3A P3B "
check "a policy" grep -q CAUSAL_LM direct/P1A/adapter_config.json
ok merge --base base --out m-direct direct/P1A=0.5 direct/P2A=0.5
put dpo.json '{"model": "base", "data": "comparisons.jsonl", "validation": "soup.jsonl.zst", "output": "direct",
    "per_preference": false, "name": "all", "rank": 2, "max_tokens": 0}'
trains dpo --config dpo.json --json
check "one for all" test -f direct/all/adapter_model.safetensors
dpo() { put bad.json "{\"model\": \"base\", \"output\": \"left/d\", $1}"; }
dpo '"data": "none.jsonl"'; no 1 'none.jsonl' dpo --config bad.json
dpo '"data": "comparisons.jsonl", "validation_fraction": 1.5'; no 1 'validation_fraction' dpo --config bad.json
dpo '"data": "comparisons.jsonl", "beta": 0'; no 1 'beta is 0' dpo --config bad.json
dpo '"data": "odd.jsonl"'; no 1 '"../x" cannot name' dpo --config bad.json

# ---- ppo ----------------------------------------------------------------------------------------
small='"model": "base", "prompts": "instructions.jsonl", "rank": 2, "steps": 2, "batch_size": 4, "ppo_epochs": 2,
    "max_new_tokens": 6, "seed": 4, "learning_rate": 0.001, "warn_empty": 0'
ppo() { put ppo.json "{$small, \"output\": \"$1\", \"policies\": [$2] $3}"; }
ppo policies '{"name": "P1A", "reward": "rewards/P1A", "preference": "P1A"},
    {"name": "P2A", "reward": "rewards/P2A", "preference": "P2A"}' \
    ', "validation": "instructions.jsonl", "metrics": "ppo.jsonl"'
trains ppo --config ppo.json
check "both policies" test "$(ls policies | tr '\n' ' ')" = "P1A P2A "
check "whose weights they have" test "$(grep -c "^psoup: ppo: 'P[12]A' ends with the weights of step [12] of 2, " err)" -eq 2
check "metrics of both" test "$(grep -c '"subject": "P2A"\|"P2A"' ppo.jsonl)" -ge 2
ok generate --model base --adapter P1A=policies/P1A --adapter P2A=policies/P2A --mix P1A=0.5,P2A=0.5 \
    --prompt "Why?" $sample
check "a policy is no reward model" grep -q CAUSAL_LM policies/P1A/adapter_config.json
ok merge --base base --out m-policies policies/P1A=0.5 policies/P2A=0.5
ppo alone '{"name": "P1A", "reward": "rewards/P1A", "preference": "P1A"}' \
    ', "validation": "instructions.jsonl"'
trains ppo --config ppo.json
check "alone, the same bits" cmp -s alone/P1A/adapter_model.safetensors policies/P1A/adapter_model.safetensors
ppo morl '{"name": "morl", "reward": "rewards/all", "preference": "all", "init": "sft-adapter"}, {"name": "rlhf", "reward": "rewards/all"}'
trains ppo --config ppo.json --json
ppo left/inits '{"name": "morl", "reward": "rewards/all", "preference": "all", "init": "sft-adapter"}' ', "alpha": 7'
no 1 '"alpha" is of new adapters: the one in "init", sft-adapter, has another' ppo --config ppo.json
ppo several '{"name": "both", "preference": "all", "rewards": {"easy": "rewards/P1A", "short": {"reward": "rewards/P2A", "weight": -0.5}}}' \
    ', "normalize_apart": true, "metrics": "several.jsonl"'
trains ppo --config ppo.json
check "each reward is told apart" grep -q '"reward/easy": .*"reward/short": ' several.jsonl
check "P-MORL and RLHF" test -f morl/morl/adapter_config.json -a -f morl/rlhf/adapter_config.json
ppo rlphf '{"name": "P1B", "reward": "rewards/P1B", "preference": "P1B"}' ', "draw_new_tokens_from": 2, "mini_batch_size": 2'
trains ppo --preset rlphf --config ppo.json
check "preset rlphf" test -f rlphf/P1B/adapter_config.json

# ---- where results cannot go is known before the training ---------------------------------------------
one='"policies": [{"name": "a", "reward": "rewards/P1A"}], "prompts": "instructions.jsonl"'
for c in sft reward dpo ppo; do
    case $c in sft) rows='"data": "sft.jsonl"' ;; ppo) rows=$one ;; *) rows='"data": "comparisons.jsonl"' ;; esac
    for output in '|output is empty: expected a directory' 'sft.jsonl|"sft.jsonl" cannot be made in sft.jsonl: Not a dir' \
        'sft.jsonl/new/a|"sft.jsonl/new/a" cannot be made in sft.jsonl: Not a dir'; do
        put bad.json "{\"model\": \"base\", $rows, \"output\": \"${output%%|*}\", \"metrics\": \"left/m.jsonl\"}"
        no 1 "bad.json: .*${output##*|}" $c --config bad.json
    done
done

# ---- memory, and options that cannot be -----------------------------------------------------------------
for c in sft reward dpo ppo; do
    case $c in
    sft) rows='"data": "sft.jsonl", "adapter": "a"' name=training needs=needs options='most of it is logits' ;;
    reward) rows='"data": "comparisons.jsonl"' name=rewards needs=need options=batch_size ;;
    dpo) rows='"data": "comparisons.jsonl"' name=policies needs=need options=batch_size ;;
    ppo) rows=$one name=policies needs=need options=micro_batch_tokens ;;
    esac
    put plan.json "{\"model\": \"base\", $rows, \"output\": \"left/p\", \"rank\": 2, \"run_dir\": \"left/run\"}"
    ok $c --config plan.json --plan
    check "$c --plan" has "^memory of $name: [0-9.]* [KM]iB: base [0-9].*, adapters .*, learning .*, activations .*, rows "
    check "$c --plan: nothing is begun" test -z "$(ls -A left)"
    ok $c --config plan.json --plan --json
    check "$c --plan --json" test "$(plan_of activations)" -gt 0 -a "$(plan_of host)" -gt "$(plan_of activations)"
    no 1 "^psoup: plan.json: $name $needs [0-9.]* MiB (base .*, rows .*), --memory-limit is 100 KiB: $options" $c \
        --config plan.json --memory-limit 100K
    check "$c: the plan goes before" grep -q "^memory of $name" err
    no 1 "^psoup: plan.json: $name $needs" $c --config plan.json --memory-limit=100K --json
    check "$c --json: it does not" lines err 1
    no 2 '--memory-limit: "0", expected a size' $c --config plan.json --memory-limit 0
    no 2 '--memory-limit: "", expected a size' $c --config plan.json --memory-limit
    for bad in '"learning_rate": -0.5|learning_rate is -0.5: expected 0 or more' \
        '"beta1": 1|beta1 is 1: expected 0 to below 1' '"checkpoint_keep": 0|checkpoint_keep is 0: expected 1 to 2147483647' \
        '"lora_dropout": -0.1|lora_dropout is -0.1: expected 0 to below 1'; do
        put bad.json "{\"model\": \"base\", $rows, \"output\": \"left/p\", \"run_dir\": \"left/run\", ${bad%|*}}"
        no 1 "^psoup: bad.json: ${bad#*|}\$" $c --config bad.json
    done
done
put huge.json "{\"model\": \"base\", $one, \"output\": \"left/p\", \"batch_size\": 2147483647, \"mini_batch_size\": 4}"
no 1 'huge.json: policies need [0-9.]* TiB (.*), there are .*iB.*: batch_size makes it less' ppo --config huge.json
put bad.json "{\"model\": \"base\", $one, \"output\": \"left/p\", \"temperature\": 0}"
no 1 '^psoup: bad.json: temperature is 0: expected more than 0$' ppo --config bad.json
put bad.json "{\"model\": \"base\", $one, \"output\": \"left/p\", \"top_p\": 3}"
no 1 '^psoup: bad.json: top_p is 3: expected more than 0, 1 at most$' ppo --config bad.json
put bad.json "{\"model\": \"base\", $one, \"output\": \"left/p\", \"rank\": 0}"
no 1 '^psoup: bad.json: rank is 0' ppo --config bad.json

# ---- what is refused leaves nothing ----------------------------------------------------------------------
for bad in '"batch_size": 0|batch_size' '"model": "none", "output": "left/p/q"|none' '"metrics": "none/m.jsonl"|none/m.jsonl' \
    '"metrics": "left/m.jsonl", "samples": "none/s.jsonl", "samples_every": 1|none/s.jsonl' \
    '"samples": "left/s.jsonl", "samples_every": 1, "checkpoint_dir": "sft.jsonl/x"|sft.jsonl' \
    '"checkpoint_dir": "left/c/d", "metrics": "none/m.jsonl"|none/m.jsonl' '"resume": true, "run_dir": null|checkpoint_dir'; do
    put bad.json "{\"model\": \"base\", $one, \"output\": \"left/p\", \"run_dir\": \"left/runs/a\", ${bad%|*}}"
    case $bad in *'"model"'*) sed -i 's/"model": "base", //; s/"output": "left\/p", //' bad.json ;; *'"run_dir"'*) sed -i 's/"run_dir": "left\/runs\/a", //' bad.json ;; esac
    no 1 "${bad##*|}" ppo --config bad.json
done
mkdir left/kept
put bad.json "{\"model\": \"base\", $one, \"output\": \"left/kept/p\", \"run_dir\": \"left/kept/r\", \"batch_size\": 0}"
"$psoup" ppo --config bad.json >out 2>err
check "but what was there before" test "$(find left)" = "left
left/kept"
rmdir left/kept
if test "$(id -u)" -ne 0; then
    mkdir -m 500 closed
    put bad.json "{\"model\": \"base\", $one, \"output\": \"closed/p\"}"
    no 1 'bad.json: output: "closed/p" cannot be made in closed: Permission' ppo --config bad.json
    put bad.json "{\"model\": \"base\", $one, \"output\": \"closed\"}"
    no 1 'bad.json: output: "closed" cannot be made in closed: Permission' ppo --config bad.json
fi
# a run that ended before its first step is no run to protect
ppo begun '{"name": "a", "reward": "rewards/P1A"}' ', "run_dir": "begun-run"'
trains ppo --config ppo.json
rm begun-run/checkpoints/checkpoint-000000002.*
check "its checkpoint" test -e begun-run/checkpoints/checkpoint-000000000.safetensors.zst
sed 's/0.001/0.002/' ppo.json >other.json
trains ppo --config other.json
no 1 'has checkpoints of an earlier run, up to step 2' ppo --config other.json

# ---- ppo: a soup ----------------------------------------------------------------------------------
parts='{"name": "easy", "reward": "rewards/P1A", "preference": "P1A"}, {"name": "deep", "reward": "rewards/P1B",
    "preference": "P1B"}, {"name": "short", "reward": "rewards/P2A", "preference": "P2A", "init": "policies/P2A"}, {"name":
    "kind", "reward": "rewards/all", "preference": "P3A"}'
ppo souped "{\"name\": \"soup\", \"soup\": [$parts], \"seed\": 9}, {\"name\": \"P1A\", \"reward\": \"rewards/P1A\",
    \"preference\": \"P1A\", \"seed\": 4}" ', "validation": "instructions.jsonl", "metrics": "soup.jsonl", "samples": "said.jsonl", "samples_every": 1'
trains ppo --config ppo.json
check "a soup's adapters" test "$(ls souped/soup | tr '\n' ' ')" = "deep easy kind short "
check "each one's reward" grep -q '"subject": "soup".*"reward/easy".*"reward/deep".*"reward/short".*"reward/kind"' soup.jsonl
check "a user's mix" grep -q '"policy": "soup".*"mix": {"\(easy\|deep\)": 0[.0-9]*, "short": 0[.0-9]*, "kind": 0[.0-9]*}' said.jsonl
check "beside a soup, the same bits" cmp -s souped/P1A/adapter_model.safetensors policies/P1A/adapter_model.safetensors
ok generate --model base --adapter easy=souped/soup/easy --adapter kind=souped/soup/kind --mix easy=0.5,kind=0.5 \
    --prompt "Why?" $sample
ppo plain "{\"name\": \"soup\", \"soup\": [{\"name\": \"a\", \"reward\": \"rewards/P1A\"}, {\"name\": \"b\", \"reward\":
    \"rewards/P2A\"}], \"concentration\": 0.3}" ', "objective": "rloo", "group_size": 2'
trains ppo --config ppo.json
check "a soup without preferences" test -f plain/soup/b/adapter_config.json
two='"rewards": {"taste": "rewards/P1A", "brevity": {"reward": "rewards/P2A", "weight": 0.5}}'
ppo twofold "{\"name\": \"soup\", \"soup\": [{\"name\": \"easy\", \"preference\": \"P1A\", $two}, ${parts#*\}, }]}" \
    ', "metrics": "twofold.jsonl"'
trains ppo --config ppo.json
check "each reward of an adapter" grep -q '"reward/easy/taste".*"reward/easy/brevity".*"reward/deep".*"reward/kind"' twofold.jsonl
ppo twofold "{\"name\": \"soup\", \"soup\": [{\"name\": \"a\", $two}, {\"name\": \"b\", \"reward\": \"rewards/P2A\"}]}"
trains ppo --config ppo.json
# The two runs of docs/training.md, as they stand there, for a step.
mkdir walk
cp -R base rewards walk
cp instructions.jsonl walk/prompts.jsonl
cp instructions.jsonl walk/held-out.jsonl
cp -R rewards/P1B walk/rewards/safe
cd walk || exit 1
documented() {
    awk -v k="$1" '/^    \{"model": "base", "prompts"/ { n++ } n == k && /^$/ { exit } n == k' "$docs/training.md" |
        sed 's/"output"/"rank": 2, "steps": 1, "batch_size": 4, "max_new_tokens": 6, "warn_empty": 0, "output"/' >ppo.json
    trains ppo --config ppo.json
}
documented 1
check "three policies of two rewards" test "$(grep -c '"reward/taste": .*"reward/safe": ' run/policies/metrics.jsonl)" -eq 6
documented 2
check "and their soup" grep -q '"reward/P1A/taste": .*"reward/P2A/safe": .*"reward/P3A": ' run/soup/metrics.jsonl
check "its adapters" test "$(ls souped/soup | tr '\n' ' ')" = "P1A P2A P3A "
# The job array of docs/cluster.md, as it stands there, and what it gathers.
sizes='"rank": 2, "steps": 2, "batch_size": 4, "max_new_tokens": 6, "warn_empty": 0, "threads": 1'
awk '/^    #!\/bin\/sh$/, /^    srun/' "$docs/cluster.md" | sed "s/^    //; s/{\"model\"/{$sizes, \"model\"/; s/\"policies\", /\"jobs\", /" >array.sh
mkdir bin
printf '#!/bin/sh\nexec "$@"\n' >bin/srun
chmod +x bin/srun
for task in 0 1 2 3 4 5; do
    PATH=$PWD/bin:$(dirname "$psoup"):$PATH SLURM_ARRAY_TASK_ID=$task sh -e array.sh >out 2>err
    check "job $task of the array" test $? -eq 0
done
six=$(for p in P1A P1B P2A P2B P3A P3B; do echo "{\"name\": \"$p\", \"reward\": \"rewards/$p\", \"preference\": \"$p\"}"; done | paste -sd,)
put ppo.json "{$sizes, \"model\": \"base\", \"prompts\": \"prompts.jsonl\", \"output\": \"side\", \"policies\": [$six]}"
trains ppo --config ppo.json
for p in P1A P1B P2A P2B P3A P3B; do
    check "$p as a job and side by side" cmp -s jobs/$p/adapter_model.safetensors side/$p/adapter_model.safetensors
done
eval "ok $(sed -n "s/.*--wrap 'psoup \(merge .*\)'$/\1/p" "$docs/cluster.md" | sed 's/policies/jobs/g')"
check "gathered" test -f soup/adapter_model.safetensors
cd .. || exit 1
bad_soup() { ppo left/p "{\"name\": \"s\", $1}"; no 1 "$2" ppo --config ppo.json; }
bad_soup '"soup": []' 'policies\[0\]: soup: expected a list of 1 to 64'
bad_soup '"soup": [{"name": "a"}]' 'soup\[0\]: expected a "name" .* "reward"'
bad_soup '"reward": "rewards/P1A", "concentration": 2' '"concentration" is of a soup'
bad_soup '"reward": "rewards/P1A", "soup": [{"name": "a", "reward": "rewards/P1A"}]' 'are of a soup.s adapters'
bad_soup '"soup": [{"name": "a", "reward": "rewards/P1A", "preference": "P1A"}, {"name": "b", "reward": "rewards/P1A"}]' \
    'every adapter of the soup, or of none'
bad_soup '"soup": [{"name": "a", "reward": "rewards/P1A", "preference": "P1A"}, {"name": "b", "reward": "rewards/P1A",
    "preference": "P1A"}]' 'two adapters of the soup have preference "P1A"'
bad_soup '"soup": [{"name": "a", "reward": "rewards/P1A", "preference": "P1A"}]' 'its soup has no user'
bad_soup "\"soup\": [{\"name\": \"a\", \"reward\": \"rewards/P1A\", $two}]" 'soup\[0\]: rewards: .* without "reward"'
bad_soup "$two, \"soup\": [{\"name\": \"a\", \"reward\": \"rewards/P1A\"}]" '"rewards", .* are of a soup'
bad_soup '"soup": [{"name": "a", "rewards": {"x": 3}}]' 'soup\[0\]: rewards: x: expected a directory'
bad_soup '"soup": [{"name": "a", "reward": "rewards/P1A", "inits": "x"}]' 'nearest known one is "init"'
bad_soup '"soup": [{"name": "a", "reward": "rewards/P1A"}], "concentration": -1' 'concentration is -1: expected 0'

# ---- ppo: another preference joins ------------------------------------------------------------------
joins() { ppo joined "$1" ', "validation": "instructions.jsonl", "metrics": "joined.jsonl", "checkpoint_dir": "run"'; }
easy='{"name": "P1A", "reward": "rewards/P1A", "preference": "P1A"}'
joins "$easy"
trains ppo --config ppo.json
cp joined/P1A/adapter_model.safetensors first
joins "$easy, {\"name\": \"P2A\", \"reward\": \"rewards/P2A\", \"preference\": \"P2A\"}"
no 1 'is of another run: its policies was "1", is "2"' ppo --config ppo.json --resume
"$psoup" ppo --config ppo.json --join >out 2>err
check "a preference joins" test $? -eq 0
check "the others keep their bytes" cmp -s joined/P1A/adapter_model.safetensors first
check "as if it had been there" cmp -s joined/P2A/adapter_model.safetensors policies/P2A/adapter_model.safetensors
check "it trained alone" test "$(grep -c '"phase": "train", "subject": "P1A"' joined.jsonl)" -eq 2 \
    -a "$(grep -c '"phase": "train", "subject": "P2A"' joined.jsonl)" -eq 2

# ---- killed, stopped and resumed ------------------------------------------------------------------
# keeps NAME: a run of two policies into NAME, its metrics beside; with a second argument kept there.
keeps() {
    ppo "$1" '{"name": "P1A", "reward": "rewards/P1A", "preference": "P1A"},
        {"name": "P2A", "reward": "rewards/P2A", "preference": "P2A"}' \
        ", \"validation\": \"instructions.jsonl\", \"validate_every\": 3, \"metrics\": \"$1.jsonl\"${2:+,
        \"checkpoint_dir\": \"$2\", \"checkpoint_every\": 2}"
    sed 's/"steps": 2/"steps": 12/' ppo.json >keeps.json
}
# ends_alike WHAT: the run in kept/ left the bytes of the one in whole/.
ends_alike() {
    check "$1: P1A" cmp -s whole/P1A/adapter_model.safetensors kept/P1A/adapter_model.safetensors
    check "$1: P2A" cmp -s whole/P2A/adapter_model.safetensors kept/P2A/adapter_model.safetensors
    check "$1: metrics" cmp -s whole.jsonl kept.jsonl
    check "$1: three are kept" test "$(ls checkpoints | wc -l)" -eq 3
    rm -rf kept kept.jsonl checkpoints
}
goes_on() {
    kept=$(ls checkpoints 2>/dev/null | grep -c '\.zst$') # none: it was killed before its first
    "$psoup" ppo --config keeps.json --resume >out 2>err
    check "a killed run goes on" test $? -eq 0
    test "$kept" -eq 0 ||
        check "it says from where" grep -q '^psoup: checkpoints/checkpoint-0000000[01][0-9].safetensors.zst: the run goes on' err
}
keeps whole
from=$(date +%s%N)
trains ppo --config keeps.json
took=$((($(date +%s%N) - from) / 1000000))
keeps kept checkpoints
killed=0 most=5 seed=$(date +%s)
test -n "$PSOUP_LONG" && most=30
while test $killed -lt $most; do
    seed=$(((seed * 1103515245 + 12345) % 2147483648))
    "$psoup" ppo --config keeps.json --resume >out 2>err &
    sleep "$(echo "$seed $took" | awk '{printf "%.3f", $1 / 2147483648 * $2 / 1000}')"
    kill -KILL $! 2>/dev/null
    if wait $! 2>/dev/null; then
        ends_alike "killed $killed times"
    else
        killed=$((killed + 1))
    fi
done
goes_on
ends_alike "killed $killed times"
for _ in 1 2 3 4 5; do # until one was not done before it was asked
    rm -rf kept kept.jsonl checkpoints
    "$psoup" ppo --config keeps.json >out 2>err &
    until test -s kept.jsonl || ! kill -0 $! 2>/dev/null; do sleep 0.01; done
    kill -TERM $! 2>/dev/null
    wait $!
    ended=$?
    test -e kept || break
done
check "a run that was asked to stop is no failure" test $ended -eq 0
check "it says how to go on" grep -q "was stopped .* step .* of 12; the same command with --resume goes on$" err
check "it prints no result" test ! -s out -a ! -e kept
cp kept.jsonl before.jsonl
no 1 'checkpoints: has checkpoints of an earlier run' ppo --config keeps.json
sed 's/"learning_rate": 0.001/"learning_rate": 0.002/' keeps.json >other.json
no 1 'is of another run: its learning_rate was 0.001, is 0.002' ppo --config other.json --resume
check "refused runs write no metrics" cmp -s kept.jsonl before.jsonl
goes_on
ends_alike "stopped"
# Asked while it samples, in its first step: what was drawn is kept, and not drawn again.
long() { # OUTPUT [CHECKPOINTS]
    ppo "$1" '{"name": "P1A", "reward": "rewards/P1A", "preference": "P1A"}' ", \"metrics\": \"$1.jsonl\"${2:+,
        \"checkpoint_dir\": \"$2\"}"
    sed 's/"steps": 2, "batch_size": 4, "ppo_epochs": 2/"steps": 1, "batch_size": 1024, "ppo_epochs": 1, "threads": 1/
        s/"max_new_tokens": 6/"max_new_tokens": 200, "ignore_stop": true/' ppo.json >"$1.json"
}
long whole-step
trains ppo --config whole-step.json
long midway midway-kept
first=midway-kept/checkpoint-000000000.safetensors.zst
"$psoup" ppo --config midway.json >out 2>err &
until test -s $first || ! kill -0 $! 2>/dev/null; do sleep 0.01; done
before=$(stat -c %s $first)
kill -TERM $!
wait $!
check "a stop within a step is no failure" test $? -eq 0
check "it says so" grep -q "was stopped in step 1 of 1; the same command with --resume goes on$" err
check "no step was done" test ! -s midway.jsonl -a ! -e midway
check "what was drawn is kept" test "$(stat -c %s $first)" -gt $((before + 1000))
"$psoup" ppo --config midway.json --resume >out 2>err
check "it goes on" test $? -eq 0
check "the same bytes" cmp -s midway/P1A/adapter_model.safetensors whole-step/P1A/adapter_model.safetensors
check "the same metrics" cmp -s midway.jsonl whole-step.jsonl
no 2 'unexpected "--resume"' feedback --config ppo.json --resume

for objective in rloo grpo; do
    ppo $objective '{"name": "P1A", "reward": "rewards/P1A", "preference": "P1A"}' \
        ", \"objective\": \"$objective\", \"group_size\": 2, \"loss_group\": 1"
    trains ppo --config ppo.json
    check "$objective" test -f $objective/P1A/adapter_config.json
done
ppo left/p '{"name": "a", "reward": "rewards/P1A"}' ', "objective": "rloo", "group_size": 3'
no 1 'batch_size is 4: expected a multiple of group_size, 3' ppo --config ppo.json
ppo left/p '{"name": "a", "reward": "rewards/P1A"}' ', "objective": "reinforce"'; no 1 'objective' ppo --config ppo.json
ppo left/p ''; no 1 'ppo.json: policies: expected a list' ppo --config ppo.json
ppo left/p '{"name": "a"}'; no 1 'policies\[0\]: expected a "name"' ppo --config ppo.json
ppo left/p '{"name": "../a", "reward": "rewards/P1A"}'; no 1 'expected a "name"' ppo --config ppo.json
ppo left/p '{"name": "a", "reward": "P1A"}'; no 1 'P1A' ppo --config ppo.json
ppo left/p '{"name": "a", "reward": "none"}'; no 1 'none' ppo --config ppo.json
ppo left/p '{"name": "a", "reward": "rewards/P1A", "preference": "P9"}'; no 1 '"P9"' ppo --config ppo.json
ppo left/p '{"name": "a", "reword": "rewards/P1A"}'; no 1 'nearest known one is "reward"' ppo --config ppo.json
ppo left/p '{"name": "a", "reward": "rewards/P1A"}'
sed 's/"instructions.jsonl"/"bad.jsonl"/' ppo.json >rows.json
for bad in '{"instruction": 5}|"instruction" is missing or no text' '{"instruction": "a", "input": 5}|"input" is missing or no text' \
    "{\"prompt\": \"$(seq -s ' ' 99)\"}|[0-9]* tokens, expected at most 255"; do
    printf '{"prompt": "Why?"}\n%s\n' "${bad%|*}" >bad.jsonl
    no 1 "bad.jsonl: row 2: ${bad##*|}" ppo --config rows.json
done
put bad.jsonl '{"instruction": "a", "input": 5, "output": "b"}\n'
put rows.json '{"model": "base", "data": "bad.jsonl", "output": "left/s", "adapter": "a"}'
no 1 'bad.jsonl: row 1: "input" is missing or no text' sft --config rows.json
put rows.json '{"model": "base", "prompts": "bad.jsonl", "output": "left/f", "judge": ["cat"]}'
no 1 'bad.jsonl: row 1: "input" is missing or no text' feedback --config rows.json
for several in '"rewards/P1A"' '{}' '{"x": 1}' '{"x": {"weight": 1}}' '{"x": {"reward": "none"}}' '{"x": {"reward": "rewards/P1A", "weight": 0}}'; do
    ppo left/p "{\"name\": \"a\", \"rewards\": $several}"
    no 1 'rewards: expected {\|x: expected a directory\|none\|weight of source .x. is 0' ppo --config ppo.json
done
ppo left/p '{"name": "a", "reward": "rewards/P1A"}, {"name": "a", "reward": "rewards/P1A"}'
no 1 '"a"' ppo --config ppo.json
ppo left/p '{"name": "a", "reward": "rewards/P1A"}' ', "clip_range": -1'; no 1 'clip_range' ppo --config ppo.json

# ---- winrate ------------------------------------------------------------------------------------
put duels.jsonl '{"prompt": 7, "user": "AA", "criteria": {"P1A": 1, "P2A": "tie"}, "helpfulness": "a"}
{"prompt": 7, "user": "AB", "criteria": {"P1A": "b", "P2B": -1}, "helpfulness": "b"}
{"prompt": "seven", "user": "AA", "criteria": {"P1A": "a", "P2A": 2}, "helpfulness": 0}
{"prompt": "seven", "criteria": {"P2B": 0}}\n'
ok winrate duels.jsonl
check "aggregate" has '^aggregate  *66.7 %  \[.*\]  *2 won  *1 tied  *1 lost  *1 unparsed'
check "criterion" has '^P1A  *50.0 %.* 2 won'
check "helpfulness" has '^helpfulness  *50.0 %'
ok winrate duels.jsonl --json --seed 3
check "json" has '"aggregate": {"rate": 0.6666666666666666, .*"P2A": {"rate": null, '
for bad in '{"prompt": 1, "criteria": {"P1A": "maybe"}}|:1: criterion "P1A"' '{"prompt": 1, "criteria": {"P1A": 3}}|"P1A"' \
    '{"prompt": 1}|"criteria"' '{"criteria": {"P1A": 1}}|"prompt"' '{"prompt": 1, "helpfulness": "x"}|helpfulness' 'x|:1'; do
    printf '%s\n' "${bad%|*}" >bad.jsonl
    no 1 "${bad##*|}" winrate bad.jsonl
done
no 1 'none.jsonl' winrate none.jsonl
no 1 'empty.jsonl: no duels in it' winrate empty.jsonl

# ---- the README, as it is printed, in order ---------------------------------------------------------
mkdir readme
cp -r base readme
cp instructions.jsonl readme
put readme/users.jsonl '{"prompt": "Why?", "mix": {"P1A": 0.7, "P3A": 0.3}}\n'
printf 'merge_method: linear\nmodels: [{model: base, parameters: {weight: 1}}]\n' >readme/recipe.yaml
printf '#!/bin/sh\nexec "%s" first\n' "$helpers/judge" >readme/judge.py
chmod +x readme/judge.py
readme=$here/../README.md
fine='"rank": 2, "learning_rate": 0.01'
tiny='"batch_size": 4, "steps": 1, "max_new_tokens": 6'
# its configurations, with sizes for a tiny model
sed -n '/^```json/,/^```$/p' "$readme" | grep -v '^```' | awk -v RS='' '{ n = split($0, all, "\n{"); for (i = 1; i <= n; i++)
    print (i > 1 ? "{" : "") all[i] >"readme/" i ".json" }'
sed 's/^{/{"max_new_tokens": 6, /' readme/1.json >readme/feedback.json
sed "s/^{/{$fine, /" readme/2.json >readme/reward.json
sed "s/^{/{\"rank\": 2, $tiny, /" readme/3.json >readme/ppo.json
sed 's/"rewards"/"direct"/' readme/reward.json >readme/dpo.json
run='"model": "base", "prompts": "instructions.jsonl", "evaluation": "instructions.jsonl", "generate": {"max_new_tokens": 6, "min_new_tokens": 0}'
put readme/run.json "{\"output\": \"pp\", $run}"
put readme/all.json "{\"output\": \"psoups\", \"rewards\": \"rewards\", $run, \"ppo\": {$tiny}}"
sed -n '/^## The program/,/^## The library/s/^    \( *psoup\| *--\| *#\)/\1/p' "$readme" >readme/commands
check "the README has commands" test "$(grep -c '^psoup' readme/commands)" -ge 18
(cd readme && PATH=$(dirname "$psoup"):$PATH sh -ex commands) >out 2>err
check "the README's commands run" test $? -eq 0
check "to the last" has '^aggregate  *100.0 %'

# ---- another device -------------------------------------------------------------------------------
# The same command lines on a GPU, or on the host driver where the tests' build has one.
no 1 'expected "cpu", "cuda" or "cuda:N"' score --model base --tokens "1 2" --device gpu
if test -e "$(dirname "$psoup")/host_driver/libcuda.so.1"; then
    LD_LIBRARY_PATH=$(dirname "$psoup")/host_driver:$LD_LIBRARY_PATH
    export LD_LIBRARY_PATH
    no 1 'no GPU: device cuda:99' score --model base --tokens "1 2" --device cuda:99
    ok score --model base $A --prompts score.jsonl --json
    cp out cpu.jsonl
    ok score --model base $A --prompts score.jsonl --json --device cuda:0
    cp out gpu.jsonl
    check "scores on the device" near cpu.jsonl gpu.jsonl 0.1 # the base is bf16
    use="generate --model base $A --mix P1A=0.5,P2A=0.5 --prompt Why? --max-new-tokens 12 --seed 5"
    ok $use --device cuda:0
    cp out gpu.txt
    ok $use --device cuda
    check "a text on the device, twice" cmp -s gpu.txt out
    ppo policies-gpu '{"name": "P1A", "reward": "rewards/P1A"}, {"name": "P2A", "reward": "rewards/P2A"}' \
        ', "device": "cuda:0"'
    trains ppo --config ppo.json
    check "both policies, trained on the device" test -e policies-gpu/P2A/adapter_model.safetensors
fi

# ---- output that cannot be written ----------------------------------------------------------------
if test -w /dev/full; then
    "$psoup" info base >/dev/full 2>err
    check "a full disk: status 1" test $? -eq 1
    check "a full disk: one line" grep -q '^psoup: standard output' err
    "$psoup" --version >/dev/full 2>err
    check "a full disk: the version" test $? -eq 1
fi
# Standard descriptors that are closed: no file of the run has their number.
"$psoup" info base >&- 2>err
check "no output: status 1" test $? -eq 1
sed 's/sft-base/left\/s/; s/sft-metrics-base/left\/m/' sft.json >closed.json
"$psoup" sft --config closed.json <&- >&- 2>&-
check "none of them: status 1" test $? -eq 1
check "none of them: the model is there" test -e left/s/model.safetensors
check "none of them: metrics alone in their file" test "$(grep -vc '^{"phase": .*}$' left/m.jsonl)" -eq 0
rm -rf left/s left/m.jsonl
"$psoup" score --model base --prompts score.jsonl $A --logits left/l <&- 2>&- >out
check "no input, no errors: status 0" test $? -eq 0
rm -f left/l

echo "cli: $passed passed, $failed failed"
test $failed -eq 0
