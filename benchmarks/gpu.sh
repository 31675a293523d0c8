#!/usr/bin/env bash
# Everything that matters on one large GPU, in under nine minutes: bash benchmarks/gpu.sh OUT
#
# OUT gets a JSON file per benchmark and log.txt. A benchmark that fails or takes too long is
# reported at the end and does not stop the others. TOY=1 runs all of it at toy size on the CPU.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bash benchmarks/gpu.sh OUT}
mkdir -p "$out"
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
failed=()

if [ -n "${TOY:-}" ]; then
  device=cpu
  step="--repeats 1 --calls 1 --backbone resnet18 --crop_size 32 --batch_size 2"
  small="--repeats 1 --calls 1"
  ceilings="--side 64"
  loss="--batch 1 --old 3 --new 2 --small 2 --size 32"
  eval="--batch 1 --classes 5 --small 2 --size 32"
  norm="--batch 1 --maps 8x4"
  precisions="off"
  networks="off+abn"
else
  device=cuda
  step="--repeats 1 --calls 8 --backbone resnet101 --crop_size 512 --batch_size 24"
  small="--repeats 3 --calls 10"
  ceilings="--side 8192"
  loss=""
  eval="--batch 24"
  norm=""
  precisions="bf16 fp16 off"
  networks="bf16+abn bf16+plain bf16+compile"
fi

# bench SECONDS NAME MODULE ARGUMENTS...
bench() {
  local seconds=$1 name=$2 module=$3
  shift 3
  echo "== $name" | tee -a "$out/log.txt"
  if ! timeout "$seconds" "$python" -m "benchmarks.$module" --device "$device" \
      --json "$out/$name.json" "$@" 2>&1 | tee -a "$out/log.txt"; then
    failed+=("$name")
  fi
}

# What no machine without a GPU can test.
cuda_tests() {
  echo "== tests" | tee -a "$out/log.txt"
  if ! timeout 60 "$python" -m pytest -q -p no:cacheprovider -k cuda tests/test_metrics.py \
      tests/test_{norm,norm_triton,pieces,train}.py 2>&1 |
      tee -a "$out/log.txt"; then
    failed+=(tests)
  fi
}

: > "$out/log.txt"
# shellcheck disable=SC2086  # the settings above are lists of words
{
  [ -n "${TOY:-}" ] || cuda_tests
  bench 20 ceilings ceilings $ceilings
  bench 170 step-100-50 step --dataset ade --task 100-50 $step --phases \
    --variants $precisions $networks
  bench 110 step-15-5 step --dataset voc --task 15-5 --overlap $step --phases \
    --variants ${precisions% off} ${networks##* }
  bench 70 loss loss $small $loss
  bench 60 norm norm $small $norm
  bench 30 eval eval $small $eval
}
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed or out of time: ${failed[*]}" | tee -a "$out/log.txt"
  exit 1
fi
