#!/bin/sh
# service.sh MEPIC: docs/mepic.service is what systemd understands, and what it sets are options of the program. Exit
# status 77: there is no systemd here.
set -eu
mepic=$1
unit=$(cd "$(dirname "$0")/.." && pwd)/docs/mepic.service
command -v systemd-analyze >/dev/null || exit 77
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

sed "s#^ExecStart=/usr/local/bin/mepic #ExecStart=$mepic #" "$unit" >"$work/mepic.service"
grep -q "^ExecStart=$mepic " "$work/mepic.service"
told=$(systemd-analyze verify --man=no "$work/mepic.service" 2>&1) || { echo "$told"; exit 1; }
[ -z "$told" ] || { echo "systemd-analyze verify: $told"; exit 1; }

# A variable that fits no option is not looked at.
"$mepic" serve --help >"$work/help"
options=$(sed -n 's/^Environment=//p' "$unit" | tr ' ' '\n' | sed -n 's/^MEPIC_\([A-Z_]*\)=.*/--\1/p' | tr 'A-Z_' 'a-z-')
[ -n "$options" ]
for option in $options --config --model --drain; do
    grep -q -e "$option " "$work/help" || { echo "mepic.service: mepic serve has no $option"; exit 1; }
done
drain=$(sed -n 's/.*--drain.*default \([0-9]*\).*/\1/p' "$work/help")
stop=$(sed -n 's/^TimeoutStopSec=//p' "$unit")
[ "$drain" -lt "$stop" ] || { echo "mepic.service: TimeoutStopSec=$stop leaves no time for --drain $drain"; exit 1; }
