#!/bin/sh
# Two processes train what one trains, and run a method as one runs it: launched by torchrun's variables, by Slurm's and
# by mpirun, on one machine and, where root can make network namespaces, on two; and what is left when one of them dies.
#   sh tests/ranks.sh PATH_TO_PSOUP [PATH_TO_PSOUP_MPI]
# shellcheck disable=SC2086 # lists of names are split on purpose

psoup=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
mpi=${2:+$(cd "$(dirname "$2")" && pwd)/$(basename "$2")}
tests=$(cd "$(dirname "$0")" && pwd)
T=$(mktemp -d "${TMPDIR:-/tmp}/psoup-ranks-XXXXXX") || exit 1
hosts= # network namespaces that stand for machines
trap 'for h in $hosts; do ip netns del $h; done; rm -rf "$T"' EXIT
trap 'exit 1' HUP INT TERM
cd "$T" || exit 1
passed=0 failed=0
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT

check() {
    what=$1
    shift
    if "$@" >note 2>&1; then passed=$((passed + 1)); else
        failed=$((failed + 1))
        echo "ranks: FAILED: $what"
        sed 's/^/    /' note err err.0 err.1 2>/dev/null | head -20
    fi
}
same() { python3 -B "$tests/near.py" "$1/adapter_model.safetensors" "$2/adapter_model.safetensors" "${3:-1e-5}"; }
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

"$(dirname "$psoup")/tests/make_tiny" . || exit 1

# ---- launchers: each runs the same command in two processes; err.N is what rank N says -------------------------------
by_torchrun() {
    port=$(free_port)
    RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port "$psoup" "$@" >out.0 2>err.0 &
    first=$!
    RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port "$psoup" "$@" >out.1 2>err.1 &
    second=$!
}
by_slurm() {
    port=$(free_port)
    SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_LOCALID=0 SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_JOB_NODELIST=localhost \
        MASTER_PORT=$port "$psoup" "$@" >out.0 2>err.0 &
    first=$!
    SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_LOCALID=1 SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_JOB_NODELIST=localhost \
        MASTER_PORT=$port "$psoup" "$@" >out.1 2>err.1 &
    second=$!
}
# Under ASan without its search for leaks: Open MPI itself leaves some, in plugins that are gone by then.
run_mpi() {
    ASAN_OPTIONS="${ASAN_OPTIONS:+$ASAN_OPTIONS:}detect_leaks=0" \
        mpirun -np 2 --allow-run-as-root --oversubscribe --bind-to none "$@"
}
# Which of this test's processes is mpirun's rank 1.
of_rank_1() {
    for p in /proc/[0-9]*; do
        test "$(readlink $p/exe)" = "$mpi" -a "$(readlink $p/cwd)" = "$(pwd -P)" &&
            tr '\0' '\n' <$p/environ | grep -q '^OMPI_COMM_WORLD_RANK=1$' && basename $p
    done
}
both_end() { wait $first && wait $second; }
with() {
    by=$1
    shift
    case $by in
    torchrun | slurm) by_$by "$@" && both_end ;;
    mpi) run_mpi "$mpi" "$@" >out 2>err ;;
    mpirun) MASTER_PORT=$(free_port) run_mpi "$psoup" "$@" >out 2>err ;;
    esac
}

# ---- a run of every trainer -----------------------------------------------------------------------------------------
python3 - <<'PYTHON'
import json
words = "Rain Snow Sun Wind Tea Salt Bread Stone".split()
rows = [(words[i % 8], " ".join(words[(i * 3 + k) % 8] for k in range(1 + i % 5))) for i in range(24)]
with open("sft.jsonl", "w") as f:
    for p, c in rows:
        print(json.dumps({"prompt": p + "?", "completion": " " + c}), file=f)
with open("pairs.jsonl", "w") as f:
    for i, (p, c) in enumerate(rows):
        print(json.dumps({"user_input": p, "completion_a": c, "completion_b": words[i % 7],
                          "preference": "P1A" if i % 3 else "P2A"}), file=f)
with open("asks.jsonl", "w") as f:
    for p, c in rows[:12]:
        print(json.dumps({"instruction": "Name " + p}), file=f)
rate = {"model": "base", "rank": 2, "threads": 1, "learning_rate": 0.01, "lora_dropout": 0.1}
def put(name, **more):
    json.dump(dict(rate, **more), open(name + ".json", "w"))
put("sft", data="sft.jsonl", validation="sft.jsonl", adapter="A", epochs=2, batch_tokens=96, validate_every=3)
put("reward", data="pairs.jsonl", batch_size=4, epochs=2)
put("dpo", data="pairs.jsonl", batch_size=4)
put("ppo", prompts="asks.jsonl", validation="asks.jsonl", steps=3, batch_size=6, ppo_epochs=2, max_new_tokens=12,
    policies=[{"name": "P1A", "reward": "alone/reward/P1A", "preference": "P1A"},
              {"name": "P2A", "reward": "alone/reward/P2A", "preference": "P2A"}])
