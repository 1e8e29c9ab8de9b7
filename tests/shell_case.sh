# What the tests of the psoup program share; sourced, with the path of psoup as $1: a directory of its own to
# work in, with left/ in it, and what is checked of a command.
# shellcheck disable=SC2034,SC2059,SC2154 # the caller's

psoup=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
helpers=$(dirname "$psoup")/tests
for helper in judge make_tiny; do
    test -x "$helpers/$helper" || { echo "$suite: $helpers/$helper is not there: make test-programs builds it"; exit 1; }
done
T=$(mktemp -d "${TMPDIR:-/tmp}/psoup-$suite-XXXXXX") || exit 1
trap 'rm -rf "$T"' EXIT
trap 'exit 1' HUP INT TERM
LC_ALL=C.UTF-8
export LC_ALL
cd "$T" || exit 1
passed=0 failed=0

pass() { passed=$((passed + 1)); }
fail() {
    failed=$((failed + 1))
    echo "$suite: FAILED: $1"
    sed 's/^/    /' out err | head -8
}
# check WHAT COMMAND…: the command succeeds; for tests of what the last one printed.
check() {
    what=$1
    shift
    if "$@"; then pass; else fail "$what"; fi
}
# ok COMMAND…: psoup succeeds and says nothing on standard error.
ok() {
    if "$psoup" "$@" >out 2>err && ! test -s err; then pass; else fail "psoup $*"; fi
}
# trains COMMAND…: the same, with lines of validation on standard error, whose weights were kept, and what PPO may have to
# say of so few and short responses.
trains() {
    if "$psoup" "$@" >out 2>err && ! grep '^psoup:' err | grep -Eqv "^psoup: (warning: ppo: policy '|[a-z]+: '.*' ends with the weights of step )"; then
        pass
    else
        fail "psoup $*"
    fi
}
# no STATUS PATTERN COMMAND…: psoup exits with STATUS, prints nothing but one line that matches (and the memory that it
# would take, where that is known before), and leaves nothing in left/.
no() {
    status=$1 pattern=$2
    shift 2
    "$psoup" "$@" >out 2>err
    got=$?
    if test $got -eq "$status" && ! test -s out && test "$(grep -vc '^memory of ' err)" -eq 1 &&
        grep -q '^psoup: ' err && grep -q -e "$pattern" err && test -z "$(ls -A left)"; then
        pass
    else
        fail "psoup $* (status $got, expected $status and \"$pattern\"; left: $(ls -A left))"
        rm -rf left
        mkdir left
    fi
}
has() { grep -q -e "$1" out; }
lines() { test "$(wc -l <"$1")" -eq "$2"; }
differ() { ! cmp -s "$1" "$2"; }
put() { printf '%b' "$2" >"$1"; }
# patch FILE OFFSET BYTES: in place
patch() { printf "$3" | dd of="$1" bs=1 seek="$2" conv=notrunc 2>/dev/null; }
size() { wc -c <"$1" | tr -d ' '; }

mkdir left
: >out 2>err
