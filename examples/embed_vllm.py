#!/usr/bin/env python3
"""A user's soup for a running vLLM server, without restarting it.

    embed_vllm.py --out soups/ann --name ann P1A=0.5 P2B=0.5 [--rank 16] [--server http://127.0.0.1:8000]

Merges PEFT directories (DIRECTORY=WEIGHT) into one adapter that vLLM's loader takes: no bias, no modules to
save, of at most the server's --max-lora-rank (--rank; a soup of higher rank becomes its best approximation,
and the error is printed). With a server it is loaded under NAME through /v1/load_lora_adapter, in place of
what had the name; requests then say "model": NAME. The server must run with --enable-lora and
VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and see the same directory.

Every soup has a directory of its own below OUT, named by its weights: the server caches prefixes by the
adapter's name and path, and what another soup wrote must not be found. Old ones are the caller's to delete.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import urllib.error
import urllib.request

import psoup


def main(arguments=None):
    parser = argparse.ArgumentParser(description="A user's soup for a running vLLM server.")
    parser.add_argument("adapters", nargs="+", metavar="DIRECTORY=WEIGHT")
    parser.add_argument("--out", required=True, help="the directory of this user's soups")
    parser.add_argument("--name", required=True, help="the model's name in requests")
    parser.add_argument("--rank", type=int, default=16, help="the server's --max-lora-rank (16)")
    parser.add_argument("--server", help="its URL; without one the soup is only written")
    options = parser.parse_args(arguments)
    soup, error = write(options.out, [pair(text) for text in options.adapters], options.rank)
    print("%s: %s" % (soup, "exact" if error == 0 else "off by %.3g of the exact sum at worst" % error))
    if options.server:
        load(options.server, options.name, os.path.abspath(soup))
        print("%s serves it as %s" % (options.server, options.name))


def pair(text):
    directory, _, weight = text.rpartition("=")
    if not directory:
        raise SystemExit("%s: expected DIRECTORY=WEIGHT" % text)
    try:
        return directory, float(weight)
    except ValueError:
        raise SystemExit("%s: expected DIRECTORY=WEIGHT" % text) from None


def write(out, adapters, most_rank):
    """Returns the soup's directory and its worst relative error over the linears; 0 where it is exact."""
    total = sum(rank_of(directory) for directory, weight in adapters if weight != 0)
    method = {"method": "delta"} if total <= most_rank else {"method": "svd", "svd_rank": most_rank}
    os.makedirs(out, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as work, psoup.Merger(**method) as merger:
        for directory, weight in adapters:
            merger.add(directory, weight)
        made = os.path.join(work, "soup")
        merger.write(made)
        with open(os.path.join(made, "adapter_model.safetensors"), "rb") as file:
            soup = os.path.join(out, hashlib.sha256(file.read()).hexdigest()[:16])
        if not os.path.exists(soup):
            os.rename(made, soup)
        return soup, merger.report()["worst_error"]


def rank_of(directory):
    """The highest rank that a module of the adapter has."""
    config = psoup.read_json(os.path.join(directory, "adapter_config.json"))
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


def load(server, name, path):
    post(server, "/v1/unload_lora_adapter", {"lora_name": name}, may_fail=True)  # the first time there is none
    post(server, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})


def post(server, path, body, may_fail=False):
    request = urllib.request.Request(server.rstrip("/") + path, json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        words = error.read().decode("utf-8", "replace")
        if not (may_fail and error.code in (400, 404)):
            raise SystemExit("%s%s: %d: %s" % (server, path, error.code, words.strip()))
    except urllib.error.URLError as error:
        raise SystemExit("%s%s: %s" % (server, path, error.reason))


if __name__ == "__main__":
    try:
        main()
    except psoup.Error as error:
        sys.exit(str(error))
