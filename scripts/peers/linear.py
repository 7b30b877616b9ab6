"""Peers of the linear layers: cuBLASLt through PyTorch, and DeepGEMM.

A peer is a function from a shape (as `fathom bench kernels --shapes` prints it) and the folder that
`prepare.py` filled to its `Work`, or to `None` where it does not have the operator.
"""

from pathlib import Path

from work import Work, copies, fp8, module, normal, poisoned, powers_of_two

# Values that share a scale of V4's FP8 matrices.
BLOCK = 128


def torch_linear(shape: dict, _folder: Path) -> Work | None:
    """cuBLASLt through PyTorch: per-tensor scales for FP8, bf16 as it is."""
    torch = module("torch")
    exact = module("exact")
    rows, n, k = shape["rows"], shape.get("n"), shape.get("k")
    if shape["operator"] == "bf16_linear":
        x = normal(torch, rows, k)
        weights = [normal(torch, n, k) for _ in range(copies(2 * n * k))]
        calls = [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]
        return Work(calls, lambda: exact.linear(x, weights[0]), note="bf16 results; ours are f32")
    if shape["operator"] != "fp8_linear":
        return None
    # `_scaled_mm` takes multiples of 16 rows.
    x = fp8(torch, -(-rows // 16) * 16, k)
    one = torch.ones((), device=x.device)
    weights = [fp8(torch, n, k) for _ in range(copies(n * k))]

    def product(w):
        return torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    calls = [lambda w=w: product(w) for w in weights]
    return Work(calls, lambda: exact.linear(x, weights[0]), note="one scale per matrix, FP8 inputs")


def deepgemm_linear(shape: dict, folder: Path) -> Work | None:
    """DeepGEMM's FP8 product with scales per 128, as V4's linear layers have them."""
    if shape["operator"] != "fp8_linear":
        return None
    torch = module("torch")
    gemm = module("vllm.third_party.deep_gemm", folder / "deepgemm")
    exact = module("exact")
    rows, n, k = shape["rows"], shape["n"], shape["k"]
    x = (fp8(torch, rows, k), powers_of_two(torch, rows, k // BLOCK))
    out = poisoned(torch, rows, n)
    scales = powers_of_two(torch, n // BLOCK, k // BLOCK)
    weights = [(fp8(torch, n, k), scales) for _ in range(copies(n * k))]

    def product(w):
        gemm.fp8_gemm_nt(x, w, out)
        return out

    def expected():
        return exact.linear(exact.scaled(*x, BLOCK), exact.block_scaled(*weights[0], BLOCK))

    return Work([lambda w=w: product(w) for w in weights], expected, note="FP8 inputs")
