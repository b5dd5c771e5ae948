#!/bin/sh
# check_deps.sh: every #include "..." of the source tree against the table "Who may include whom" in docs/ARCHITECTURE.md.
# A room is the row with the longest name that fits a path; a folder without a row is an error.
set -eu
cd "$(dirname "$0")/.."
table=docs/ARCHITECTURE.md

# shellcheck disable=SC2046
awk -f tools/strip_c.awk $(find include src bench tools -name '*.[ch]' -o -name '*.cu' | sort) |
    awk -v table="$table" '
function room_of(path,    room, best) {
    best = ""
    for (room in may)
        if ((index(path, room "/") == 1 || path == room) && length(room) > length(best)) best = room
    return best
}
function folder_of(path) { sub(/\/[^\/]*$/, "", path); return path }
function bad(why) { print file ":" line ": " why; failed = 1 }
BEGIN {
    while ((getline row < table) > 0) {
        if (row ~ /^\| room \| may include \|/) inside = 1
        else if (row !~ /^\|/) inside = 0
        if (!inside || row !~ /^\| `/) continue
        split(row, column, "|")
        room = column[2]
        gsub(/[ `]/, "", room)
        gsub(/`/, " ", column[3])
        may[room] = " " column[3] " "
        rooms++
    }
    if (!rooms) { print table ": the table of rooms was not found"; exit failed = 1 }
    FS = "\t"
}
{ file = $1; line = $2 }
file != seen {
    seen = file
    path = file
    sub(/^src\//, "", path)
    sub(/\.[a-z]+$/, "", path)
    from = room_of(path)
    # A sub-folder is a room of its own: it may not slip in under the row of the folder above.
    public = file == "include/mepic.h"
    if (!public && !(folder_of(path) in may)) bad("the folder has no row in " table)
}
$3 ~ /^[ ]*#[ ]*include[ ]*"/ && !public {
    target = $3
    sub(/^[^"]*"/, "", target)
    sub(/".*/, "", target)
    sub(/\.[a-z]+$/, "", target)
    if (target == "mepic" || from == "") next
    if (index(target, "/") == 0) { bad("name the folder too: \"" target "\""); next }
    to = room_of(target)
    if (to != from && index(may[from], " " to " ") == 0 && index(may[from], " " target " ") == 0)
        bad("`" from "` may not include \"" target "\" (" table ")")
}
END { exit failed }'