with open("users.jsonl", "w") as f:
    for i, (p, c) in enumerate(rows):
        print(json.dumps({"user_input": p, "completion_a": c, "completion_b": words[i % 7],
                          "preference": "P%d%s" % (i % 6 // 2 + 1, "AB"[i % 2])}), file=f)
with open("few.jsonl", "w") as f:
    for p, c in rows[:3]:
        print(json.dumps({"instruction": "Name " + p}), file=f)
sizes = {"batch_size": 4, "max_new_tokens": 8, "ppo_epochs": 2, "steps": 2, "validate_every": 1, "learning_rate": 0.01}
json.dump({"model": "base", "prompts": "asks.jsonl", "validation": "few.jsonl", "evaluation": "few.jsonl",
           "reward_data": "users.jsonl", "held_out": 0.2, "threads": 1, "adapter": {"rank": 2},
           "reward_adapter": {"rank": 2}, "reward": {"learning_rate": 0.01, "batch_size": 4}, "ppo": sizes,
           "generate": {"max_new_tokens": 8, "min_new_tokens": 0}}, open("method.json", "w"))
PYTHON
# into NAME OUTPUT [MEMBERS]: NAME.json's run with its output in OUTPUT, as run.json.
into() { sed "s|}\$|, \"output\": \"$2\", \"metrics\": \"$2.jsonl\" ${3:-}}|" "$1.json" >run.json; }
mkdir -p alone torchrun slurm mpi mpirun hosts mpihosts
for t in sft reward dpo ppo; do
    into $t alone/$t
    check "$t alone" "$psoup" $t --config run.json
done
parts() { case $1 in sft) echo . ;; *) echo P1A P2A ;; esac; }
trains() { # LAUNCHER TRAINER
    into $2 $1/$2
    check "$2 by $1" with $1 $2 --config run.json
    for p in $(parts $2); do check "$2 by $1: $p" same $1/$2/$p alone/$2/$p; done
    check "$2 by $1: rank 0 alone writes metrics" test "$(wc -l <$1/$2.jsonl)" -eq "$(wc -l <alone/$2.jsonl)"
}
for t in sft reward dpo ppo; do trains torchrun $t; done
check "rank 0 alone says where it is" grep -q torchrun/ppo out.0
check "rank 1 says nothing" test ! -s out.1 -a ! -s err.1
trains slurm sft
if test -n "$mpi"; then
    for t in sft ppo; do trains mpi $t; done
    check "rank 0 alone says where it is" test "$(cat out)" = mpi/ppo
    trains mpirun sft
else
    echo "ranks: MPI is not here: left out"
fi

# ---- psoup run ------------------------------------------------------------------------------------------------------
method() { sed "s|}\$|, \"output\": \"$1\" ${2:-}}|" method.json >run.json; } # OUTPUT [MEMBERS]
tree() { (cd $1 && find . -type f ! -path './checkpoints/*' | sort); }
alike() { tree $1 >tree.1 && tree $2 >tree.2 && cmp tree.1 tree.2 && cmp $1/finished.json $2/finished.json; }
# SIDE OTHER: of a run, the same files, adapters that are near, and as many reports and answers
same_run() {
    check "$1: the files of one process" alike $1 $2
    for a in $(cd $2 && find . -name adapter_model.safetensors); do check "$1: $a" same $1/${a%/*} $2/${a%/*} 1e-3; done
    for f in $(cd $2 && find . -name '*.jsonl'); do
        check "$1: $f" test "$(wc -l <$1/$f)" -eq "$(wc -l <$2/$f)"
    done
}
for m in pp pmorl psoups; do
    method alone/$m
    check "$m alone" "$psoup" run $m --config run.json
    method torchrun/$m
    check "$m by torchrun" with torchrun run $m --config run.json
    check "$m: rank 0 alone says where it is" test "$(cat out.0 out.1)" = torchrun/$m -a ! -s err.1
    same_run torchrun/$m alone/$m
done
check "answers do not depend on who gives them" diff -r torchrun/pp/responses alone/pp/responses
check "nothing is done twice" with torchrun run psoups --config run.json --resume
check "and rank 0 says so" test "$(grep -c 'finished before' err.0)" -eq 3 -a ! -s err.1
method slurm/pp
check "pp by slurm" with slurm run pp --config run.json
check "nor on what launched them" diff -r slurm/pp/responses alone/pp/responses
if test -n "$mpi"; then
    method mpi/psoups ', "soup": "factors"'
    check "psoups by mpi, factors" with mpi run psoups --config run.json
    method alone/factors ', "soup": "factors"'
    check "psoups, factors" "$psoup" run psoups --config run.json
    same_run mpi/psoups alone/factors
fi

# What one rank finds wrong ends both, and is said once.
apart() { # COMMAND-LINE OF RANK 0 | of RANK 1, which runs in its own directory
    port=$(free_port)
    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port timeout 60 "$psoup" $1 >out.0 2>err.0 &
    first=$!
    (cd away && RANK=1 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port timeout 60 "$psoup" $2) >out.1 2>err.1 &
    second=$!
    wait $first
    one=$?
    wait $second
    test $one -eq 1 -a $? -eq 1
}
said_once() { # PATTERN
    check "rank 0 says $1" grep -q "$1" err.0
    check "and once: $1" test "$(grep -c '^psoup: ' err.0)" -eq 1 -a ! -s err.1 -a ! -e left
}
rm -f err
mkdir away
for f in base sft.jsonl users.jsonl few.jsonl; do ln -s ../$f away/$f; done
method left
check "a file that one rank lacks" apart "run psoups --config run.json" "run psoups --config ../run.json"
said_once '^psoup: rank 1: asks.jsonl: '
ln -s ../asks.jsonl away/asks.jsonl
sed 's/"steps": 2/"steps": 3/' run.json >away/run.json
check "another configuration" apart "run psoups --config run.json" "run psoups --config run.json"
said_once "^psoup: rank 1: run.json: is of another run than rank 0's: its ppo.steps is 2 there, 3 here"
echo '{' >away/run.json
check "no configuration" apart "run psoups --config run.json" "run psoups --config run.json"
said_once '^psoup: rank 1: run.json:2:1: '
check "too little memory" apart "run psoups --config run.json" "run psoups --config ../run.json --memory-limit 100K"
said_once '^psoup: rank 1: ../run.json: rewards need '
method torchrun/pmorl
check "a run that is there" apart "run pmorl --config run.json" "run pmorl --config ../run.json"
said_once '^psoup: torchrun/pmorl: has a run already; --resume goes on with it'
method none
mkdir none && : >none/responses
check "a file in the way" apart "run pp --config run.json" "run pp --config ../run.json"
said_once '^psoup: none/responses: '

# Two machines, each with its own name, network and address, where the name of one says nothing to the other.
two_hosts() {
    for h in 0 1; do ip netns add psoup$h-$$ && hosts="$hosts psoup$h-$$" || return 1; done
    ip link add v0 netns psoup0-$$ type veth peer name v1 netns psoup1-$$ || return 1
    for h in 0 1; do
        ip -n psoup$h-$$ addr add 10.9.0.$((h + 1))/24 dev v$h && ip -n psoup$h-$$ link set v$h up &&
            ip -n psoup$h-$$ link set lo up || return 1
    done
    unshare -u true
}
at_host() { # HOST COMMAND
    h=$1
    shift
    ip netns exec psoup$h-$$ unshare -u sh -c "hostname host$h; exec env $*"
}
over_hosts() {
    printf '10.9.0.%d slots=1\n' 1 2 >hostfile
    printf '#!/bin/sh\nh=$((${1##*.} - 1)); shift\nexec ip netns exec psoup$h-%s unshare -u sh -c "hostname host$h; $*"\n' \
        $$ >agent
    chmod +x agent
    ASAN_OPTIONS="${ASAN_OPTIONS:+$ASAN_OPTIONS:}detect_leaks=0" at_host 0 mpirun -np 2 --hostfile hostfile \
        --allow-run-as-root --bind-to none --mca plm_rsh_agent "$T/agent" --mca oob_tcp_if_include v0,v1 --mca pml ob1 \
        --mca btl tcp,self --mca btl_tcp_if_include 10.9.0.0/24 -wdir "$T" "$@" >out 2>err
}
if test "$(id -u)" != 0 || ! command -v ip >/dev/null || ! two_hosts 2>note; then
    echo "ranks: no network namespaces: two machines left out"
else
    for t in sft ppo; do
        into $t hosts/$t
        at_host 0 RANK=0 WORLD_SIZE=2 MASTER_ADDR=10.9.0.1 MASTER_PORT=29500 "$psoup" $t --config run.json \
            >out.0 2>err.0 &
        first=$!
        at_host 1 RANK=1 WORLD_SIZE=2 MASTER_ADDR=10.9.0.1 MASTER_PORT=29500 "$psoup" $t --config run.json \
            >out.1 2>err.1 &
        second=$!
        check "$t on two machines" both_end
        for p in $(parts $t); do check "$t on two machines: $p" same hosts/$t/$p alone/$t/$p; done
    done
    if test -n "$mpi"; then
        for t in sft ppo; do
            into $t mpihosts/$t
            check "$t on two machines by MPI" over_hosts "$mpi" $t --config run.json
            for p in $(parts $t); do check "$t on two machines by MPI: $p" same mpihosts/$t/$p alone/$t/$p; done
        done
    fi
fi

# ---- what goes wrong ------------------------------------------------------------------------------------------------
into sft left
RANK=1 WORLD_SIZE=2 "$psoup" sft --config run.json >out.0 2>err
check "no address" grep -q '^psoup: .*MASTER_ADDR is not set' err
into sft left ', "accumulation": 1'
sed 's/0.01/0.02/' run.json >other.json
port=$(free_port)
RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port "$psoup" sft --config run.json >out.0 2>err.0 &
RANK=1 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port "$psoup" sft --config other.json >out.1 2>err.1
check "another run is refused" grep -q 'rank 1: rank 1 is of another run than rank 0: its learning_rate is 0.02' err.1
wait $!
check "and rank 0 is told" grep -q 'rank 0: rank 1 stopped: .*its learning_rate is 0.02' err.0
check "nothing is left" test ! -e left

# Rank 1 is killed while PPO runs: rank 0 says who is gone, and keeps the run as it was after the last whole step. It
# goes on with two ranks to the bytes of the run that nobody disturbed; or with one, to other rollouts in the end.
long() { # OUTPUT
    into ppo $1 ", \"checkpoint_dir\": \"$1-kept\", \"checkpoint_every\": 1"
    sed -i 's/"steps": 3/"steps": 48/' run.json
}
waits_for() { for _ in $(seq 400); do ls $1 >/dev/null 2>&1 && return 0; sleep 0.02; done; return 1; }
long whole
check "undisturbed" with torchrun ppo --config run.json
long killed
by_torchrun ppo --config run.json
check "has steps" waits_for 'killed-kept/checkpoint-000000003*.zst'
kill -9 $second
wait $first
check "status of rank 0" test $? -eq 1
wait $second 2>/dev/null
check "who is gone" grep -q '^psoup: rank 0: rank 1 (.*) is gone: .*; killed-kept has the run as it was after step' err.0
cp -r killed-kept alone-kept
cp killed.jsonl alone.jsonl
check "goes on" with torchrun ppo --config run.json --resume
for p in P1A P2A; do
    check "same bytes: $p" cmp killed/$p/adapter_model.safetensors whole/$p/adapter_model.safetensors
done
check "same metrics" cmp killed.jsonl whole.jsonl
sed -i 's/killed/alone/g' run.json
check "goes on alone" "$psoup" ppo --config run.json --resume
check "to the end" test "$(grep -c '"phase": *"train"' alone.jsonl)" -eq "$(grep -c '"phase": *"train"' whole.jsonl)"

# SIGTERM to either stops both after their step, with a checkpoint.
long stopped
by_torchrun ppo --config run.json
check "has steps" waits_for 'stopped-kept/checkpoint-000000003*.zst'
kill -TERM $second
check "both end well" both_end
check "and say how to go on" grep -q 'the same command with --resume goes on' err.0
check "goes on" with torchrun ppo --config run.json --resume
for p in P1A P2A; do
    check "same bytes: $p" cmp stopped/$p/adapter_model.safetensors whole/$p/adapter_model.safetensors
done

# A method, of which rank 1 dies while policies train, goes on with what is finished.
method_killed() { sed -i 's/"steps": 2/"steps": 24, "checkpoint_every": 1/' run.json; }
method whole-run
method_killed
check "a method, undisturbed" with torchrun run psoups --config run.json
method killed-run
method_killed
by_torchrun run psoups --config run.json
check "has steps" waits_for 'killed-run/checkpoints/policies/checkpoint-000000003*.zst'
kill -9 $second
wait $first
check "status of rank 0" test $? -eq 1
wait $second 2>/dev/null
check "who is gone" grep -q '^psoup: rank 0: rank 1 (.*) is gone: .* the same command with --resume goes on$' err.0
check "goes on" with torchrun run psoups --config run.json --resume
check "with what was finished" grep -q '^rewards: finished before' err.0
check "to the same bytes" diff -r -x checkpoints -x config.json killed-run whole-run

# Under mpirun, which ends the others itself, after a second.
if test -n "$mpi"; then
    long mpikilled
    run_mpi "$mpi" ppo --config run.json >out 2>err &
    job=$!
    check "has steps" waits_for 'mpikilled-kept/checkpoint-000000003*.zst'
    kill -9 $(of_rank_1)
    wait $job
    check "status of mpirun" test $? -ne 0
    check "who is gone" grep -q 'psoup: rank 0: rank 1 (.*) is gone: .*; mpikilled-kept has the run' err
    check "goes on" with mpi ppo --config run.json --resume
    for p in P1A P2A; do check "mpi, killed: $p" same mpikilled/$p whole/$p; done
fi

echo "ranks: $passed checks passed, $failed failed"
test $failed -eq 0
