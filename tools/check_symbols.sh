#!/bin/sh
# check_symbols.sh ARCHIVE: every global symbol of the library begins with mepic_ (public) or mp_ (internal), since a static
# library shares one namespace with the program that links it.
set -eu
symbols=$(nm -g --defined-only -P "${1:?usage: check_symbols.sh ARCHIVE}" 2>/dev/null | awk 'NF >= 2 { print $1 }')
[ -n "$symbols" ] || { echo "$1: no symbols found"; exit 1; }
bad=$(printf '%s\n' "$symbols" | grep -Ev '^(mepic|mp)_' || true)
[ -z "$bad" ] || { printf '%s: a global symbol must begin with mp_ or mepic_:\n%s\n' "$1" "$bad"; exit 1; }
