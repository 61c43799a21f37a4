#!/usr/bin/env bash
# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#
# What scripts/gpu reports, by programs and tools that are this test's own: no GPU, no compiler. Its argument is a folder for them.
set -euo pipefail
work=$(realpath -m -- "$1")
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
rm -rf "$work"
mkdir -p "$work/bin"
wrong=0

# program path text: an executable script.
program() {
    mkdir -p "$(dirname "$1")"
    printf '#!/bin/sh\n%s\n' "$2" >"$1"
    chmod +x "$1"
}

# Has a file this JSON? have file expression-of-python, where d is what the file holds.
have() {
    python3 -c 'import json, sys; d = json.load(open(sys.argv[1])); assert eval(sys.argv[2]), d' "$work/$1" "$2" 2>"$work/why" && return 0
    printf 'FAILED: %s: %s\n%s\n' "$1" "$2" "$(tail -n 1 "$work/why")"
    wrong=1
}
expect() { # what found expected
    [[ $2 == "$3" ]] && return 0
    printf 'FAILED: %s: %s, expected %s\n' "$1" "$2" "$3"
    wrong=1
}

# gpu expected-status phase...
gpu() {
    local expected=$1 status=0
    shift
    PATH=$work/bin:$PATH FASTMOE_GPU_BUILD=$work/build FASTMOE_GPU_OUT=$work/results FASTMOE_GPU_SECONDS=60 "$repository/scripts/gpu" "$@" \
        >"$work/printed" 2>&1 || status=$?
    expect "the exit status of $*" "$status" "$expected"
    ((status == expected)) || cat "$work/printed"
}
step() { printf '[s for s in d["steps"] if s["name"] == "%s"][0]' "$1"; } # name: the expression of its record

tree=$work/build/tree
mkdir -p "$tree"
: >"$tree/CMakeCache.txt"

# Without a GPU nothing passes.
program "$work/bin/nvidia-smi" 'exit 9'
program "$tree/test/device/device_run" 'echo ran; exit 0'
gpu 77 test bench sanitize train tune
have build/test.json 'd["status"] == "done" and d["gpu"] == "none" and [s["status"] for s in d["steps"]] == ["skipped"]'
have results/reports.json '[r["phase"] for r in d] == ["test", "bench", "sanitize", "train", "tune"]'

# A GPU by name. Tests that pass, fail, are skipped, have no program, and never end.
program "$work/bin/nvidia-smi" 'case $* in *name*) echo "A \"GPU\"" ;; *compute_cap*) echo 9.0 ;; *) echo 1.2 ;; esac'
program "$tree/test/good" 'exit 0'
program "$tree/test/bad" 'echo the reason; exit 1'
program "$tree/test/crashes" 'kill -SEGV $$'
program "$tree/test/skipped" 'exit 77'
program "$tree/test/endless" 'sleep 30'
{
    for name in good bad crashes skipped endless absent; do
        printf 'add_test([=[floor.%s.cuda]=] "%s/test/%s")\n' $name "$tree" $name
        printf 'set_tests_properties([=[floor.%s.cuda]=] PROPERTIES LABELS unit SKIP_RETURN_CODE 77 TIMEOUT 2)\n' $name
    done
    printf 'add_test([=[%s]=] "%s/test/other")\n' floor.good "$tree" presets.cuda "$tree" # no columns
} >"$tree/CTestTestfile.cmake"
program "$tree/test/device/device_nccl" '[ -z "$RANK" ] || { echo "two ranks on one device"; exit 3; }'
gpu 1 test
have build/test.json 'd["status"] == "failed" and d["gpu"] == "A \"GPU\"" and '"$(step portable)"'["status"] == "passed"'
have build/test.json "$(step compose)"'["status"] == "not built"'
have build/test.json "$(step nccl)"'["status"] == "passed" and '"$(step nccl_two_ranks)"'["status"] == "unsupported"'
have build/test.json "$(step floor.bad.cuda)"'["status"] == "failed" and '"$(step floor.absent.cuda)"'["status"] == "not built"'
have build/test.json "$(step floor.endless.cuda)"'["text"].startswith("Timeout") and '"$(step floor.crashes.cuda)"'["status"] == "failed"'
have build/test.json "$(step columns)"'["status"] == "failed" and not [s for s in d["steps"] if s["name"][:7] in ("floor.g", "presets")]'
counts='("1 passed", "1 skipped", "1 not built", "1 Failed", "1 Timeout")'
have build/test.json "all(part in $(step columns)[\"text\"] for part in $counts)"
expect "reasons in logs.txt" "$(grep -c 'the reason' "$work/results/logs.txt")" 1
(($(find "$work/results" -type f | wc -l) <= 8)) || expect "the files of FASTMOE_GPU_OUT" "more" "eight at most"

