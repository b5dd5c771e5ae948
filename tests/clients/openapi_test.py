"""schemathesis against a server of ours: openapi_test.py URL URL_WITH_KEYS KEY.

Requests are made up from docs/openapi.yaml, good ones and bad ones, always the same; no answer may be 5xx, and each
must have a status and a body that stand there.
"""
import os
import subprocess
import sys
import tempfile

URL, KEYED_URL, KEY = sys.argv[1:]
HERE = os.path.dirname(os.path.abspath(__file__))
SCHEMA = os.path.abspath(os.path.join(HERE, "..", "..", "docs", "openapi.yaml"))
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
st = os.path.join(os.path.dirname(sys.executable), "st")
run = [st, "run", SCHEMA, "--checks", CHECKS, "--phases", "coverage,fuzzing", "--seed", "1",
       "--generation-deterministic"]
work = tempfile.TemporaryDirectory()  # it keeps what it found where it runs
for url, more in [(URL, ["--max-examples", "50"]),
                  (KEYED_URL, ["--max-examples", "5", "-H", f"Authorization: Bearer {KEY}"]),
                  (KEYED_URL, ["--max-examples", "1"])]:
    status = subprocess.run([*run, "--url", url, *more], cwd=work.name).returncode
    if status:
        sys.exit(status)
