#!/usr/bin/env python3
"""Questions over paragraphs, many clients at once, through a server: time to first token with mepic and with prefix.

    bench/peers/rag.py -m FILE --data XQUAD.json [--clients 16] [--requests 96] [--rounds 3] [--peer PYTHON]

A request holds some paragraphs out of a pool, drawn anew and in a new order, and a question about one of them. The
same requests go to `mepic serve` with "reuse": "mepic" and "prefix", in alternating rounds on one server, after every
paragraph was seen by both; and, with --peer, to llama-server of llama-cpp-python[server] in that Python, where the
paragraphs stand in the message as mepic's template puts them there (that server runs one request at a time).
bench_load asks and measures.
"""
import argparse
import csv
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BUILD = os.path.join(ROOT, "build", "release")
SYSTEM = "Answer the question with a short span copied from the documents. Do not explain."


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
    value = {"stream": True, "max_tokens": tokens, "temperature": 0, "stream_options": {"include_usage": True}}
    system = {"role": "system", "content": SYSTEM}
    if reuse:
        return {**value, "messages": [system, {"role": "user", "content": question}], "documents": documents,
                "reuse": reuse}
    text = "".join(f"Document {i}:\n{d}\n\n" for i, d in enumerate(documents, 1)) + "Question: " + question
    return {**value, "messages": [system, {"role": "user", "content": text}]}


def load(port, bodies, clients, work):
    path, table = os.path.join(work, "bodies"), os.path.join(work, "table.csv")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(b) + "\n" for b in bodies)
    run = subprocess.run([os.path.join(BUILD, "bench", "bench_load"), "--port", str(port), "--streams", str(clients),
                          "--bodies", path, "--csv", table], capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stdout + run.stderr)
    with open(table, newline="", encoding="ascii") as file:
        [row] = csv.DictReader(line for line in file if not line.startswith("#"))
    return row


def start_mepic(args):
    command = [os.path.join(BUILD, "mepic"), "serve", "-m", args.model, "--port", "0", "-q", "-t", str(args.threads)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline().rsplit(":", 1)[1])


def start_peer(args):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [args.peer, "-m", "llama_cpp.server", "--model", args.model, "--n_ctx", "8192", "--port", str(port),
               "--n_threads", str(args.threads), "--n_threads_batch", str(args.threads), "--cache", "true",
               "--interrupt_requests", "false"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return process, port
        time.sleep(0.2)
    sys.exit("llama-cpp-python's server did not start")


def report(name, rows):
    p50 = [float(r["first p50"]) for r in rows]
    print(f"{name:<12} {statistics.median(p50):10.0f} {statistics.median(float(r['first p99']) for r in rows):10.0f} "
          f"{statistics.median(float(r['seconds']) for r in rows):9.1f}   {min(p50):.0f}..{max(p50):.0f}", flush=True)
    return statistics.median(p50)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--data", required=True, help="XQuAD, in SQuAD's layout")
    for name, default in [("clients", 16), ("requests", 96), ("documents", 6), ("pool", 32), ("tokens", 8),
                          ("rounds", 3), ("threads", len(os.sched_getaffinity(0)))]:
        parser.add_argument("--" + name, type=int, default=default)
    parser.add_argument("--peer", help="a Python that has llama-cpp-python[server]")
    parser.add_argument("--peer-requests", type=int, default=16)
    args = parser.parse_args()
    print(f"# {os.path.basename(args.model)}, {args.threads} threads, {args.clients} clients, {args.documents} of "
          f"{args.pool} paragraphs each, load {os.getloadavg()[0]:.1f}")
    print(f"{'':<12} {'first p50':>10} {'first p99':>10} {'seconds':>9}   p50 of rounds (ms)")
    with tempfile.TemporaryDirectory() as work:
        process, port = start_mepic(args)
        try:
            rows = {"mepic": [], "prefix": []}
            paragraphs, _ = draw_requests(args, 0)
            for reuse in rows:  # every paragraph is seen before
                load(port, [body([p], "Which?", reuse, 1) for p in paragraphs], args.clients, work)
            for number in range(args.rounds):
                _, requests = draw_requests(args, number + 1)
                for reuse in list(rows)[::1 if number % 2 else -1]:
                    rows[reuse].append(load(port, [body(d, q, reuse, args.tokens) for d, q in requests], args.clients,
                                            work))
        finally:
            process.terminate()
            process.wait()
        medians = [report(name, rows[name]) for name in rows]
        print(f"mepic / prefix: {medians[0] / medians[1]:.3f}")
        if args.peer:
            process, port = start_peer(args)
            try:
                bodies = [body(d, q, None, args.tokens) for d, q in draw_requests(args, 1)[1][:args.peer_requests]]
                report("llama.cpp", [load(port, bodies, args.clients, work)])
            finally:
                process.terminate()
                process.wait()


main()
