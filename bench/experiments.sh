#!/usr/bin/env bash
# All that this project measures on a GPU: an experiment per line, each one command that can be typed by itself.
#
#   bench/experiments.sh FOLDER             all of them, reports and logs into FOLDER
#   bench/experiments.sh FOLDER NAME …      only these
#
# Full-size models have seeded random weights, the small one is the demo model; no other files are needed. Engines are
# built once, into FOLDER/engines.
set -u -o pipefail

known=" $(sed -n 's/^run \([a-z0-9-]*\) .*/\1/p' "$0" | tr '\n' ' ')"
if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    echo "names:$known" >&2
    exit 2
fi
out=$1
shift
wanted=" $* "
for name in "$@"; do
    [ "${known#* "$name" }" != "$known" ] || { echo "$name isn't an experiment; expected some of$known" >&2; exit 2; }
done
mkdir -p "$out" || exit 2
failed=""

run() { # name, command …
    local name=$1
    shift
    [ "$wanted" = "  " ] || [ "${wanted#* "$name" }" != "$wanted" ] || return 0
    printf '== %s: %s\n' "$name" "$*"
    "$@" 2>&1 | tee "$out/$name.log" || failed="$failed $name"
}

full="--synthetic-weights sdxl --engine-dir $out/engines"
demo="--engine-dir $out/engines"
range="--max-frames 8 --sizes 1024"

# is it right?
run tests python -m pytest -q tests/gpu
run parity storyadapter-trt bench parity --backend inductor --precision fp16 $demo --out "$out/parity"
run quality storyadapter-trt bench quality --backend inductor --precision fp16 --stories 20 --seeds 3 --steps 20 --max-frames 64 $demo --out "$out/quality"
run quality-fp8 storyadapter-trt bench quality --backend inductor --precision fp8 --stories 20 --seeds 3 --steps 20 --max-frames 64 $demo --out "$out/quality-fp8"
# what do cheaper ways cost?
run frontier storyadapter-trt bench frontier --backend inductor --max-frames 64 --engine-dir "$out/engines" --work "$out/frontier-work" --out "$out/frontier"
# how fast? from the published method up, a rung at a time; then whole stories
run throughput storyadapter-trt bench throughput $full --rungs published,batched,sdpa,cached,fused,compiled,graphs,overlapped,diffusers --out "$out/throughput"
run compiled-baselines storyadapter-trt bench throughput $full --cases n16 --rungs sdpa,graphs,diffusers,diffusers-compile,diffusers-xformers,tensorrt --out "$out/compiled-baselines"
run controlnet storyadapter-trt bench throughput $full --synthetic-controlnets 1 --cases n16,control --rungs cached,graphs --out "$out/controlnet"
run small-gpu storyadapter-trt bench throughput $full --cases story --rungs overlapped --device-memory 15.5 --out "$out/small-gpu"
run throughput-fp8 storyadapter-trt bench throughput $full --cases n16,n100,story --rungs graphs,overlapped --precision fp8 --out "$out/throughput-fp8"
run small-gpu-fp8 storyadapter-trt bench throughput $full --cases story --rungs overlapped --precision fp8 --device-memory 12 --out "$out/small-gpu-fp8"
run vae python -m storyadapter.bench.vae --precisions fp16 bf16 fp8 --out "$out/vae"
run quality-vae-fp8 storyadapter-trt bench quality --backend inductor --vae-precision fp8 --stories 20 --seeds 3 --steps 20 --max-frames 64 $demo --out "$out/quality-vae-fp8"
run lcm-story python -m storyadapter.bench.lcm_story --max-frames 16 --engine-dir "$out/engines" --out "$out/lcm-story"
# what does an author add?
run edit storyadapter-trt bench quality --study edit --backend inductor --stories 20 --seeds 2 --max-frames 64 $demo --out "$out/edit"
run references storyadapter-trt bench quality --study references --backend inductor --stories 20 --seeds 2 --max-frames 64 $demo --out "$out/references"
run long-prompts storyadapter-trt bench quality --study long-prompts --backend inductor --stories 20 --seeds 2 --steps 20 --max-frames 64 $demo --out "$out/long-prompts"
# on two GPUs, and as a server under load, which needs none
run workers storyadapter-trt bench workers $full --workers 2 --out "$out/workers"
run serve storyadapter-trt bench serve --workers 8 --worker-kills 5 --out "$out/serve-cpu"
# does it last?
run soak storyadapter-trt bench soak --synthetic-weights sdxl --backend inductor --engine-dir "$out/engines" $range --stories 12 --out "$out/soak"
run soak-sizes storyadapter-trt bench soak --backend inductor --sizes 64,96,128 --max-frames 8 --max-references 16 --stories 24 $demo --out "$out/soak-sizes"
# the kernels alone
run kernel storyadapter-trt bench kernel --out "$out/kernel"
run kernel-bf16 storyadapter-trt bench kernel --dtype bfloat16 --out "$out/kernel-bf16"
run tiles python -m storyadapter.bench.tune grca grca_embedded geglu layer_norm convolution_fp8 linear_fp8 geglu_fp8 group_norm

[ -z "$failed" ] || { echo "failed:$failed; see $out/NAME.log" >&2; exit 1; }
