#!/usr/bin/env bash
# Everything that wants measuring on a GPU machine, most valuable first, within a time budget.
#
# What steps should take on one H200 (estimates, nothing has run yet), the most that each may, and what of it:
#   doctor, device-check-small      30 s   150 s   opens the GPU; every kernel against the CPU, small
#   slice-quick, twice overlapping  70 s   360 s   the first cells of the grid; again where launches overlap
#   slice-length                    25 s    60 s   one sequence at 4K and 128K
#   kernels                         45 s   150 s   every operator, launches that do nothing, large products
#   load                            25 s    60 s   a checkpoint of 2 GB against the host-to-device rate
#   slice-deterministic             30 s    60 s   what results cost that do not depend on the batch
#   slice                          200 s   330 s   the grid, and chunks of 8K and 2K
#   peers, layer                   300 s   420 s   other implementations, where Python has PyTorch
#   device-check                   120 s   600 s   every kernel at real sizes
#   sanitize                        the rest       each case, also those of sm_80, under compute-sanitizer
# Where a command may take ten minutes: `--budget 560`, then once more with `--from slice` (run-from-slice.json).
#
# Needs the driver; Python with PyTorch for the peers only. No Rust, no network. From a bundle
# (`cargo xtask device-check --bundle DIR`) or a checkout with a release build:
#
#     first_run.sh [--fathom PATH] [--peers DIR] [--out DIR] [--budget SECONDS] [--from STEP] [--commit ID]
#
# Writes to DIR (default: `results` beside this script) what benches/results holds for other machines:
# device-check.json, kernels.json, load.json, slice.json with slice.svg, peers.json, layer.json (with `-pdl1`, `-pdl2`
# in the name where launches overlap), all logs, and run.json with machine, driver, commit and command. A
# step that fails or has no time left is noted there, and the next one runs. Exits with 1 if the device
# check fails or a sanitizer finds something.
set -u
here=$(cd "$(dirname "$0")" && pwd)
command="$0 $*"
fathom=$here/fathom
peers=$here/peers
out=$here/results
budget=900
from=
commit=$(cat "$here/commit" 2>/dev/null || git -C "$here" describe --always --abbrev=12 --dirty=+ 2>/dev/null || echo unknown)
while [ $# -gt 0 ]; do
  if [ $# -lt 2 ]; then echo "first_run.sh: $1 needs a value; see the head of this file" >&2; exit 2; fi
  case $1 in
    --fathom) fathom=$2 ;;
    --peers) peers=$2 ;;
    --out) out=$2 ;;
    --budget) budget=$2 ;;
    --from) from=$2 ;;
    --commit) commit=$2 ;;
    *) echo "first_run.sh: unknown argument $1; see the head of this file" >&2; exit 2 ;;
  esac
  shift 2
done
case $budget in
  '' | *[!0-9]*) echo "first_run.sh: --budget $budget is no number of seconds" >&2; exit 2 ;;
esac
if [ ! -x "$fathom" ]; then
  echo "first_run.sh: there is no program $fathom; give --fathom PATH" >&2
  exit 2
fi
if [ ! -d "$peers" ] && [ -f "$peers.tar.xz" ]; then tar -xJf "$peers.tar.xz" -C "$(dirname "$peers")"; fi
export LD_LIBRARY_PATH=/usr/local/nvidia/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
mkdir -p "$out"
begun=$(date +%s)
steps=""
left() { echo $((budget - ($(date +%s) - begun))); }

# step NAME SECONDS COMMAND...: runs it, for as many seconds at most, with its output in NAME.log.
step() {
  local name=$1 most=$2 rest status started
  shift 2
  # What comes before `--from` was run another time.
  if [ "$from" = "$name" ]; then from=; fi
  if [ -n "$from" ]; then return 0; fi
  rest=$(left)
  # Less than this and nothing but loading would happen.
  if [ "$rest" -lt 10 ]; then
    echo "== $name: no time left"
    steps="$steps{\"step\":\"$name\",\"status\":\"no time left\"},"
    return 0
  fi
  if [ "$rest" -lt "$most" ]; then most=$rest; fi
  echo "== $name (at most $most s)"
  started=$(date +%s)
  timeout --kill-after=10 "$most" "$@" >"$out/$name.log" 2>&1
  status=$?
  tail -n 40 "$out/$name.log"
  steps="$steps{\"step\":\"$name\",\"status\":$status,\"seconds\":$(($(date +%s) - started))},"
  return $status
}

# A text as JSON.
quoted() { printf '"%s"' "$(printf '%s' "$1" | tr -d '\000-\037' | sed 's/\\/\\\\/g; s/"/\\"/g')"; }

clocks() {
  nvidia-smi --query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu --format=csv,noheader 2>/dev/null | head -1
}

gpu=$(nvidia-smi --query-gpu=name,memory.total --format=csv,noheader 2>/dev/null | head -1)
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -1)
machine=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1)
clocks_before=$(clocks)

