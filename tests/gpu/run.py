#!/usr/bin/env python3
"""Measures the GPU backend: `make gpu`, see docs/gpu.md.

    run.py BUILD [--check] [--out DIR] [STAGE...]     the stages, all by default; then the table
    run.py BUILD --tiny [--out DIR] [STAGE...]        in tiny shapes, on any driver

Every stage is commands of less than ten minutes and leaves DIR/STAGE.json; the table is made of those that are there.
"""
import argparse
import datetime
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys

import table

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
LIMIT = 590  # seconds of one command
GROUPS = ("layer", "rows", "attention", "attention_decode", "linear_mix", "loss", "policy", "sample", "advance", "adamw")
PYTHON = sys.executable

# What a stage runs; {b} is the build. A command that fails says so in the stage's file and the others go on.
CHECK = "{b}/tests/checkops/checkops --device cuda:0 "
SANITIZER = "compute-sanitizer --error-exitcode 3 --tool "
STAGES = {
    "device": ["{py} {here}/ceilings.py"],
    "correctness": [CHECK, "{py} {here}/correct_ops.py {b}/tests/gpu/libops.so", "{py} {here}/correct.py"],
    "sanitizer": [SANITIZER + tool + " " + command for tool in ("memcheck", "racecheck")
                  for command in [CHECK + group for group in GROUPS] +
                  ["{b}/tests/gpu/llama --tiny " + stage for stage in ("decode", "train", "ppo")] +
                  ["{py} {here}/merge.py --tiny"]],
    "ops": ["{b}/tests/checkops/checkops --bench --json --device cuda:0", "{py} {here}/ops.py"],
    "decode": ["{b}/tests/gpu/llama decode"] + ["{py} {here}/peer.py %s %d" % (what, batch)
                                                for what in ("decode", "generate") for batch in (1, 64)],
    "train": ["{b}/tests/gpu/llama train", "{py} {here}/peer.py train"],
    "ppo": ["{b}/tests/gpu/llama ppo", "{py} {here}/peer.py ppo {lengths}"],
    "merge": ["{py} {here}/merge.py"],
}
# Ours in tiny shapes; what is Python's runs where this Python has the modules, the peers on the CPU.
TINY = {
    "device": ["{py} {here}/ceilings.py --tiny"],
    "correctness": STAGES["correctness"][1:],  # checkops has its place in make check
    "ops": ["{b}/tests/checkops/checkops --bench --force --json --device cuda:0", "{py} {here}/ops.py --tiny"],
    "decode": ["{b}/tests/gpu/llama --tiny decode"] + ["{py} {here}/peer.py --tiny " + what
                                                       for what in ("decode 1", "decode 64", "generate 1")],
    "train": ["{b}/tests/gpu/llama --tiny train", "{py} {here}/peer.py --tiny train"],
    "ppo": ["{b}/tests/gpu/llama --tiny ppo", "{py} {here}/peer.py --tiny ppo {lengths}"],
    "merge": ["{py} {here}/merge.py --tiny"],
}
NEEDS = {"generate 1": ["transformers"], "train": ["transformers", "peft"], "ppo {lengths}": ["transformers", "peft"]}


