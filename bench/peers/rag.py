#!/usr/bin/env python3
"""Questions over paragraphs, many clients at once, through servers: times to first token, with and without reuse.

    ./dev bench rag -m FILE --data XQUAD.json [--peer] [--clients 16] [--requests 96] [--rounds 3] [--csv FILE]

A request holds some paragraphs out of a pool, drawn anew and in a new order, and a question about one of them; its
reply has a fixed number of tokens. The same requests go to one `mepic serve` with "reuse": "none", "prefix" and
"mepic", and with --peer to llama.cpp's llama-server, with and without its own reuse of chunks (--cache-reuse N), where
the paragraphs stand in the message as mepic's template puts them there. Every paragraph was seen by all before. All
servers are up during the whole run, with the same model, threads and clients; they take turns, in an order that moves
on by one each round. llama-server has --slots of them. bench_load asks and measures; what was cached the
servers say. "CPU s" is the servers' processor time, which others on the machine change little.
--peer builds llama-server (bench/peers/llama_server.sh), --peer=PROGRAM takes that one. On a machine that others use as
well, ask for one thread (--threads 1): threads of llama.cpp wait for each other many times a token.
"""
import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time

from programs import HERE, MEPIC, Server, servers

SYSTEM = "Answer the question with a short span copied from the documents. Do not explain."
COLUMNS = ["prompts", "cached", "first p50", "first p95", "tokens/s", "seconds", "CPU s"]


def draw_requests(args, seed):
    with open(args.data, encoding="utf-8") as file:
        paragraphs = [p for article in json.load(file)["data"] for p in article["paragraphs"]][:args.pool]
    rng, requests = random.Random(seed), []
    for _ in range(args.requests):
        chosen = rng.sample(paragraphs, args.documents)
        question = rng.choice(rng.choice(chosen)["qas"])["question"]
        requests.append(([p["context"] for p in chosen], question))
    return [p["context"] for p in paragraphs], requests


def body(documents, question, reuse, tokens):
    value = {"stream": True, "max_tokens": tokens, "ignore_eos": True, "temperature": 0,
             "stream_options": {"include_usage": True}}
    system = {"role": "system", "content": SYSTEM}
    if reuse:
        return {**value, "messages": [system, {"role": "user", "content": question}], "documents": documents,
                "reuse": reuse}
    text = "".join(f"Document {i}:\n{d}\n\n" for i, d in enumerate(documents, 1)) + "Question: " + question
    return {**value, "messages": [system, {"role": "user", "content": text}]}


def load(server, bodies, clients, work):
    path = os.path.join(work, "bodies")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(b) + "\n" for b in bodies)
    return server.load("--streams", str(clients), "--requests", str(len(bodies)), "--bodies", path)


def start_mepic(args):
    return Server([MEPIC, "serve", "-m", args.model, "-q", "-t", str(args.threads)])


def start_peer(args, reuse):
    threads = str(args.threads)
    return Server([args.peer, "-m", args.model, "-t", threads, "-tb", threads, "-np", str(args.slots), "-c",
                   str(args.slots * args.context), "--cache-reuse", str(reuse)])


def start_all(args, started):
    """{name of a row: (server, "reuse" of its requests)}; the caller ends what is in `started`."""
    started.append(start_mepic(args))
    rows = {f"mepic, {reuse}": (started[0], reuse) for reuse in ("none", "prefix", "mepic")}
    if args.peer:
        for name, reuse in (("llama-server", 0), (f"llama-server --cache-reuse {args.cache_reuse}", args.cache_reuse)):
            started.append(start_peer(args, reuse))
            rows[name] = (started[-1], None)
    return rows


def measure(args, named, work):
    paragraphs, _ = draw_requests(args, 0)
    names = list(named)
    for server, reuse in named.values():
        server.wait()
        load(server, [body([p], "Which?", reuse, 1) for p in paragraphs], args.clients, work)
    rows = {name: [] for name in names}
    for number in range(args.rounds):
        _, requests = draw_requests(args, number + 1)
        for name in names[number % len(names):] + names[:number % len(names)]:
            server, reuse = named[name]
            before = server.cpu_seconds()
            row = load(server, [body(d, q, reuse, args.tokens) for d, q in requests], args.clients, work)
            rows[name].append({**row, "CPU s": f"{server.cpu_seconds() - before:.2f}"})
            print(f"# round {number + 1}, load {os.getloadavg()[0]:.1f}, {name}: "
                  + ", ".join(f"{c} {rows[name][-1][c]}" for c in COLUMNS), file=sys.stderr, flush=True)
    return rows


def against(rounds, ours, column):
    return [float(r[column]) / float(m[column]) for r, m in zip(rounds, ours)]


def report(args, rows):
    table, ours = [], rows["mepic, mepic"]
    for name, rounds in rows.items():
        first = against(rounds, ours, "first p50")
        table.append({
            "": name,
            "cached %": f"{statistics.median(100 * float(r['cached']) / float(r['prompts']) for r in rounds):.0f}",
            **{c: f"{statistics.median(float(r[c]) for r in rounds):.1f}" for c in COLUMNS[2:]},
            "p50 : mepic's": f"{statistics.median(first):.2f}",
            "of single rounds": f"{min(first):.2f}..{max(first):.2f}",
            "p95 : mepic's": f"{statistics.median(against(rounds, ours, 'first p95')):.2f}",
            "tokens/s : mepic's": f"{statistics.median(against(rounds, ours, 'tokens/s')):.3f}",
            "CPU s : mepic's": f"{statistics.median(against(rounds, ours, 'CPU s')):.2f}"})
    print(" | ".join(table[0]))
    for row in table:
        print(" | ".join(row.values()))
    if args.csv:
        with open(args.csv, "w", newline="", encoding="ascii") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--data", required=True, help="XQuAD, in SQuAD's layout")
    for name, default in [("clients", 16), ("requests", 96), ("documents", 6), ("pool", 32), ("tokens", 16),
                          ("rounds", 3), ("threads", len(os.sched_getaffinity(0))), ("slots", 4),
                          ("cache-reuse", 64), ("context", 4096)]:
        parser.add_argument("--" + name, type=int, default=default)
    parser.add_argument("--peer", nargs="?", const="", help="llama-server beside it; PROGRAM, or built here")
    parser.add_argument("--csv", help="write the table there as well")
    args = parser.parse_args()
    if args.peer == "":
        args.peer = subprocess.run([os.path.join(HERE, "llama_server.sh")], check=True, stdout=subprocess.PIPE,
                                   text=True).stdout.strip()
    print(f"# {os.path.basename(args.model)}, {args.threads} threads, {args.clients} clients, {args.requests} requests "
          f"a round of {args.documents} of {args.pool} paragraphs, {args.tokens} tokens each, {args.rounds} rounds, "
          f"{time.strftime('%Y-%m-%d')}, load {os.getloadavg()[0]:.1f}; times in ms", flush=True)
    with tempfile.TemporaryDirectory() as work, servers() as started:
        report(args, measure(args, start_all(args, started), work))


main()
