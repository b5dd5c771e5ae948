#!/bin/sh
# Everything about the CUDA backend in one call on a machine with a GPU: build, check, time. Needs nvcc only to build:
# with BUILD=DIR, what was built elsewhere is run. Prints a summary last; full output in OUT (default build/gpu).
# SANITIZE=1: check also runs small cases of the kernels' tests under compute-sanitizer.
# usage: bench/gpu.sh [check] [ops] [model]     (default: all three)
set -eu
cd "$(dirname "$0")/.."
case "${1:-}" in -h|--help) sed -n '2,5s/^# //p' "$0"; exit 0 ;; esac
parts=${*:-check ops model}
out=${OUT:-build/gpu}
mkdir -p "$out"
if [ -z "${BUILD:-}" ]; then
    BUILD=build/cuda
    cmake --preset cuda >"$out/build.log"
    cmake --build --preset cuda >>"$out/build.log" || { tail -n 30 "$out/build.log"; exit 1; }
fi
failed=
find_program() { # where it lies in a build tree, or flat in a folder of programs
    for dir in tests bench tools src/cli .; do
        [ -x "$BUILD/$dir/$1" ] && { echo "$BUILD/$dir/$1"; return; }
    done
    echo "bench/gpu.sh: $BUILD has no $1" >&2
    return 1
}
limit=300 # seconds; a sanitizer takes longer
step() { # step NAME PROGRAM ARGUMENTS...: output to a file, one line of verdict
    name=$1
    shift
    if timeout $limit "$@" >"$out/$name.log" 2>&1; then
        echo "ok      $name"
    else
        status=$?
        if [ $status = 77 ]; then echo "skipped $name"; else
            echo "FAILED  $name (status $status): $out/$name.log"
            tail -n 15 "$out/$name.log"
            failed="$failed $name"
        fi
    fi
}
# 48 paragraphs of 250 words in SQuAD's layout, for where XQuAD is not: words of a text, shuffled.
make_paragraphs() {
    awk 'BEGIN { srand(1) } { for (i = 1; i <= NF; i++) { gsub(/[^A-Za-z]/, "", $i); if ($i != "") word[n++] = $i } }
        END {
            printf "{\"data\": [{\"paragraphs\": ["
            for (p = 0; p < 48; p++) {
                printf "%s{\"context\": \"", p ? ", " : ""
                for (i = 0; i < 250; i++) printf "%s%s", i ? " " : "", word[int(rand() * n)]
                printf "\", \"qas\": [{\"question\": \"Which word?\", \"answers\": [{\"text\": \"%s\"}]}]}", word[p]
            }
            print "]}]}"
        }' data/canonical-v1.txt
}
has_part() { case " $parts " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader || true
if has_part check; then
    for test in rows weights matmul decode prefill sample; do
        program=$(find_program "test_cuda_$test") || continue
        step "$test" "$program"
        [ -z "${SANITIZE:-}" ] || for tool in memcheck racecheck initcheck; do
            single=
            [ "$test-$tool" != sample-racecheck ] || single=single
            limit=1800
            step "$test-$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 --suppressions bench/sanitizer.xml \
                "$program" small $single
            limit=300
        done
    done
    program=$(find_program test_cuda_faults) && step faults "$program"
    program=$(find_program test_reuse) && step reuse-fp8 "$program" cuda fp8
    for test in reuse oracle; do
        program=$(find_program "test_$test") || continue
        step "$test" "$program" cuda
        step "$test-smollm2" "$program" cuda model
        step "$test-kv8" "$program" cuda kv8
    done
    program=$(find_program test_golden) && for model in smollm2-135m qwen0.5b; do
        step "golden-$model" "$program" "$model" cuda
        step "golden-fp8-$model" "$program" "$model" cuda fp8
        step "golden-kv8-$model" "$program" "$model" cuda kv8
    done
fi
if has_part ops; then
    for bench in ops attend prefill; do
        program=$(find_program "bench_cuda_$bench") || continue
        step "bench-$bench" "$program"
        cat "$out/bench-$bench.log"
    done
    for bench in "attend fp8" "attend fp8 biased" "prefill --fp8"; do
        program=$(find_program "bench_cuda_${bench%% *}") || continue
        log=bench-$(printf %s "$bench" | tr -d - | tr ' ' -)
        # shellcheck disable=SC2086
        step "$log" "$program" ${bench#* }
        cat "$out/$log.log"
    done
    if python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
        step torch python3 bench/peers/torch_attention.py
        cat "$out/torch.log"
    else
        echo "skipped torch: python3 has none that sees the GPU"
    fi
fi
if has_part model; then
    synth=$(find_program mepic-synth)
    mepic=$(find_program mepic)
    file=${MODEL:-$out/8b.gguf}
    [ -f "$file" ] || step synth "$synth" --preset 8b --type Q4_0 --drawn-rows 64 "$file"
    common="-m $file --device cuda -q -c 20480"
    data=../shared/data/xquad.en.json
    [ -f "$data" ] || { data=$out/paragraphs.json && make_paragraphs >"$data"; }
    # shellcheck disable=SC2086
    {
        step decode "$mepic" bench decode $common --contexts 0,2048 --batches 1,16,64 --step-tokens 4096
        step decode-fp8 "$mepic" bench decode $common --weights fp8 --contexts 0,2048 --batches 1,16,64 --step-tokens 4096
        step decode-kv8 "$mepic" bench decode $common --kv-type fp8 --contexts 0,2048 --batches 1,16,64 --step-tokens 4096
        step prefill-kv8 "$mepic" bench prefill $common --kv-type fp8 --lengths 2048,8192 --step-tokens 8192
        step prefill-fp8 "$mepic" bench prefill $common --weights fp8 --lengths 2048,8192 --step-tokens 8192
        step prefill "$mepic" bench prefill $common --lengths 2048,8192 --step-tokens 8192
        step resident "$mepic" bench prefill $common --lengths 64 --chunks 16 --step-tokens 8192
        step unshared "$mepic" bench prefill $common --lengths 64 --chunks 16 --step-tokens 8192 --reuse none
        step reuse-bench "$mepic" bench reuse $common --data "$data" --requests 16 --concurrency 8 --paragraphs 8
    }
    for log in decode decode-fp8 decode-kv8 prefill prefill-fp8 prefill-kv8 resident unshared reuse-bench; do
        echo "$log:"
        cat "$out/$log.log"
    done
fi
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
