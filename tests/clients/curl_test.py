"""curl against a server of ours, as in the manual: curl_test.py URL URL_WITH_KEYS KEY."""
import json
import shutil
import subprocess
import sys

URL, KEYED_URL, KEY = sys.argv[1:]
if not shutil.which("curl"):
    print("skipped: there is no curl", file=sys.stderr)
    sys.exit(77)
BODY = {"messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 24, "temperature": 0,
        "ignore_eos": True}


def curl(*args, code=0):
    run = subprocess.run(["curl", "-sS", *args], capture_output=True, text=True)
    assert run.returncode == code, (run.returncode, run.stderr)
    return run.stdout


def post(path, body, *args, url=URL):
    return curl(url + path, "-H", "Content-Type: application/json", "-d", json.dumps(body), *args)


def a_stream_is_the_reply_in_pieces():
    whole = json.loads(post("/v1/chat/completions", BODY))
    lines = post("/v1/chat/completions", {**BODY, "stream": True}, "-N").split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""], lines[-2:]
    chunks = [json.loads(line[len("data: "):]) for line in lines[:-2]]
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
    assert text == whole["choices"][0]["message"]["content"]


def a_body_may_come_in_chunks():
    # curl asks "Expect: 100-continue" for a long body, and sends one of unknown length in chunks.
    long_body = {"prompt": "word " * 1000, "max_tokens": 2}
    assert json.loads(post("/v1/completions", long_body, "-H", "Transfer-Encoding: chunked"))["usage"]
    assert json.loads(post("/v1/completions", long_body, "-H", "Expect: 100-continue"))["usage"]


def statuses_are_seen():
    assert curl(URL + "/health", "-f", "-i").startswith("HTTP/1.1 200")
    curl(KEYED_URL + "/v1/models", "-f", code=22)
    assert json.loads(curl(KEYED_URL + "/v1/models", "-f", "-H", f"Authorization: Bearer {KEY}"))["data"]
    form = json.loads(curl(URL + "/v1/completions", "-d", "prompt=x"))  # curl -d says it is a form
    assert form["error"]["code"] == "content_type"


for test in [a_stream_is_the_reply_in_pieces, a_body_may_come_in_chunks, statuses_are_seen]:
    test()
    print(f"{test.__name__}: ok")
