#!/bin/sh
# check_sizes.sh [FILE]...: a file has at most 900 lines and a function at most 120; functions over 60 are listed.
# Relies on the layout of .clang-format: a function begins and ends in column 0.
set -eu
cd "$(dirname "$0")/.."
export LC_ALL=C

[ $# -gt 0 ] || set -- $(find include src tests bench tools -name '*.[ch]' -o -name '*.cu' -o -name '*.sh' -o -name '*.py')

wc -l "$@" | awk '$2 != "total" && $1 > 900 { print $2 ": " $1 " lines (limit 900)"; bad = 1 } END { exit bad }' || failed=1

c_files=$(printf '%s\n' "$@" | grep -E '\.(c|h|cu)$') || exit "${failed:-0}"
# shellcheck disable=SC2086
awk -f tools/strip_c.awk $c_files | awk -F '\t' '
$1 != file { file = $1; start = 0 }
$3 ~ /^[A-Za-z_].*\(/ && $3 !~ /;[ ]*$/ { start = $2; name = $3; sub(/\(.*/, "", name); sub(/.*[ *]/, "", name) }
$3 ~ /^};/ || $3 ~ /^} / { start = 0 }
$3 ~ /^}[ ]*$/ && start {
    lines = $2 - start + 1
    if (lines > 120) { print file ":" start ": " name " has " lines " lines (limit 120)"; bad = 1 }
    else if (lines > 60) print file ":" start ": " name " has " lines " lines (over 60 is listed)"
    start = 0
}
END { exit bad }' || failed=1
exit "${failed:-0}"
