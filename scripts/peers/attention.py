"""Peers of sparse attention and of the index: FlashMLA, and DeepGEMM with PyTorch's selection.

A peer is a function from a shape (as `fathom bench kernels --shapes` prints it) and the folder that
`prepare.py` filled to its `Work`, or to `None` where it does not have the operator.
"""

from pathlib import Path

import work
from layouts import (
    BF16_VALUES,
    FLASHMLA_PAGE,
    FP8_VALUES,
    INDEX_DIM,
    INDEX_PAGE,
    PAGE,
    SCALE_BYTES,
    SCALED,
    VALUE_BYTES,
)
from work import Work, between, copies, fp8, library, module, n_units, normal

WINDOW = 128
HEAD = 512
# Tokens per compressed entry of a layer that has an index.
RATIO = 4


def flashmla_pages(torch, n_rows: int):
    """A FlashMLA cache of random rows: bytes `[pages, 64, 1, 584]`, as its kernel takes them. What its
    layout puts where is in `layouts.py`."""
    n = n_rows // PAGE
    values = torch.empty(n, PAGE, VALUE_BYTES, device=work.DEVICE, dtype=torch.uint8)
    values[..., :FP8_VALUES] = fp8(torch, n, PAGE, FP8_VALUES).view(torch.uint8)
    values[..., FP8_VALUES:] = normal(torch, n, PAGE, BF16_VALUES).view(torch.uint8)
    # A half, one and two; the eighth byte of a row is never read.
    scales = torch.randint(126, 129, (n, PAGE, SCALE_BYTES), device=work.DEVICE, dtype=torch.uint8)
    scales[..., FP8_VALUES // SCALED :] = 0xFF
    pages = torch.zeros(n, FLASHMLA_PAGE, device=work.DEVICE, dtype=torch.uint8)
    n_value_bytes, n_bytes = PAGE * VALUE_BYTES, PAGE * (VALUE_BYTES + SCALE_BYTES)
    pages[:, :n_value_bytes] = values.view(n, -1)
    pages[:, n_value_bytes:n_bytes] = scales.view(n, -1)
    return pages[:, :n_bytes].unflatten(1, (PAGE, 1, VALUE_BYTES + SCALE_BYTES))


def flashmla_attention(shape: dict, folder: Path) -> Work | None:
    """FlashMLA's sparse decoding over FP8 rows, window and compressed ones in one call. Its rows have
    the release's numbers in its own layout, 584 bytes each."""
    if shape["operator"] != "attention":
        return None
    torch = module("torch")
    library(torch, folder / "flashmla", "_flashmla_C")
    exact = module("exact")
    rows, heads, top_k = shape["rows"], shape["n_heads"], shape["top_k"]
    entries = shape["context"] // RATIO
    q = normal(torch, rows, 1, heads, HEAD)
    sink = torch.randn(heads, device=work.DEVICE)
    window = torch.arange(rows * WINDOW, device=work.DEVICE, dtype=torch.int32).view(rows, 1, WINDOW)
    first = torch.arange(rows, device=work.DEVICE)[:, None] * entries
    picks = [torch.randperm(entries, device=work.DEVICE)[:top_k].sort().values for _ in range(rows)]
    chosen = (torch.stack(picks) + first).to(torch.int32).view(rows, 1, top_k)
    lens = [torch.full((rows,), n, device=work.DEVICE, dtype=torch.int32) for n in (WINDOW, top_k)]
    # The first call plans how work is divided, later ones use that.
    plan = [None, None]

    def attend(near, far):
        inputs = (q, near, window, lens[0], sink, *plan, far, chosen, lens[1])
        out, _, *plan[:] = torch.ops._flashmla_C.sparse_decode_fwd(*inputs, HEAD, HEAD**-0.5, None, False)
        return out

    n_copies = copies(rows * (WINDOW + entries) * (VALUE_BYTES + SCALE_BYTES))
    caches = [[flashmla_pages(torch, rows * n) for n in (WINDOW, entries)] for _ in range(n_copies)]

    def expected():
        near, far = caches[0]
        keys = [exact.flashmla_rows(near, window[:, 0]), exact.flashmla_rows(far, chosen[:, 0])]
        return exact.attention(q[:, 0], torch.cat(keys, 1), sink, HEAD**-0.5)

    calls = [lambda near=near, far=far: attend(near, far) for near, far in caches]
    return Work(calls, expected, lambda out: out[:, 0])


def index_pages(torch, n_rows: int):
    """A cache of random index keys: bytes `[pages, 64, 1, 132]`, as DeepGEMM takes them."""
    n = n_rows // PAGE
    pages = torch.empty(n, INDEX_PAGE, device=work.DEVICE, dtype=torch.uint8)
    pages[:, : PAGE * INDEX_DIM] = fp8(torch, n, PAGE * INDEX_DIM).view(torch.uint8)
    pages[:, PAGE * INDEX_DIM :] = between(torch, 0.5, 1.5, n, PAGE).view(torch.uint8)
    return pages.view(n, PAGE, 1, INDEX_DIM + 4)


def deepgemm_index(shape: dict, folder: Path) -> Work | None:
    """DeepGEMM's index scores, then PyTorch's top-k. Keys are FP8, 132 bytes each: on Hopper it has no
    FP4 ones, so it reads twice as much."""
    if shape["operator"] != "index_select":
        return None
    torch = module("torch")
    gemm = module("vllm.third_party.deep_gemm", folder / "deepgemm")
    exact = module("exact")
    rows, heads, top_k = shape["rows"], shape["n_heads"], shape["top_k"]
    keys = shape["context"] // RATIO
    q = fp8(torch, rows, 1, heads, INDEX_DIM)
    weights = torch.randn(rows, heads, device=work.DEVICE)
    lens = torch.full((rows, 1), keys, device=work.DEVICE, dtype=torch.int32)
    n_pages = keys // PAGE
    table = torch.arange(rows * n_pages, device=work.DEVICE, dtype=torch.int32).view(rows, n_pages)
    plan = gemm.get_paged_mqa_logits_metadata(lens, PAGE, n_units(torch))

    def select(cache):
        scores = gemm.fp8_fp4_paged_mqa_logits((q, None), cache, weights, lens, table, plan, keys)
        return scores.topk(top_k, dim=1, sorted=False).indices

    caches = [index_pages(torch, rows * keys) for _ in range(copies(rows * n_pages * INDEX_PAGE))]

    def scores():
        row_keys = (exact.index_keys(pages) for pages in caches[0].split(n_pages))
        each = zip(q[:, 0], row_keys, weights, strict=True)
        return torch.stack([exact.index_scores(*row) for row in each])

    calls = [lambda cache=cache: select(cache) for cache in caches]
    return Work(
        calls,
        lambda: exact.best(scores(), top_k),
        lambda chosen: exact.picked(scores(), chosen),
        note="FP8 keys, twice the bytes; torch.topk selects",
    )
