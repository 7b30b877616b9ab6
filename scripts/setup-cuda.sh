#!/usr/bin/env bash
# Installs the CUDA 13.0 kernel compiler (NVRTC) and the disassemblers from Python wheels.
#
# No driver, no GPU, no root. Usage: scripts/setup-cuda.sh [PREFIX], then `cargo xtask kernels`.
# PREFIX defaults to $FATHOM_CUDA_HOME, else target/cuda. Running it again when everything is in
# place costs nothing. Versions are pinned: a newer compiler makes code that a 13.0 driver refuses.
# The packages are NVIDIA's, under NVIDIA's licence: install them, never redistribute them.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
prefix=${1:-${FATHOM_CUDA_HOME:-$root/target/cuda}}
cuda=$prefix/nvidia/cu13
# There are no 13.0 wheels of the disassemblers; 13.4 reads 13.0 code.
packages=(nvidia-cuda-nvrtc==13.0.88 nvidia-cuda-cuobjdump==13.4.92 nvidia-cuda-nvdisasm==13.4.92)
stamp=$prefix/.installed
if [ "$(cat "$stamp" 2>/dev/null)" = "${packages[*]}" ]; then
  echo "kernel compiler: $cuda (already there)"
  exit 0
fi
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
python3 -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: \
  -d "$wheels" "${packages[@]}"
# Only what an earlier run of this script put there is removed.
if [ -e "$stamp" ]; then rm -rf "$cuda" "$stamp"; fi
mkdir -p "$prefix"
for wheel in "$wheels"/*.whl; do
  python3 -m zipfile -e "$wheel" "$prefix"
done
chmod -R a+rX "$prefix"
# The wheels' tools are not executable once unpacked.
find "$cuda/bin" -type f -exec chmod a+x {} +
ln -sfn libnvrtc.so.13 "$cuda/lib/libnvrtc.so"
echo "${packages[*]}" >"$stamp"
echo "kernel compiler: $cuda"
