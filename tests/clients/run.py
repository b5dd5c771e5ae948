#!/usr/bin/env python3
"""Runs a client's test against `mepic serve` on a model of random weights, or on MODEL of `./dev models`.

    run.py MEPIC MEPIC_SYNTH WORK_DIR CLIENT [MODEL]

CLIENT_test.py runs with the packages of CLIENT_requirements.txt in a virtual environment in WORK_DIR, which is made
once for each list of packages; without that file it needs none. It gets the server's URL, the same with API keys, and a
key. Exit status 77, skipped, when the packages or the model cannot be had.
"""
import hashlib
import os
import shutil
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
SKIPPED = 77
KEY = "secret-key-of-the-test"


def skip(why):
    print(f"skipped: {why}", file=sys.stderr)
    sys.exit(SKIPPED)


def venv_python(work, client):
    requirements = os.path.join(HERE, f"{client}_requirements.txt")
    if not os.path.exists(requirements):
        return sys.executable
    with open(requirements, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()[:16]
    venv = os.path.join(work, f"venv-{client}-{digest}")
    python = os.path.join(venv, "bin", "python")
    ready = os.path.join(venv, "ready")
    if os.path.exists(ready):
        return python
    shutil.rmtree(venv, ignore_errors=True)
    if subprocess.run([sys.executable, "-m", "venv", venv]).returncode != 0:
        skip("python3 -m venv does not work here")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--timeout", "20",
           "--retries", "1"]
    if subprocess.run(pip + ["-r", requirements]).returncode != 0:
        skip("the packages could not be fetched")
    open(ready, "w").close()
    return python


def start_server(mepic, model, *options):
    command = [mepic, "serve", "-m", model, "--port", "0", "--cache-dir", "none", "--pages", "1024", "--context",
               "4096", "--alias", "tiny", "-q", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    if "http://" not in line:
        process.wait()
        sys.exit(f"the server did not start: {line}")
    return process, line.split()[-1]


def main():
    mepic, synth, work, client, *real = sys.argv[1:]
    os.makedirs(work, exist_ok=True)
    python = venv_python(work, client)
    model, keys = os.path.join(work, f"{client}.gguf"), os.path.join(work, f"{client}.keys")
    if real:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        model = os.path.join(cache, "mepic", "models", real[0])
        if not os.path.exists(model):
            skip(f"{model} is not there")
    else:
        subprocess.run([synth, model], check=True)
    with open(keys, "w", encoding="ascii") as file:
        file.write(KEY + "\n")
    servers = [start_server(mepic, model), start_server(mepic, model, "--api-key-file", keys)]
    try:
        test = [python, os.path.join(HERE, f"{client}_test.py"), servers[0][1], servers[1][1], KEY]
        status = subprocess.run(test).returncode
    finally:
        for process, _ in servers:
            process.terminate()
    ends = [process.wait() for process, _ in servers]
    if status == 0 and ends != [0, 0]:
        sys.exit(f"the servers ended with {ends}")
    sys.exit(status)


main()
