# C without comments and without what stands in quotes, line by line, as FILE <tab> LINE <tab> CODE. For the check_*.sh
# scripts: a word in a comment or a string is not a use of it. POSIX awk.
FNR == 1 { in_comment = 0 }
{
    line = $0
    code = ""
    while (line != "") {
        if (in_comment) {
            end = index(line, "*/")
            if (!end) break
            line = substr(line, end + 2)
            in_comment = 0
        }
        if (!match(line, /\/\*|\/\/|"|'/)) {
            code = code line
            break
        }
        code = code substr(line, 1, RSTART - 1)
        token = substr(line, RSTART, RLENGTH)
        line = substr(line, RSTART + RLENGTH)
        if (token == "//") break
        if (token == "/*") {
            in_comment = 1
            continue
        }
        code = code token token
        # The name of an included file is kept: check_deps.sh reads it.
        if (code ~ /^#include ""$/) {
            code = "#include \"" substr(line, 1, index(line, "\""))
            break
        }
        line = after_quote(line, token)
    }
    printf "%s\t%d\t%s\n", FILENAME, FNR, code
}
function after_quote(s, quote,    c) {
    while (s != "") {
        c = substr(s, 1, 1)
        s = substr(s, c == "\\" ? 3 : 2)
        if (c == quote) break
    }
    return s
}
