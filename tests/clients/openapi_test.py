"""docs/openapi.yaml against a server of ours: openapi_test.py URL URL_WITH_KEYS KEY.

Values at a bound that stands there are taken, values beyond it are refused by name. Then schemathesis makes up
requests, good ones and bad ones, always the same; no answer may be 5xx, and each must have a status and a body that
stand there. It gets a copy with bounds of its own, so that it does not take long.
"""
import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request

import yaml

URL, KEYED_URL, KEY = sys.argv[1:]
HERE = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(HERE, "..", "..", "docs", "openapi.yaml"), encoding="utf-8") as file:
    API = yaml.safe_load(file)


def request_schemas(api):
    """Path and schema of what can be sent, and what they refer to."""
    for path, methods in api["paths"].items():
        for method in methods.values():
            if "requestBody" in method:
                yield path, method["requestBody"]["content"]["application/json"]["schema"]


def resolve(api, schema):
    while "$ref" in schema:
        schema = api["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    return schema


# ---- Bounds ----------------------------------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "x"}]
BASES = {"/v1/chat/completions": {"messages": MESSAGES, "logprobs": True},
         "/v1/completions": {"prompt": "x"},
         "/v1/messages": {"model": "tiny", "messages": MESSAGES, "max_tokens": 1}}
ITEMS = {"messages": MESSAGES[0], "stop": "x", "stop_sequences": "x", "stop_token_ids": 1, "documents": "a document",
         "prompt": "x"}


def blames(path, body, name):
    """Whether the server refuses the body and says that it is for this field."""
    request = urllib.request.Request(URL + path, json.dumps({"stream": True, "max_tokens": 1, **body}).encode(),
                                     {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request):  # left with its first event
            return False
    except urllib.error.HTTPError as answer:
        error = json.load(answer)["error"]
        if error.get("code") == "invalid_json":  # an integer that needs more than 64 bits
            return True
        return answer.code == 400 and error.get("code") != "context_length_exceeded" and f"'{name}" in error["message"]


def bounds(schema, name):
    """Values that are allowed, and such that are not."""
    step = 1 if schema.get("type") == "integer" else 0.5
    if "minimum" in schema:
        yield schema["minimum"], schema["minimum"] - step
    if "maximum" in schema:
        yield schema["maximum"], schema["maximum"] + step
    if "maxItems" in schema and name in ITEMS:
        yield [ITEMS[name]] * schema["maxItems"], [ITEMS[name]] * (schema["maxItems"] + 1)
    if "maxLength" in schema:
        yield "x" * schema["maxLength"], "x" * (schema["maxLength"] + 1)


def bounds_are_the_servers():
    n = 0
    for path, schema in request_schemas(API):
        for name, field in resolve(API, schema)["properties"].items() if path in BASES else []:
            for kind in field.get("oneOf", [resolve(API, field)]):
                for good, bad in bounds(kind, name):
                    assert not blames(path, {**BASES[path], name: good}, name), (path, name, str(good)[:40], "refused")
                    assert blames(path, {**BASES[path], name: bad}, name), (path, name, str(bad)[:40], "taken")
                    n += 1
    print(f"{n} bounds are the server's")
    assert n > 50


# ---- Made-up requests ------------------------------------------------------------------------------------------------

NARROW = {"max_tokens": {"maximum": 8}, "max_completion_tokens": {"maximum": 8}, "messages": {"maxItems": 6},
          "documents": {"maxItems": 4}, "tools": {"maxItems": 2}, "logit_bias": {"maxProperties": 4},
          "stop_token_ids": {"maxItems": 8}, "model": {"enum": ["tiny"]}, "top_k": {"maximum": 1000}}


def narrow(api, schema, seen, name=None):
    """Small requests, for short replies, of the model that is there."""
    schema = resolve(api, schema)
    if id(schema) in seen:
        return
    seen.add(id(schema))
    schema.update(NARROW.get(name, {}))
    properties = schema.get("properties", {})
    if name is None and "max_tokens" in properties:
        schema["required"] = sorted({*schema["required"], "max_tokens"})
    if schema.get("type") == "string" and "enum" not in schema and "pattern" not in schema:
        schema["maxLength"] = min(200, schema.get("maxLength", 200))
    if schema.get("type") == "integer" and "maximum" not in schema:
        schema["maximum"] = 250  # an id of a token
    if schema.get("type") == "array":
        schema["maxItems"] = min(16, schema.get("maxItems", 16))
    for key, value in properties.items():
        narrow(api, value, seen, key)
    for value in schema.get("oneOf", []):
        if set(value) - {"required"}:
            narrow(api, value, seen, "one of " + str(name))
    if "items" in schema:
        narrow(api, schema["items"], seen, "item")


def made_up_requests_are_answered_as_it_says():
    api = json.loads(json.dumps(API))  # no part is shared
    seen = set()
    for _, schema in request_schemas(api):
        narrow(api, schema, seen)
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    st = os.path.join(os.path.dirname(sys.executable), "st")
    with tempfile.TemporaryDirectory() as work:  # schemathesis keeps what it found where it runs
        with open(os.path.join(work, "openapi.json"), "w", encoding="utf-8") as copy:
            json.dump(api, copy)
        run = [st, "run", "openapi.json", "--checks", checks, "--phases", "coverage,fuzzing", "--seed", "1",
               "--generation-deterministic"]
        for url, more in [(URL, ["--max-examples", "50"]),
                          (KEYED_URL, ["--max-examples", "5", "-H", f"Authorization: Bearer {KEY}"]),
                          (KEYED_URL, ["--max-examples", "1"])]:
            status = subprocess.run([*run, "--url", url, *more], cwd=work).returncode
            if status:
                sys.exit(status)


bounds_are_the_servers()
made_up_requests_are_answered_as_it_says()