def output(*command):
    """What a command prints, or "" where there is none such."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def missing(stages):
    """What the stages need and is not here, each with where it comes from."""
    lacks = []
    if not output("nvidia-smi", "-L"):
        lacks.append("a GPU with NVIDIA's driver (nvidia-smi)")
    if not (shutil.which("nvcc") or os.path.exists("/usr/local/cuda/bin/nvcc")):
        lacks.append("nvcc 12.8 or later (CUDA's toolkit)")
    if "sanitizer" in stages and not shutil.which("compute-sanitizer"):
        lacks.append("compute-sanitizer in PATH (CUDA's toolkit)")
    modules = {"torch": set(STAGES), "transformers": {"decode", "train", "ppo"},
               "peft": {"train", "ppo"}}
    for name, needed in modules.items():
        if needed & set(stages) and not importlib.util.find_spec(name):
            lacks.append("Python's %s (pip install %s)" % (name, name))
    if importlib.util.find_spec("torch") and modules["torch"] & set(stages):
        if output(PYTHON, "-c", "import torch; print(torch.cuda.is_available())") != "True":
            lacks.append("a PyTorch that sees the GPU (torch.cuda.is_available())")
    return lacks


def runs_here(text):
    """Whether a tiny command can; else says why not."""
    if "{py}" not in text:
        return True
    lacks = [name for name in ["torch"] + NEEDS.get(text.split("--tiny ")[-1], [])
             if not importlib.util.find_spec(name)]
    why = "no Python's " + ", ".join(lacks)
    if not lacks and "correct" in text and output(PYTHON, "-c", "import torch; print(torch.version.cuda)")[:3] == "13.":
        lacks, why = ["cuBLASLt"], "PyTorch's own libcublasLt.so.13 would be taken for the host driver's"
    if lacks:
        print("skipped, %s: %s" % (why, text.format(b="BUILD", py="python3", here="tests/gpu", lengths="…")))
    return not lacks


def command_of(text, build, out):
    lengths = ""
    if "{lengths}" in text:  # those that ours drew
        path = os.path.join(out, "ppo.json")
        lengths = " ".join(str(n) for line in json.load(open(path))["lines"] for n in line.get("lengths", ()))
    return text.format(b=build, py=PYTHON, here=HERE, lengths=lengths).split()


def run(command, environment):
    """The lines of JSON that it prints, and what went wrong."""
    print("== " + " ".join(command)[:200], flush=True)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
                               start_new_session=True)
    lines, wrong = [], None
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(process.pid, signal.SIGKILL))
    signal.alarm(LIMIT)
    for line in process.stdout:
        print(line, end="", flush=True)
        if line.startswith("{"):
            lines.append(json.loads(line))
    status = process.wait()
    if signal.alarm(0) == 0:
        wrong = "longer than %d s" % LIMIT
    elif status != 0:
        wrong = "exit status %d" % status
    return lines, wrong


def head():
    """What a result is of."""
    card = output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").split("\n")[0].split(", ")
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    dirty = "+" if output("git", "status", "--porcelain", "--untracked-files=no") else ""
    return {"commit": (output("git", "rev-parse", "--short", "HEAD") or "unknown") + dirty,
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "device": card[0] or "host driver", "driver": card[1] if len(card) > 1 else "",
            "nvcc": output(nvcc, "--version").split("release ")[-1].split(",")[0]}


def run_stage(stage, commands, build, out, environment):
    """Writes the stage's file after every command, so that what was measured stays. Returns what went wrong."""
    result = {"stage": stage, **head(), "lines": [], "commands": []}
    for text in commands:
        command = command_of(text, build, out)
        lines, wrong = run(command, environment)
        result["lines"] += lines
        result["commands"].append({"command": " ".join(text.format(b="BUILD", py="python3", here="tests/gpu",
                                                                   lengths="…").split()), "wrong": wrong})
        with open(os.path.join(out, stage + ".json"), "w") as file:
            json.dump(result, file, indent=1)
    return [c for c in result["commands"] if c["wrong"]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("build")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--check", action="store_true", help="say what is missing, and no more")
    parser.add_argument("--out", default=os.path.join(ROOT, "build", "gpu"))
    arguments = parser.parse_intermixed_args()  # stages may follow options
    known = TINY if arguments.tiny else STAGES
    stages = arguments.stages or list(known)
    for stage in stages:
        if stage not in known:
            sys.exit("gpu: there is no stage %s: expected %s" % (stage, ", ".join(known)))
    lacks = [] if arguments.tiny else missing(stages)
    if lacks:
        sys.exit("gpu: missing: " + "; ".join(lacks))
    if arguments.check:
        return
    build, out = os.path.abspath(arguments.build), os.path.abspath(arguments.out)
    os.makedirs(out, exist_ok=True)
    environment = dict(os.environ, PSOUP_LIBRARY=os.path.join(build, "libpsoup.so"),
                       PYTHONPATH=os.path.join(ROOT, "bindings", "python"), PYTHONDONTWRITEBYTECODE="1")
    if arguments.tiny:
        environment["PYTHONWARNINGS"] = "ignore"
    wrong, skipped = [], False
    for stage in stages:
        commands = [text for text in known[stage] if not arguments.tiny or runs_here(text)]
        skipped |= commands != known[stage]
        wrong += run_stage(stage, commands, build, out, environment) if commands else []
    text, lost, alone = table.of(out)
    with open(os.path.join(out, "results.md"), "w") as file:
        file.write(text)
    print(text)
    for failure in wrong:
        print("gpu: FAILED (%s): %s" % (failure["wrong"], failure["command"]))
    if arguments.tiny and lost:
        sys.exit("gpu: goals that nothing was measured for: " + "; ".join(lost))
    if arguments.tiny and alone and not skipped:
        sys.exit("gpu: goals with no peer beside them: " + "; ".join(alone))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
