#!/usr/bin/env bash
# bench frontier by several processes at once, as one alone hardly fills a GPU with the demo model. What is drawn stays in
# FOLDER/work: the same command goes on where it was stopped.
set -euo pipefail
# each process waits for the GPU, or for one thread of Python: more threads of each only hinder the others
export OMP_NUM_THREADS=1
if [ $# -lt 2 ]; then
    echo "usage: ${0##*/} FOLDER PROCESSES [OPTION of bench frontier ...]" >&2
    exit 2
fi
out=$1 processes=$2
shift 2
mkdir -p "$out"
frontier=(storyadapter-trt bench frontier "$@" --work "$out/work")
modes=$(python -c 'from storyadapter.bench.frontier_modes import MODES; print(*MODES, sep="\n")')
"${frontier[@]}" --only-draw confirm --modes exact &
printf '%s\n' "$modes" | xargs -d '\n' -P "$processes" -I MODE "${frontier[@]}" --only-draw choose --modes MODE
wait $!
"${frontier[@]}" --out "$out/frontier"
