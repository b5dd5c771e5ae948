"""The programs of this tree, run and measured: what the scripts beside this one share."""
import contextlib
import csv
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
MEPIC = os.path.join(ROOT, "build", "release", "mepic")
BENCH_LOAD = os.path.join(ROOT, "build", "release", "bench", "bench_load")


def measured(command):
    """The row of the table that a program of ours writes to --csv; ends the script with what it printed if it fails."""
    with tempfile.TemporaryDirectory() as work:
        table = os.path.join(work, "table.csv")
        run = subprocess.run([*command, "--csv", table], capture_output=True, text=True)
        if run.returncode:
            sys.exit(run.stdout + run.stderr)
        with open(table, newline="", encoding="ascii") as file:
            [row] = csv.DictReader(line for line in file if not line.startswith("#"))
    return row


class Server:
    def __init__(self, command):
        """`command` gets --port and a free one."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        # Where others use the machine, threads of llama.cpp that wait by spinning lose most of its time.
        self.process = subprocess.Popen([*command, "--port", str(self.port)], stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL, env={"OMP_WAIT_POLICY": "passive", **os.environ})
        self.name = os.path.basename(command[0])

    def cpu_seconds(self):
        with open(f"/proc/{self.process.pid}/stat", encoding="ascii") as file:
            times = file.read().rsplit(")", 1)[1].split()[11:13]  # in user mode, in the system
        return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")

    def wait(self):
        while self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health"):
                    return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        sys.exit(f"{self.name} did not start")

    def load(self, *options):
        return measured([BENCH_LOAD, "--port", str(self.port), "--silence", "1200", *options])


@contextlib.contextmanager
def servers():
    """A list for servers, which end when it is left, by a signal as well."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = []
    try:
        yield started
    finally:
        for server in started:
            server.process.terminate()
        for server in started:
            server.process.wait()
