"""Other implementations of the operators that `fathom bench kernels` times, behind one function each.

A peer is a function from a shape (as `fathom bench kernels --shapes` prints it) to a callable that runs
the operator once on new inputs of those sizes, or `None` where the peer does not have the operator. It
raises `Absent` where its library is not on this machine. Nothing is imported before a peer is asked.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

# Four times a large second-level cache: weights rotate over as many bytes.
ROTATED_BYTES = 240 << 20
E4M3_MAX = 448.0


class Absent(Exception):
    """The peer is not on this machine; says why."""


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


def fp8(torch, rows: int, cols: int):
    """Random FP8 values, never zeros: those would run faster."""
    return torch.randn(rows, cols, device="cuda").clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def torch_linear(shape: dict, _folder: Path):
    """cuBLASLt through PyTorch: per-tensor scales for FP8, bf16 as it is."""
    torch = module("torch")
    rows, n, k = shape["rows"], shape.get("n"), shape.get("k")
    if shape["operator"] == "bf16_linear":
        x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
        weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies(2 * n * k))]
        return rotating([lambda w=w: torch.nn.functional.linear(x, w) for w in weights])
    if shape["operator"] != "fp8_linear":
        return None
    # `_scaled_mm` takes multiples of 16 rows.
    x = fp8(torch, -(-rows // 16) * 16, k)
    one = torch.ones((), device="cuda")
    weights = [fp8(torch, n, k).t() for _ in range(copies(n * k))]

    def product(w):
        return torch._scaled_mm(x, w, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    return rotating([lambda w=w: product(w) for w in weights])


def deepgemm_linear(shape: dict, folder: Path):
    """DeepGEMM's FP8 product with scales per 128, as V4's linear layers have them."""
    if shape["operator"] != "fp8_linear":
        return None
    torch = module("torch")
    gemm = module("vllm.third_party.deep_gemm", folder / "deepgemm")
    rows, n, k = shape["rows"], shape["n"], shape["k"]
    x = (fp8(torch, rows, k), torch.rand(rows, k // 128, device="cuda") + 0.5)
    out = torch.empty(rows, n, device="cuda", dtype=torch.bfloat16)
    scales = torch.rand(n // 128, k // 128, device="cuda") + 0.5
    weights = [(fp8(torch, n, k), scales) for _ in range(copies(n * k))]
    return rotating([lambda w=w: gemm.fp8_gemm_nt(x, w, out) for w in weights])


def torch_experts(shape: dict, _folder: Path):
    """Experts one after the other with `_scaled_mm`, FP8 weights: what a program without a grouped
    kernel would do. It reads about twice the bytes."""
    if shape["operator"] != "experts":
        return None
    torch = module("torch")
    rows, width, channels = shape["rows"], shape["width"], shape["channels"]
    n_experts, top_k = shape["n_experts"], shape["top_k"]
    one = torch.ones((), device="cuda")
    gate_up = [fp8(torch, 2 * channels, width).t() for _ in range(n_experts)]
    down = [fp8(torch, width, channels).t() for _ in range(n_experts)]
    x = fp8(torch, rows, width)
    counts = [0] * n_experts
    for pair in range(rows * top_k):
        counts[(pair * 7919) % n_experts] += 1

    def call():
        for expert, count in enumerate(counts):
            if not count:
                continue
            padded = -(-count // 16) * 16
            own = x[torch.arange(padded, device="cuda") % rows]
            both = torch._scaled_mm(own, gate_up[expert], scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
            gate, up = both.chunk(2, dim=1)
            hidden = (torch.nn.functional.silu(gate) * up).to(torch.float8_e4m3fn)
            torch._scaled_mm(hidden, down[expert], scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    return call


PEERS: dict[str, Callable] = {
    "torch": torch_linear,
    "torch experts": torch_experts,
    "deepgemm": deepgemm_linear,
}

# Libraries that `prepare.py` brings along and nothing here times yet, with what is missing.
NOT_TIMED = {
    "flashmla": "its paged cache has to be filled in its own row layout first",
    "deepselect": "`fathom bench kernels` times scores and top-k together; DeepSelect has top-k alone",
    "marlin": "its packed weights have to be made from FP4 codes first",
    "humming": "its packed weights have to be made from FP4 codes first",
    "transformers": "`fathom bench kernels` does not time whole layers",
}
