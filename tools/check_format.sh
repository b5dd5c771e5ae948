#!/bin/sh
# check_format.sh: what the house style says and a script can see. Prints FILE:LINE and the reason; ./dev fmt repairs layout.
set -eu
cd "$(dirname "$0")/.."
export LC_ALL=C
failed=0

texts=$(find . \( -path ./build -o -path ./.git \) -prune -o -type f \( -name '*.[ch]' -o -name '*.cu' -o -name '*.sh' \
    -o -name '*.py' -o -name '*.awk' -o -name '*.md' -o -name '*.json' -o -name '*.yaml' -o -name '*.cmake' \
    -o -name CMakeLists.txt -o -name dev -o -path './.ci/run' \) -print | sort)
c_files=$(printf '%s\n' "$texts" | grep -E '\.(c|h|cu)$')

# shellcheck disable=SC2086
awk '
function bad(why) { print FILENAME ":" FNR ": " why; failed = 1 }
/\t/ { bad("a tab") }
/[ \r]$/ { bad("blanks at the end of the line") }
/(TOD[O]|FIXM[E]|(^|[^X])XX[X])([^A-Za-z]|$)/ { bad("a note of unfinished work; finish it or file an issue") }
FILENAME !~ /\.(md|json|sh)$/ {
    line = $0
    gsub(/[\200-\277]/, "", line) # count characters, not bytes
    if (length(line) > 120) bad(length(line) " characters (limit 120)")
}
END { exit failed }' $texts || failed=1

# shellcheck disable=SC2086
awk -f tools/strip_c.awk $c_files | awk -F '\t' '
function ban(names, why) {
    if (match($3, "(^|[^A-Za-z0-9_.>])(" names ")[ ]*\\(")) { print $1 ":" $2 ": " why ": " $3; failed = 1 }
}
{
    ban("strcpy|strcat|sprintf|vsprintf|strtok|gets|alloca", "has no bound; use snprintf, memcpy or base/mem.h")
    ban("atoi|atol|atoll|atof", "does not see errors; use strtol and its like")
}
$1 ~ /^\.\/src\// && $1 !~ /\/base\/mem\.c$/ {
    ban("malloc|calloc|realloc|strdup|strndup", "allocate through base/mem.h")
    if ($1 !~ /\/cli\//) ban("free", "free through base/mem.h") # the program also frees what getline and jansson gave it
}
$1 ~ /^\.\/src\// && $1 !~ /\/cli\// { ban("abort|exit|_exit|quick_exit", "the library returns a status") }
END { exit failed }' || failed=1

# Headers are laid out by hand: their comments stand in columns.
format=
for name in clang-format-14 clang-format; do
    [ -n "$format" ] || ! "$name" --version 2>/dev/null | grep -q 'version 14\.' || format=$name
done
if [ -n "$format" ]; then
    # shellcheck disable=SC2086
    "$format" --dry-run --Werror $(printf '%s\n' "$c_files" | grep '\.c$') || failed=1
else
    echo "clang-format 14 is not installed: layout not checked"
fi
[ "$failed" = 0 ] || echo "./dev fmt lays out .c files; /* clang-format off */ keeps a table or a kernel as it is written"
exit "$failed"
