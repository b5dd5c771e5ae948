#!/usr/bin/env python3
"""mepic against llama.cpp on the CPU: same file, same threads, runs that alternate, ratios of medians.

    ./dev bench peer -m FILE [--threads N] [--rounds N] [--only NAME] [--venv DIR] [--csv FILE]

Measured: decode at empty context and at 2,048 tokens, and prefill of 512 tokens. llama.cpp is taken at its best setting
for each: all combinations of flash attention and weight repacking are tried once and the fastest is compared. It comes
from the package llama-cpp-python, built here into a virtual environment (about ten minutes, once), or --venv names one
that has it. Machines shared with others are noisy: only the ratios mean something, and the spread says how much.
"""
import argparse
import csv
import itertools
import os
import statistics
import subprocess
import sys
import time

from programs import HERE, MEPIC, ROOT, measured

VERSION = "0.3.36"
MEASURES = {  # name: (what, context, tokens)
    "decode@0": ("decode", 0, 64),
    "decode@2048": ("decode", 2048, 32),
    "prefill 512": ("prefill", 0, 512),
}


def venv_python(directory):
    python = os.path.join(directory, "bin", "python")
    if not os.path.exists(python):
        print(f"building llama-cpp-python {VERSION} in {directory}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode != 0:
        subprocess.run([python, "-m", "pip", "install", "-q", f"llama-cpp-python=={VERSION}"], check=True)
    return python


def run_peer(python, model, measure, threads, setting):
    what, context, tokens = MEASURES[measure]
    flash, repack = setting
    command = [python, os.path.join(HERE, "llama_cpp_run.py"), model, what, str(context), str(tokens), str(threads),
               str(int(flash)), str(int(repack))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run_mepic(model, measure, threads):
    what, context, tokens = MEASURES[measure]
    command = [MEPIC, "bench", what, "-m", model, "--threads", str(threads), "--repeats", "3", "--quiet"]
    if what == "decode":
        command += ["--contexts", str(context), "--batches", "1", "--tokens", str(tokens)]
    else:
        command += ["--lengths", str(tokens)]
    return float(measured(command)["tokens/s"])


def setting_name(setting):
    flash, repack = setting
    return f"FA {'on' if flash else 'off'}, {'repack' if repack else 'no repack'}"


def compare(python, args, measure):
    settings = list(itertools.product((True, False), (True, False)))
    best = max(settings, key=lambda setting: run_peer(python, args.model, measure, args.threads, setting))
    ours, theirs = [], []
    for round_number in range(args.rounds):
        pair = [lambda: ours.append(run_mepic(args.model, measure, args.threads)),
                lambda: theirs.append(run_peer(python, args.model, measure, args.threads, best))]
        for run in pair if round_number % 2 == 0 else reversed(pair):
            run()
    ratios = [a / b for a, b in zip(ours, theirs)]
    return {
        "measure": measure,
        "mepic t/s": round(statistics.median(ours), 1),
        "llama.cpp t/s": round(statistics.median(theirs), 1),
        "ratio": round(statistics.median(ours) / statistics.median(theirs), 2),
        "of single rounds": f"{min(ratios):.2f}..{max(ratios):.2f}",
        "llama.cpp at": setting_name(best),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True, help="GGUF file")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs for each measure (default 5)")
    parser.add_argument("--only", choices=MEASURES, help="one measure")
    parser.add_argument("--venv", default=os.path.join(ROOT, "build", "peer"), help="one with llama-cpp-python")
    parser.add_argument("--csv", help="write the table there as well")
    args = parser.parse_args()
    python = venv_python(args.venv)
    print(f"# {os.path.basename(args.model)}, {args.threads} threads, {args.rounds} rounds, llama.cpp of {VERSION}, "
          f"{time.strftime('%Y-%m-%d')}, load {os.getloadavg()[0]:.1f}")
    if os.getloadavg()[0] > 0.5:
        print("# other work runs on this machine; llama.cpp's threads wait by spinning and suffer most: not a fair "
              "figure")
    rows = []
    for measure in [args.only] if args.only else MEASURES:
        row = compare(python, args, measure)
        if not rows:
            print(" | ".join(row))
        print(" | ".join(str(value) for value in row.values()), flush=True)
        rows.append(row)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


main()
