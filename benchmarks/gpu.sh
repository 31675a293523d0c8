#!/usr/bin/env bash
# Everything that matters on one large GPU, in nine minutes at most: bash benchmarks/gpu.sh OUT
#
# OUT gets a JSON file per benchmark and log.txt. What matters most comes first; a benchmark that
# fails or runs out of its time is reported at the end and does not stop the others. BUDGET is the
# number of seconds for all of them; those for which none is left are not begun. PYTHON names the
# interpreter, by default that of .venv. TOY=1 runs all of it at toy size on the CPU. Run the tests
# of a GPU before: python -m pytest -k cuda tests
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bash benchmarks/gpu.sh OUT}
mkdir -p "$out"
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
budget=${BUDGET:-540}
failed=()

missing=$("$python" - << 'END'
import importlib.util as find
needed = ("torch", "torchvision", "numpy", "PIL", "tqdm", "pydantic")
print(*(name for name in needed if find.find_spec(name) is None))
END
) || { echo "error: $python does not run: name another one as PYTHON" >&2; exit 1; }
if [ -n "$missing" ]; then
  echo "error: $python lacks $missing: $python -m pip install -r requirements.txt" >&2
  exit 1
fi

if [ -n "${TOY:-}" ]; then
  device=cpu
  step="--repeats 1 --calls 1 --backbone resnet18 --crop_size 32 --batch_size 2"
  first="off"
  others="off+abn"
  compiled="off+plain"
  small="--repeats 1 --calls 1"
  ceilings="--side 64"
  loss="--batch 1 --old 3 --new 2 --small 2 --size 32"
  eval="--batch 1 --classes 5 --small 2 --size 32"
  norm="--batch 1 --maps 8x4"
else
  device=cuda
  step="--repeats 1 --calls 8 --backbone resnet101 --crop_size 512 --batch_size 24"
  first="bf16"
  others="fp16 off bf16+abn bf16+plain"
  if "$python" -c "import inplace_abn" 2> /dev/null; then others+=" fp16+package"; fi
  compiled="bf16+compile"
  small="--repeats 1 --calls 10"
  ceilings="--side 8192"
  loss=""
  eval="--batch 24"
  norm="--batch 24 --dtype bfloat16 --channels_last --maps 256x128 1024x32"
fi
ade="--dataset ade --task 100-50"
voc="--dataset voc --task 15-5 --overlap"

# bench SECONDS NAME MODULE ARGUMENTS...
bench() {
  local seconds=$1 name=$2 module=$3 left=$((budget - SECONDS))
  shift 3
  if [ "$left" -lt 10 ]; then # not even torch would be imported
    failed+=("$name")
    return
  fi
  [ "$seconds" -lt "$left" ] || seconds=$left
  echo "== $name, $seconds s at most" | tee -a "$out/log.txt"
  if ! timeout "$seconds" "$python" -m "benchmarks.$module" --device "$device" \
      --json "$out/$name.json" "$@" 2>&1 | tee -a "$out/log.txt"; then
    failed+=("$name")
  fi
}

: > "$out/log.txt"
# shellcheck disable=SC2086  # the settings above are lists of words
{
  bench 180 step-100-50 step $ade $step --phases --variants $first
  bench 60 loss loss $small $loss
  bench 110 step-15-5 step $voc $step --phases --variants $first
  bench 180 step-100-50-others step $ade $step --variants $others
  bench 45 ceilings ceilings $ceilings
  bench 45 norm norm $small $norm
  bench 45 eval eval $small $eval
  bench 180 step-100-50-compile step $ade $step --variants $compiled
}
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed or out of time: ${failed[*]}" | tee -a "$out/log.txt"
  exit 1
fi
