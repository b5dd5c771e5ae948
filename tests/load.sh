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
# Exit status 1, for a reason that has these words.
fail() {
    words=$1
    shift
    status=0
    "$load" --port "$port" --pid "$server" "$@" >"$work/report" 2>&1 || status=$?
    cat "$work/report"
    [ "$status" = 1 ] && grep -q "$words" "$work/report" || { echo "load.sh: status $status, not '$words'"; return 1; }
}
ask() {
    "$load" --port "$port" --pid "$server" "$@" >"$work/report" || { cat "$work/report"; return 1; }
    cat "$work/report"
    grep -q 'pages: ' "$work/report" || { echo "load.sh: bench_load found no pages in /metrics"; return 1; }
}

serve
echo "memory of a server that had nothing to do before"
fail "RSS grew" --streams 100 --tokens 40 --max-growth 1
echo "300 streams"
ask --streams 300 --tokens 40 --warm-up 300 --max-growth 1G
echo "a storm of 300 that hang up"
ask --streams 300 --tokens 2000 --leave 100
echo "everything in turn"
ask --streams 50 --requests 300 --tokens 40 --leave 30 --bad 10 --whole 20
echo "beside 100 that never end"
ask --streams 50 --requests 200 --tokens 40 --slow 100 --rounds 1 --goodput 0
fail "goodput beside slow" --streams 50 --tokens 40 --slow 100 --rounds 1 --goodput 1000000
echo "beside fewer than were asked for"
(ulimit -n 60 && fail "of 100 slow connections hang" --streams 10 --tokens 40 --slow 100 --rounds 1 --goodput 0)
stop

serve --max-replies 30
echo "ten times the seats"
ask --streams 300 --tokens 40 --may-refuse
stop
