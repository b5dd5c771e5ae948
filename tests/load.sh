#!/bin/sh
# load.sh MEPIC MEPIC_SYNTH BENCH_LOAD: many streams at once against `mepic serve` in a process of its own; that all end
# as they should, and that the pages and descriptors they held come back, is what bench_load's exit status says. It looks
# at no time.
set -eu
mepic=$1 synth=$2 load=$3
work=$(mktemp -d)
server=
clean() {
    [ -z "$server" ] || kill "$server" 2>/dev/null || :
    rm -rf "$work"
}
trap clean EXIT
trap 'exit 1' INT TERM

"$synth" --context 4096 "$work/tiny.gguf"

# serve OPTIONS...: starts a server; sets server and port.
serve() {
    mkfifo "$work/out"
    "$mepic" serve -m "$work/tiny.gguf" --port 0 --cache-dir none --pages 2048 -t 1 -q "$@" >"$work/out" &
    server=$!
    read -r line <"$work/out"
    rm "$work/out"
    port=${line##*:}
}
stop() {
    kill "$server"
    wait "$server"
    server=
}
ask() {
    "$load" --port "$port" --pid "$server" "$@" >"$work/report" || { cat "$work/report"; return 1; }
    cat "$work/report"
    grep -q 'pages: ' "$work/report" || { echo "load.sh: bench_load found no pages in /metrics"; return 1; }
}

serve
echo "300 streams"
ask --streams 300 --tokens 40
echo "a storm of 300 that hang up"
ask --streams 300 --tokens 2000 --leave 100
echo "everything in turn"
ask --streams 50 --requests 300 --tokens 40 --leave 30 --bad 10 --whole 20
stop

serve --max-replies 30
echo "ten times the seats"
ask --streams 300 --tokens 40 --may-refuse
stop
