#!/usr/bin/env bash
# Compares fragment layouts, swizzle and descriptors of the wrappers of every architecture with CuTe's, on the host.
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
cute=(-I "$prefix/cutlass_library/source/include" -I "$prefix/nvidia/cu13/include" -I "$prefix/nvidia/cu13/include/cccl")
build() { g++ -O1 -w "$@"; }
build -std=c++17 "${cute[@]}" "$here/layouts.cpp" -o "$prefix/layouts"
build -std=c++17 "${cute[@]}" -c "$here/layouts100.cpp" -o "$prefix/layouts100.o"
build -std=c++20 -c "$here/headers100.cpp" -o "$prefix/headers100.o"
build "$prefix/layouts100.o" "$prefix/headers100.o" -o "$prefix/layouts100"
# CuTe says on the host that it knows no address of shared memory; descriptors are compared without it.
failed=0
for program in layouts layouts100; do
  "$prefix/$program" >"$prefix/$program.txt" || failed=1
  grep -v '^ERROR: cast_smem_ptr_to_uint' "$prefix/$program.txt"
done
exit $failed
