#!/bin/sh
# demo.sh [OPTIONS of mepic bench documents]: six questions over eight documents, in six orders, with everything computed
# and with the documents' KV computed once. Needs the built program and SmolLM2 (./dev demo sees to both).
set -eu
cd "$(dirname "$0")/.."

model=${XDG_CACHE_HOME:-$HOME/.cache}/mepic/models/SmolLM2-135M-Instruct.Q4_1.gguf
set -- bench documents -m "$model" --questions data/demo/questions.txt --system "$(cat data/demo/system.txt)" \
    --max-tokens 24 "$@"
for document in data/demo/documents/*.txt; do set -- "$@" --doc "$document"; done
exec build/release/mepic "$@"