record() {
  cat >"$out/$run" <<JSON
{
  "commit": $(quoted "$commit"),
  "command": $(quoted "$command"),
  "unix_time_s": $begun,
  "machine": $(quoted "$machine, $(nproc) threads"),
  "gpu": $(quoted "$gpu"),
  "driver": $(quoted "$driver"),
  "clocks_before": $(quoted "$clocks_before"),
  "clocks_after": $(quoted "$(clocks)"),
  "budget_s": $budget,
  "steps": [${steps%,}]
}
JSON
}
trap record EXIT
# A run that goes on leaves what the one before noted.
run=run${from:+-from-$from}.json

checked=0
step doctor 30 "$fathom" doctor --device cuda
goldens=()
if [ -d "$here/goldens" ]; then goldens=(--goldens "$here/goldens"); fi
step device-check-small 120 "$fathom" device-check --small "${goldens[@]}" --out "$out/device-check-small.json" || checked=1
if [ "$checked" = 1 ]; then
  # A fault takes the process's context with it: every case by itself, waiting for each launch, so that
  # the kernel at fault is named and the others are checked all the same.
  FATHOM_CUDA_CAREFUL=1
  export FATHOM_CUDA_CAREFUL
  number=0
  while IFS= read -r case; do
    number=$((number + 1))
    step "alone-$number" 40 "$fathom" device-check --small --only "$case" --out "$out/alone-$number.json"
  done < <("$fathom" device-check --list)
  unset FATHOM_CUDA_CAREFUL
fi
# The first cells of the grid before anything long: they answer most.
step slice-quick 120 "$fathom" bench slice --quick --only decode --batch 1,64 --context 1K \
  --budget-s 100 --out "$out/slice-quick.json"
# Launches that overlap: the same check and the same cells once more. Off by default until measured.
for level in 1 2; do
  if step "device-check-small-pdl$level" 60 env FATHOM_CUDA_PDL=$level "$fathom" device-check --small \
    "${goldens[@]}" --out "$out/device-check-small-pdl$level.json"; then
    step "slice-quick-pdl$level" 60 env FATHOM_CUDA_PDL=$level "$fathom" bench slice --quick --only decode \
      --batch 1,64 --context 1K --budget-s 45 --out "$out/slice-quick-pdl$level.json"
  else
    case $? in 124 | 137) ;; *) checked=1 ;; esac
  fi
done
# What a long context costs one sequence: at most 6 % is wanted.
step slice-length 60 "$fathom" bench slice --quick --only decode --batch 1 --context 4K,128K \
  --budget-s 45 --out "$out/slice-length.json"
step kernels 150 "$fathom" bench kernels --out "$out/kernels.json"
if scratch=$(mktemp -d); then
  step load 60 "$fathom" bench load --scratch "$scratch" --out "$out/load.json"
  rm -rf "$scratch"
fi
# What results cost that do not depend on the batch: at most 15 % is wanted.
step slice-deterministic 60 "$fathom" bench slice --quick --deterministic --only decode,prefill \
  --batch 1,64 --context 1K --prefill 2K --budget-s 45 --out "$out/slice-deterministic.json"
step slice 330 "$fathom" bench slice --budget-s "$(($(left) < 330 ? $(left) - 20 : 300))" --out "$out/slice.json"
if [ -s "$out/slice.json" ]; then step plot 10 "$fathom" bench plot "$out/slice.json" --out "$out/slice.svg"; fi
if python3 -c 'import torch' 2>/dev/null; then
  scripts=$here/scripts
  if [ ! -d "$scripts" ]; then scripts=$here/../peers; fi
  step peers 300 python3 "$scripts/run.py" --fathom "$fathom" --peers "$peers" \
    --budget-s "$(($(left) < 300 ? $(left) - 20 : 270))" --out "$out/peers.json"
  step layer 120 python3 "$scripts/layer.py" --fathom "$fathom" --peers "$peers" --out "$out/layer.json"
else
  echo "== peers: python3 has no torch: absent"
  steps="$steps{\"step\":\"peers\",\"status\":\"python3 has no torch\"},"
fi
step device-check 600 "$fathom" device-check "${goldens[@]}" --out "$out/device-check.json" || checked=1
sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer)
if [ -n "$sanitizer" ]; then
  number=0
  while IFS= read -r case; do
    number=$((number + 1))
    # A tool that ran out of time has found nothing.
    step "sanitize-$number" 120 "$fathom" device-check --sanitize --only "$case" \
      --out "$out/sanitize-$number.json"
    case $? in 0 | 124 | 137) ;; *) checked=1 ;; esac
  done < <("$fathom" device-check --list)
else
  echo "== sanitize: there is no compute-sanitizer: absent"
  steps="$steps{\"step\":\"sanitize\",\"status\":\"there is no compute-sanitizer\"},"
fi
if [ -n "$from" ]; then
  echo "first_run.sh: there is no step $from" >&2
  exit 2
fi
echo "results in $out"
exit $checked
