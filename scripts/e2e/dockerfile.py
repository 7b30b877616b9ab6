#!/usr/bin/env python3
"""The build steps of `Dockerfile.cuda`, run without Docker.

Makes the folders that the image's build stage would have under one folder of ours, from the files that
the build context holds, with the kernel compiler of `scripts/setup-cuda.sh` in place of the one that is
copied from NVIDIA's image; runs every RUN of that stage there with the environment that it sets; and
looks at what the last stage takes: the program starts, carries the kernels that were compiled, and
needs no library of CUDA's. Run by `cargo xtask image`.

Not here: base images, users, permissions, the container runtime.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = ROOT / "Dockerfile.cuda"
# What a program may be linked to: all of it is in the smallest image that runs any program.
SYSTEM = ("linux-vdso", "ld-linux", "libc.so", "libm.so", "libgcc_s.so", "libdl.so", "libpthread.so", "librt.so")


def instructions(text):
    """Pairs of an instruction's name and the rest of it; continued lines are joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def stages(text):
    """Instructions by stage, in order; a stage without a name has that of its number."""
    found = {}
    for name, rest in instructions(text):
        if name == "FROM":
            words = rest.split()
            current = found.setdefault(words[2] if len(words) > 2 else str(len(found)), [])
        else:
            current.append((name, rest))
    return found


def settings(stage):
    """What its ENV lines set."""
    words = [word for name, rest in stage if name == "ENV" for word in rest.split()]
    return dict(word.split("=", 1) for word in words)


def health_command(text):
    """The command that asks a container how it is, and the environment that it is asked in."""
    last = list(stages(text).values())[-1]
    check = next(rest for name, rest in last if name == "HEALTHCHECK")
    return json.loads(check.split("CMD", 1)[1]), settings(last)


class Image:
    """Folders of an image, all under one folder of this machine."""

    def __init__(self, folder):
        self.folder = folder
        self.workdir = "/"
        self.environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}

    def place(self, path):
        """Where a path of the image lies here."""
        return self.folder / os.path.join(self.workdir, path).lstrip("/")

    def outside(self, text):
        """`text` with the folders that this image has in place of those that it names."""
        tops = "|".join(re.escape(entry.name) for entry in self.folder.iterdir())
        return re.sub(rf"(?<![\w./])/({tops})(?=/|\b)", rf"{self.folder}/\1", text)

    def run(self, command):
        """Runs a command as RUN does."""
        print(f"RUN {command}", flush=True)
        environment = {name: self.outside(value) for name, value in self.environment.items()}
        subprocess.run(
            ["/bin/sh", "-c", self.outside(command)],
            cwd=self.place("."), env=environment, check=True, stdin=subprocess.DEVNULL,
        )


def context_files():
    """Paths of the files that Docker would be given: what is tracked and not ignored."""
    ignored = [line.strip("/ ") for line in (ROOT / ".dockerignore").read_text().splitlines()]
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
    paths = [path for path in listed.decode().split("\0") if path and (ROOT / path).is_file()]
    return [path for path in paths if path.split("/")[0] not in ignored]


def build(stage, image, compiler):
    """Runs the instructions of the build stage."""
    for name, rest in stage:
        if name == "WORKDIR":
            image.workdir = rest
            image.place(".").mkdir(parents=True, exist_ok=True)
        elif name == "ENV":
            image.environment.update(settings([(name, rest)]))
        elif name == "COPY" and rest.startswith("--from=toolkit "):
            source, target = rest.split()[1:]
            here = image.place(target.rstrip("/"))
            here.parent.mkdir(parents=True, exist_ok=True)
            here.unlink(missing_ok=True)
            here.symlink_to(compiler / Path(source).name)
        elif name == "COPY" and rest == ". .":
            # What an earlier run left, but for what it built, might hide a file that is not copied.
            for old in image.place(".").iterdir():
                if old.is_dir() and old.name != "target":
                    shutil.rmtree(old)
                elif not old.is_dir():
                    old.unlink()
            for path in context_files():
                here = image.place(path)
                here.parent.mkdir(parents=True, exist_ok=True)
                # Times are kept, so that a second run builds what has changed.
                shutil.copy2(ROOT / path, here)
        elif name == "RUN":
            image.run(rest)
        else:
            raise NotImplementedError(f"a build stage with `{name} {rest}`")


def check_program(program, pack):
    """Whether the program starts alone and has the kernels inside."""
    for arguments in (["--version"], ["doctor", "--device", "cpu"]):
        subprocess.run([program, *arguments], env={"PATH": "/usr/bin:/bin"}, check=True)
    linked = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    names = [Path(line.split()[0]).name for line in linked.splitlines()]
    strange = [name for name in names if not name.startswith(SYSTEM)]
    assert not strange, f"{program.name} is linked to {strange}, which the image may not have"
    assert pack.read_bytes() in program.read_bytes(), f"{program.name} does not carry {pack}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compiler", type=Path, required=True, help="folder with `lib` and `bin` of NVRTC")
    parser.add_argument("--into", type=Path, required=True, help="folder for the image's folders")
    args = parser.parse_args()
    named = stages(FILE.read_text())
    args.into.mkdir(parents=True, exist_ok=True)
    image = Image(args.into.resolve())
    build(named["build"], image, args.compiler.resolve())
    last = list(named.values())[-1]
    taken = [rest.split()[1] for name, rest in last if name == "COPY" and rest.startswith("--from=build ")]
    assert taken, "the last stage takes nothing from the build"
    pack = Path(image.outside(image.environment["FATHOM_KERNEL_PACK"]))
    for path in taken:
        check_program(image.place(path), pack)
    print(f"image: {len(taken)} file built, {image.place(taken[0]).stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
