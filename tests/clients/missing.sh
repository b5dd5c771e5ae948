#!/bin/sh
# A client whose packages are not there fails its test, and says what to do: missing.sh PYTHON RUN.PY WORK_DIR.
set -u
said=$("$1" "$2" none none "$3/nothing" openai 2>&1)
status=$?
printf '%s\n' "$said"
case $status:$said in
1:openai==*"run './dev setup openai'") ;;
*) exit 1 ;;
esac
