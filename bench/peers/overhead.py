#!/usr/bin/env python3
"""Tokens a second of a batch that decodes, through the server against the library: what serving costs.

    ./dev bench overhead -m FILE [--batch 16] [--tokens 256] [--rounds 5] [--at-least 0.97] [--csv FILE]

In turn, as many rounds: `bench_load` holds a batch of streams on a `mepic serve`, which counts while all of them run,
and `mepic bench decode` runs as many requests with prompts of the same length through the library. Both share nothing
between requests and have the same threads; the server waits while the library runs, and bench_load has no core of its
own. Exit status 1: the median of the rounds' ratios is below --at-least. On a machine that others use as well the
server's many threads get more of it than the library's, so the ratio is too good there.
"""
import argparse
import csv
import os
import statistics
import sys
import time

from programs import MEPIC, Server, measured, servers


def through_server(args, server):
    row = server.load("--streams", str(args.batch), "--tokens", str(args.tokens))
    # A data line can have the text of several tokens, or wait for the rest of a character.
    rate = float(row["data/s all ran"]) * int(row["tokens"]) / int(row["data"])
    return rate, round(int(row["prompts"]) / args.batch)


def through_library(args, length):
    row = measured([MEPIC, "bench", "decode", "-m", args.model, "-t", str(args.threads), "--reuse", "none", "-q",
                    "--batches", str(args.batch), "--contexts", str(length), "--tokens", str(args.tokens), "--repeats",
                    "1"])
    return float(row["tokens/s"])


def measure(args, server):
    server.wait()
    _, length = through_server(args, server)  # the first one's times do not count
    rows = []
    for number in range(args.rounds):
        rates = {}
        for side in ("server", "library") if number % 2 == 0 else ("library", "server"):
            rates[side] = through_server(args, server)[0] if side == "server" else through_library(args, length)
        rows.append({"round": number + 1, "server t/s": f"{rates['server']:.1f}",
                     "library t/s": f"{rates['library']:.1f}", "ratio": f"{rates['server'] / rates['library']:.3f}",
                     "load": f"{os.getloadavg()[0]:.1f}"})
        if number == 0:
            print(" | ".join(rows[0]))
        print(" | ".join(map(str, rows[-1].values())), flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True)
    for name, default in [("batch", 16), ("tokens", 256), ("rounds", 5), ("threads", len(os.sched_getaffinity(0)))]:
        parser.add_argument("--" + name, type=int, default=default)
    parser.add_argument("--at-least", type=float, default=0.97, help="what the median is judged by (default 0.97)")
    parser.add_argument("--csv", help="write the table there as well")
    args = parser.parse_args()
    print(f"# {os.path.basename(args.model)}, {args.threads} threads, {args.batch} at a time, replies of {args.tokens} "
          f"tokens, {time.strftime('%Y-%m-%d')}, load {os.getloadavg()[0]:.1f}", flush=True)
    if os.getloadavg()[0] > 0.5:
        print("# other work runs on this machine: not a fair figure")
    with servers() as started:
        server = Server([MEPIC, "serve", "-m", args.model, "-q", "-t", str(args.threads), "--reuse", "none"])
        started.append(server)
        rows = measure(args, server)
    ratios = [float(row["ratio"]) for row in rows]
    median = statistics.median(ratios)
    print(f"median {median:.3f} ({min(ratios):.2f} to {max(ratios):.2f})")
    if args.csv:
        with open(args.csv, "w", newline="", encoding="ascii") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    if median < args.at_least:
        sys.exit(f"through the server it is {median:.3f} of the library; at least {args.at_least} is asked for")


main()
