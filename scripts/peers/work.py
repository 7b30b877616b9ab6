"""What a peer hands over: calls to time, and the exact result they are compared with.

Everything is drawn on the device that `DEVICE` names, in the run that times it. `module` and `library`
bring a peer's code in; a peer whose code is not on this machine raises `Absent`.
Not here: the peers (`linear.py`, `experts.py`, `attention.py`), and exact results (`exact.py`).
"""

import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DEVICE = "cuda"
# Four times a large second-level cache: weights rotate over as many bytes.
ROTATED_BYTES = 240 << 20
E4M3_MAX = 448.0
# Above what rounding a result to bf16 and sums inside the tensor cores cost, far below what a wrong
# scale or order does.
TOLERANCE = 1e-2


class Absent(Exception):
    """The peer is not on this machine; says why."""


@dataclass
class Work:
    """One operator of a peer, on inputs of its own."""

    # The same call on different weights or cache rows, which it takes in turns.
    calls: list[Callable[[], object]]
    # The exact result of the first call, in float64; `None` where none is known: then `unchecked` says why.
    expected: Callable[[], object] | None
    # From what a call returns to what is compared.
    result: Callable[[object], object] = lambda output: output
    # The largest relative error that still is the same computation.
    tolerance: float = TOLERANCE
    unchecked: str = ""
    # What a reader of the ratio has to know.
    note: str = ""

    def error(self) -> float | None:
        """How far the first call's result is from the exact one."""
        if self.expected is None:
            return None
        return relative_error(self.result(self.calls[0]()), self.expected())


def relative_error(got, exact) -> float:
    """Norm of the difference over the norm of `exact`; infinite where shapes differ or a value is no
    number."""
    if got.shape != exact.shape:
        return math.inf
    got, exact = got.double(), exact.double()
    error = ((got - exact).norm() / exact.norm()).item()
    return error if math.isfinite(error) else math.inf


def module(name: str, folder: Path | None = None):
    """The module `name`, if need be from `folder`."""
    if folder is not None:
        if not folder.exists():
            raise Absent(f"{folder} is not there; scripts/peers/prepare.py fetches it")
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        raise Absent(f"{name}: {error}") from error


def library(torch, folder: Path, name: str) -> None:
    """Loads the operators of the extension whose file begins with `name`."""
    found = sorted(folder.glob(f"vllm/{name}*.so"))
    if not found:
        raise Absent(f"{folder} has no {name}; scripts/peers/prepare.py fetches it")
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        raise Absent(f"{found[0].name}: {error}") from error


def copies(bytes_each: int) -> int:
    """How many weights of `bytes_each` rotate."""
    return max(2, -(-ROTATED_BYTES // bytes_each))


def rotating(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """One call after the other, round and round."""
    state = {"at": 0}

    def call():
        state["at"] = (state["at"] + 1) % len(calls)
        return calls[state["at"]]()

    return call


def normal(torch, *shape: int):
    """Random bf16 values, never zeros: those would run faster."""
    return torch.randn(*shape, device=DEVICE).to(torch.bfloat16)


def fp8(torch, *shape: int):
    """Random FP8 values."""
    return torch.randn(*shape, device=DEVICE).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def between(torch, low: float, high: float, *shape: int):
    """Random float32 values."""
    return torch.rand(*shape, device=DEVICE) * (high - low) + low


def powers_of_two(torch, *shape: int):
    """Random scales, float32: a half, one or two."""
    return torch.exp2(torch.randint(-1, 2, shape, device=DEVICE).float())


def poisoned(torch, *shape: int):
    """Memory for bf16 results that is no number until something is written there."""
    return torch.full(shape, math.nan, device=DEVICE, dtype=torch.bfloat16)


def n_units(torch) -> int:
    """Multiprocessors of the device; 1 where it has none."""
    return torch.cuda.get_device_properties(0).multi_processor_count if DEVICE == "cuda" else 1
