#!/usr/bin/env python3
"""Runs a client's test against `mepic serve` on a model of random weights, or on MODEL of `./dev models`.

    run.py MEPIC MEPIC_SYNTH WORK_DIR CLIENT [MODEL]
    run.py fetch WORK_DIR CLIENT...

CLIENT_test.py runs with the packages of CLIENT_requirements.txt in a virtual environment in WORK_DIR, which the second
form makes, once for each list of packages (./dev setup); without that file it needs none. It gets the server's URL, the
same with API keys, and a key. Exit status 77, skipped, when the model is not there.
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


def requirements_of(client):
    return os.path.join(HERE, f"{client}_requirements.txt")


def venv_of(work, client):
    with open(requirements_of(client), "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()[:16]
    return os.path.join(work, f"venv-{client}-{digest}")


def find_python(work, client):
    if not os.path.exists(requirements_of(client)):
        return sys.executable
    venv = venv_of(work, client)
    if not os.path.exists(os.path.join(venv, "ready")):
        with open(requirements_of(client), encoding="ascii") as file:
            packages = " ".join(file.read().split())
        sys.exit(f"{packages} is not installed in {venv}: run './dev setup {client}'")
    return os.path.join(venv, "bin", "python")


def fetch(work, client):
    venv = venv_of(work, client)
    ready = os.path.join(venv, "ready")
    if os.path.exists(ready):
        return
    print(f"fetching the packages of {client}_test.py", file=sys.stderr)
    shutil.rmtree(venv, ignore_errors=True)
    if subprocess.run([sys.executable, "-m", "venv", venv]).returncode != 0:
        sys.exit("python3 -m venv does not work here")
    pip = [os.path.join(venv, "bin", "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*pip, "-r", requirements_of(client)]).returncode != 0:
        sys.exit(f"the packages of {requirements_of(client)} cannot be fetched; './dev test -LE client' runs what does "
                 "not need them")
    open(ready, "w").close()


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
    if sys.argv[1] == "fetch":
        for client in sys.argv[3:]:
            fetch(sys.argv[2], client)
        return
    mepic, synth, work, client, *real = sys.argv[1:]
    python = find_python(work, client)
    os.makedirs(work, exist_ok=True)
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