# Figures go where reports go, and to the programs.
program "$tree/test/device/device_bench" 'echo "[]" >"$1"'
program "$work/bin/python3" 'case $1 in -c) exit 1 ;; esac; echo "skipped: no torch"; exit 77'
gpu 0 bench
rm "$work/bin/python3"
have build/figures.json 'd == []'
have results/figures.json 'd == []'
have build/bench.json "$(step torch)"'["status"] == "skipped" and '"$(step cublas)"'["status"] == "not built"'

# Tunings are ended in time to say which is best.
program "$tree/test/device/tune_hopper" 'echo "[$2]" >"$1"'
: >"$tree/packed"
gpu 0 tune
rm "$tree/packed"
have results/tunings.json '30 < d[0] <= 40'

# What was not built fails nothing.
sed -i '/bad\|crashes\|endless/d' "$tree/CTestTestfile.cmake"
gpu 0 test
have build/test.json "$(step columns)"'["status"] == "passed"'

# A sanitizer's errors come before its excuses, and the program's own words are none.
# sanitized status text expected
sanitized() {
    program "$work/bin/compute-sanitizer" "cat <<'END'
$2
END
exit $1"
    case $3 in
    failed) gpu 1 sanitize ;;
    passed) gpu 0 sanitize ;;
    *) gpu 77 sanitize ;;
    esac
    have build/sanitize.json "$(step racecheck)"'["status"] == "'"$3"'"'
}
sanitized 0 '========= COMPUTE-SANITIZER
feature X is not supported
========= ERROR SUMMARY: 0 errors' passed
sanitized 0 '========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)' passed
sanitized 9 '========= Warning: X is not supported on this device
========= Invalid __global__ write of size 4 bytes
========= ERROR SUMMARY: 10 errors' failed
sanitized 9 '========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)' failed
sanitized 9 '========= Error: Device not supported' unsupported
sanitized 1 '========= Unable to attach to the process' unsupported
sanitized 1 'FAILED: this is not supported
========= ERROR SUMMARY: 0 errors' failed

# What failed alone is looked at by memcheck at once, and by no other tool.
program "$work/bin/compute-sanitizer" 'echo "$*"; echo "========= ERROR SUMMARY: 0 errors"'
program "$tree/test/device/device_run" '[ "$1" != hopper ]'
gpu 1 test sanitize
have build/test.json "$(step hopper)"'["status"] == "failed" and '"$(step memcheck)"'["status"] == "passed"'
expect "parts under memcheck" "$(grep -o 'replays.*' "$work/build/test-memcheck.log")" "replays 2 hopper"
expect "parts under racecheck" "$(grep -o 'replays.*' "$work/build/sanitize-racecheck.log")" "replays 2 portable faults staged"

# A packed build does its work elsewhere.
program "$tree/test/device/device_run" 'echo packed; exit 0'
if command -v strip >/dev/null && command -v readelf >/dev/null; then
    cp "$(type -P true)" "$tree/test/device/device_run" # what can be stripped
    cp "$(type -P true)" "$tree/test/good"
    rm -f "$tree"/test/device/{device_nccl,device_bench,tune_hopper} "$tree"/test/{bad,crashes,skipped,endless}
    gpu 0 pack
    mkdir -p "$work/elsewhere"
    mv "$work/build/programs.tar.xz" "$work/elsewhere"
    rm -rf "$work/build"
    mv "$work/elsewhere" "$work/build_elsewhere"
    PATH=$work/bin:$PATH FASTMOE_GPU_BUILD=$work/build_elsewhere "$repository/scripts/gpu" build test >"$work/printed" 2>&1 ||
        { cat "$work/printed"; expect "the status of what was packed" "$?" 0; }
    have build_elsewhere/test.json "$(step portable)"'["status"] == "passed" and '"$(step columns)"'["status"] == "passed"'
    have build_elsewhere/build.json 'd["steps"][0]["status"] == "skipped"'
fi

((wrong == 0)) && printf 'reports are right\n'
exit "$wrong"
