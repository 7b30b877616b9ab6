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
WINDOW = 128
# Rows of a cache page, and bytes of a row there.
PAGE = 64
FLASHMLA_ROW = 584
INDEX_ROW = 132
# How Marlin's operators call E2M1.
MARLIN_E2M1 = 562949953487106


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


def fp8(torch, rows: int, cols: int):
    """Random FP8 values, never zeros: those would run faster."""
    return torch.randn(rows, cols, device="cuda").clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def pages(torch, rows: int, row_bytes: int):
    """A paged cache of bytes that are small finite numbers, whatever they are read as."""
    return torch.randint(0x30, 0x40, (rows // PAGE, PAGE, 1, row_bytes), device="cuda", dtype=torch.uint8)


def expert_of(pair: int, n_experts: int) -> int:
    """The expert of a pair of token and choice: spread evenly, in no order."""
    return pair * 7919 % n_experts


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
        counts[expert_of(pair, n_experts)] += 1

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


def flashmla_attention(shape: dict, folder: Path):
    """FlashMLA's sparse decoding over FP8 rows, window and compressed ones in one call. Its rows have
    the release's numbers in its own layout, 584 bytes each."""
    if shape["operator"] != "attention":
        return None
    torch = module("torch")
    library(torch, folder / "flashmla", "_flashmla_C")
    rows, heads, top_k = shape["rows"], shape["n_heads"], shape["top_k"]
    entries = shape["context"] // 4
    q = torch.randn(rows, 1, heads, 512, device="cuda", dtype=torch.bfloat16)
    sink = torch.randn(heads, device="cuda")
    window = torch.arange(rows * WINDOW, device="cuda", dtype=torch.int32).view(rows, 1, WINDOW)
    first = torch.arange(rows, device="cuda")[:, None] * entries
    picks = [torch.randperm(entries, device="cuda")[:top_k].sort().values for _ in range(rows)]
    chosen = (torch.stack(picks) + first).to(torch.int32).view(rows, 1, top_k)
    lens = [torch.full((rows,), n, device="cuda", dtype=torch.int32) for n in (WINDOW, top_k)]
    # The first call plans how work is divided, later ones use that.
    plan = [None, None]

    def attend(near, far):
        inputs = (q, near, window, lens[0], sink, *plan, far, chosen, lens[1])
        out, _, *plan[:] = torch.ops._flashmla_C.sparse_decode_fwd(*inputs, 512, 512**-0.5, None, False)
        return out

    n_copies = copies(rows * (WINDOW + entries) * FLASHMLA_ROW)
    caches = [[pages(torch, rows * n, FLASHMLA_ROW) for n in (WINDOW, entries)] for _ in range(n_copies)]
    return rotating([lambda near=near, far=far: attend(near, far) for near, far in caches])


def deepgemm_index(shape: dict, folder: Path):
    """DeepGEMM's index scores, then DeepSelect's top-k. Keys are FP8, 132 bytes each: on Hopper it has
    no FP4 ones, so it reads twice as much."""
    if shape["operator"] != "index_select":
        return None
    torch = module("torch")
    gemm = module("vllm.third_party.deep_gemm", folder / "deepgemm")
    library(torch, folder / "deepselect", "_deepselect_C")
    rows, heads, top_k = shape["rows"], shape["n_heads"], shape["top_k"]
    keys = shape["context"] // 4
    q = fp8(torch, rows * heads, 128).view(rows, 1, heads, 128)
    weights = torch.randn(rows, heads, device="cuda")
    lens = torch.full((rows, 1), keys, device="cuda", dtype=torch.int32)
    table = torch.arange(rows * keys // PAGE, device="cuda", dtype=torch.int32).view(rows, keys // PAGE)
    n_units = torch.cuda.get_device_properties(0).multi_processor_count
    plan = gemm.get_paged_mqa_logits_metadata(lens, PAGE, n_units)
    chosen = torch.empty(rows, top_k, device="cuda", dtype=torch.int32)

    def select(cache):
        scores = gemm.fp8_fp4_paged_mqa_logits((q, None), cache, weights, lens, table, plan, keys)
        # No begin, unsorted, no values; nothing is out of bounds; NaN is not looked for.
        ends, least = lens.view(-1), float("-inf")
        torch.ops.deep_select.topk(
            scores, top_k, None, ends, False, False, None, chosen, None, -1, least, False, False
        )
        return chosen

    caches = [pages(torch, rows * keys, INDEX_ROW) for _ in range(copies(rows * keys * INDEX_ROW))]
    return rotating([lambda cache=cache: select(cache) for cache in caches])


def expert_blocks(n_pairs: int, n_experts: int, block: int) -> tuple[list[int], list[int]]:
    """Pairs of token and expert as Marlin takes them: grouped by expert, each group padded to whole
    blocks, and the expert of each block."""
    pairs, experts = [], []
    for expert in range(n_experts):
        own = [pair for pair in range(n_pairs) if expert_of(pair, n_experts) == expert]
        own += [n_pairs] * (-len(own) % block)
        pairs += own
        experts += [expert] * (len(own) // block)
    return pairs, experts


def marlin_experts(shape: dict, folder: Path):
    """Marlin's experts on FP4 weights and bf16 activations: both products and the sum; the activation
    between them is PyTorch's, and routing was done before."""
    if shape["operator"] != "experts":
        return None
    torch = module("torch")
    library(torch, folder / "marlin", "_moe_C")
    rows, width, channels = shape["rows"], shape["width"], shape["channels"]
    n_experts, top_k = shape["n_experts"], shape["top_k"]
    # The block that vLLM chooses.
    block = next((b for b in (8, 16, 32, 48) if rows * top_k / n_experts / b < 0.9), 64)
    blocks = expert_blocks(rows * top_k, n_experts, block)
    pairs, experts = (torch.tensor(x, device="cuda", dtype=torch.int32) for x in blocks)
    n_padded = torch.tensor([len(pairs)], device="cuda", dtype=torch.int32)
    routing = torch.rand(rows, top_k, device="cuda")
    n_units = torch.cuda.get_device_properties(0).multi_processor_count
    locks = torch.zeros(4 * n_units, device="cuda", dtype=torch.int32)
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)

    def weights(n, k):
        # Whatever their order, packed codes are any 4 bits; their scales are 2^-7.
        codes = torch.randint(-(2**31), 2**31, (n_experts, k // 16, 2 * n), device="cuda", dtype=torch.int32)
        scales = torch.full((n_experts, k // 32, n), 120, device="cuda", dtype=torch.uint8)
        return codes, scales.view(torch.float8_e8m0fnu)

    up, down = weights(2 * channels, width), weights(width, channels)

    def product(a, b, n_inputs, per_input, weighs, n, k):
        out = torch.empty(rows * top_k, n, device="cuda", dtype=torch.bfloat16)
        operands = (a, out, b[0], None, b[1], None, None, None, locks, pairs, experts, n_padded, routing)
        sizes = (block, per_input, weighs, MARLIN_E2M1, n_inputs, n, k)
        # Not atomic, sums in f32, no zero points; its own choice of threads.
        return torch.ops._moe_C.moe_wna16_marlin_gemm(*operands, *sizes, False, True, False, -1, -1, -1)

    def call():
        gate, linear = product(x, up, rows, top_k, False, 2 * channels, width).chunk(2, dim=1)
        hidden = torch.nn.functional.silu(gate) * linear
        parts = product(hidden, down, rows * top_k, 1, True, width, channels)
        return parts.view(rows, top_k, width).sum(dim=1)

    return call


PEERS: dict[str, Callable] = {
    "torch": torch_linear,
    "torch experts": torch_experts,
    "deepgemm": deepgemm_linear,
    "marlin": marlin_experts,
    "flashmla": flashmla_attention,
    "deepgemm and deepselect": deepgemm_index,
}

# What is not timed, with the reason.
NOT_TIMED = {
    "humming": "it compiles and tunes each shape first, which takes longer than a run has",
    "transformers": "`fathom bench kernels` does not time whole layers",
}
