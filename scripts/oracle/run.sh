#!/usr/bin/env bash
# Compares fragment layouts, swizzle and descriptors of the sm_90a wrappers with CuTe's, on the host.
#
# Needs g++ and Python's pip; no GPU, no CUDA toolkit. CuTe and the CUDA headers come from NVIDIA's
# wheels, into PREFIX (default target/oracle); nothing of the project depends on them and CI does not
# run this. Usage: scripts/oracle/run.sh [PREFIX]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
prefix=${1:-$here/../../target/oracle}
packages=(nvidia-cutlass==4.2.0.0 nvidia-cuda-runtime==13.0.96 nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85)
if [ "$(cat "$prefix/.installed" 2>/dev/null)" != "${packages[*]}" ]; then
  mkdir -p "$prefix/wheels"
  python3 -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: \
    -d "$prefix/wheels" "${packages[@]}"
  for wheel in "$prefix"/wheels/*.whl; do
    python3 -m zipfile -e "$wheel" "$prefix"
  done
  echo "${packages[*]}" >"$prefix/.installed"
fi
g++ -std=c++17 -O1 -w -I "$prefix/cutlass_library/source/include" \
  -I "$prefix/nvidia/cu13/include" -I "$prefix/nvidia/cu13/include/cccl" \
  "$here/layouts.cpp" -o "$prefix/layouts"
"$prefix/layouts"
