#!/bin/sh
# seeds.sh FUZZER DIR: fills DIR with small files for the fuzzer to start from, taken from tests/golden.
set -eu
mkdir -p "$2"
i=0
dir=$2
copy() { # PREFIX, then paths on standard input
    while read -r path; do
        i=$((i + 1))
        { printf '%s' "$1"; cat "$path"; } > "$dir/seed$i"
    done
}
case $1 in
fuzz_safetensors) find tests/golden -name '*.safetensors' -size -8k | sort | copy '' ;;
fuzz_gguf) find tests/golden/gguf -name '*.gguf' -size -24k | sort | copy '' ;;
fuzz_config) find tests/golden -name '*config.json' | sort | copy '' ;;
fuzz_recipe) find tests/golden/recipe -name '*.yaml' | sort | copy '' ;;
fuzz_json) find tests/golden -name '*.json' -size -4k | sort | copy '' ;;
fuzz_tokenizer)
    # the first byte says what follows: '0' is even, a tokenizer.json; '1' is odd, a text
    find tests/golden/text -name '*.json' -size -12k | sort | copy 0
    printf "1It's  abab a\303\251\n" > "$dir/text1"
    printf '3 <s>aab ab\n\n12' > "$dir/text2"
    printf '5abc 123 abab' > "$dir/text3" ;;
esac
