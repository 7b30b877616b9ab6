"""Peers of the routed experts: PyTorch one expert after the other, Marlin, and Humming.

A peer is a function from a shape (as `fathom bench kernels --shapes` prints it) and the folder that
`prepare.py` filled to its `Work`, or to `None` where it does not have the operator. All are routed
before they are timed, evenly (`layouts.expert_of`), and none has the shared expert that ours has.
"""

from pathlib import Path

import work
from layouts import expert_blocks, expert_of
from work import Work, between, fp8, library, module, n_units, normal

# How Marlin's operators call E2M1.
MARLIN_E2M1 = 562949953487106
NOTE = "without the shared expert"


def choices(torch, rows: int, top_k: int, n_experts: int):
    """The experts that each row chose, and random shares."""
    ids = [expert_of(pair, n_experts) for pair in range(rows * top_k)]
    chosen = torch.tensor(ids, device=work.DEVICE).view(rows, top_k)
    return chosen, between(torch, 0.1, 0.4, rows, top_k)


def torch_experts(shape: dict, _folder: Path) -> Work | None:
    """Experts one after the other with `_scaled_mm`, FP8 weights: what a program without a grouped
    kernel would do. It reads about twice the bytes."""
    if shape["operator"] != "experts":
        return None
    torch = module("torch")
    exact = module("exact")
    rows, width, channels = shape["rows"], shape["width"], shape["channels"]
    n_experts, top_k = shape["n_experts"], shape["top_k"]
    # Results have about the size of the inputs.
    sizes = (1.0, width**-0.5, channels**-0.5)
    one, scale_up, scale_down = (torch.tensor(size, device=work.DEVICE) for size in sizes)
    gate_up = [fp8(torch, 2 * channels, width) for _ in range(n_experts)]
    down = [fp8(torch, width, channels) for _ in range(n_experts)]
    x = fp8(torch, rows, width)
    chosen, shares = choices(torch, rows, top_k, n_experts)
    groups = []
    for expert in range(n_experts):
        token, choice = (chosen == expert).nonzero(as_tuple=True)
        if len(token):
            # `_scaled_mm` takes multiples of 16 rows; those of no token have no share.
            padding = torch.zeros(-len(token) % 16, device=work.DEVICE, dtype=torch.long)
            share = torch.cat([shares[token, choice], padding.float()])[:, None]
            groups.append((expert, torch.cat([token, padding]), share))

    def product(a, w, scale):
        return torch._scaled_mm(a, w.t(), scale_a=one, scale_b=scale, out_dtype=torch.bfloat16)

    def call():
        out = torch.zeros(rows, width, device=work.DEVICE)
        for expert, token, share in groups:
            own = x.view(torch.uint8)[token].view(x.dtype)
            gate, up = product(own, gate_up[expert], scale_up).chunk(2, dim=1)
            hidden = (torch.nn.functional.silu(gate) * up).to(x.dtype)
            out.index_add_(0, token, product(hidden, down[expert], scale_down) * share)
        return out

    def expected():
        ups = lambda expert: gate_up[expert].double() * scale_up  # noqa: E731
        downs = lambda expert: down[expert].double() * scale_down  # noqa: E731
        return exact.experts(x, chosen, shares, ups, downs)

    # What is between the products is rounded to FP8.
    return Work([call], expected, tolerance=6e-2, note=f"FP8 weights, {NOTE}")


def marlin_experts(shape: dict, folder: Path) -> Work | None:
    """Marlin's experts on FP4 weights and bf16 activations: both products and the sum; the activation
    between them is PyTorch's."""
    if shape["operator"] != "experts":
        return None
    torch = module("torch")
    library(torch, folder / "marlin", "_moe_C")
    exact = module("exact")
    rows, width, channels = shape["rows"], shape["width"], shape["channels"]
    n_experts, top_k = shape["n_experts"], shape["top_k"]
    # The block that vLLM chooses.
    block = next((b for b in (8, 16, 32, 48) if rows * top_k / n_experts / b < 0.9), 64)
    blocks = expert_blocks(rows * top_k, n_experts, block)
    pairs, owners = (torch.tensor(x, device=work.DEVICE, dtype=torch.int32) for x in blocks)
    n_padded = torch.tensor([len(pairs)], device=work.DEVICE, dtype=torch.int32)
    chosen, shares = choices(torch, rows, top_k, n_experts)
    locks = torch.zeros(4 * n_units(torch), device=work.DEVICE, dtype=torch.int32)
    x = normal(torch, rows, width)

    def weights(n, k):
        # Packed codes are any 4 bits; scales are 2^-9 to 2^-6.
        size = (n_experts, k // 16, 2 * n)
        codes = torch.randint(-(2**31), 2**31, size, device=work.DEVICE, dtype=torch.int32)
        size = (n_experts, k // 32, n)
        return codes, torch.randint(118, 122, size, device=work.DEVICE, dtype=torch.uint8)

    up, down = weights(2 * channels, width), weights(width, channels)

    def product(a, b, n_inputs, per_input, weighs, n, k):
        out = torch.empty(rows * top_k, n, device=work.DEVICE, dtype=torch.bfloat16)
        scales = b[1].view(torch.float8_e8m0fnu)
        operands = (a, out, b[0], None, scales, None, None, None, locks, pairs, owners, n_padded, shares)
        sizes = (block, per_input, weighs, MARLIN_E2M1, n_inputs, n, k)
        # Not atomic, sums in f32, no zero points; its own choice of threads.
        return torch.ops._moe_C.moe_wna16_marlin_gemm(*operands, *sizes, False, True, False, -1, -1, -1)

    def call():
        gate, linear = product(x, up, rows, top_k, False, 2 * channels, width).chunk(2, dim=1)
        hidden = torch.nn.functional.silu(gate) * linear
        parts = product(hidden, down, rows * top_k, 1, True, width, channels)
        return parts.view(rows, top_k, width).sum(dim=1)

    def dense(codes, scales):
        def of(expert):
            return exact.fp4(exact.marlin_codes(codes[expert]), exact.marlin_scales(scales[expert]))

        return of

    return Work([call], lambda: exact.experts(x, chosen, shares, dense(*up), dense(*down)), note=NOTE)


def humming_experts(shape: dict, folder: Path) -> Work | None:
    """Humming's experts on FP4 weights and FP8 activations with a scale per 128: both products; it
    quantises their inputs, and activation and sum are PyTorch's. A kernel is compiled for each product and
    number of rows, as its rules for the device choose; nothing is tuned."""
    if shape["operator"] != "experts":
        return None
    torch = module("torch")
    schemas = module("humming.schema", folder / "humming")
    config, transform = module("humming.config"), module("humming.transform")
    rules, forward = module("humming.tune"), module("humming.forward")
    exact = module("exact")
    rows, width, channels = shape["rows"], shape["width"], shape["channels"]
    n_experts, top_k = shape["n_experts"], shape["top_k"]
    n_pairs = rows * top_k
    chosen, shares = choices(torch, rows, top_k, n_experts)
    x = normal(torch, rows, width)
    weight_schema = schemas.Mxfp4WeightSchema().to_humming_schema(torch.bfloat16)
    quantised = {"input_scale_group_size": 128, "input_quant_mode": "dynamic_group"}
    input_schema = schemas.HummingInputSchema(a_dtype="float8e4m3", **quantised)
    indexed = config.GemmType.INDEXED

    def layer(n, k):
        """The exact weights by expert, and the product of `inputs` with them by pair."""
        size = (n_experts, n, k // 8)
        codes = torch.randint(-(2**31), 2**31, size, device=work.DEVICE, dtype=torch.int32)
        size = (n_experts, n, k // 32)
        scales = torch.randint(118, 122, size, device=work.DEVICE, dtype=torch.uint8)

        def dense(expert):
            shifts = 4 * torch.arange(8, device=work.DEVICE)
            own = (codes[expert, :, :, None].long() >> shifts & 15).view(n, k)
            return exact.fp4(own, scales[expert])

        raw = {"weight": codes.clone(), "weight_scale": scales.view(torch.float8_e8m0fnu)}
        sizes = {"shape_n": n, "shape_k": k, "num_experts": n_experts, "torch_dtype": torch.bfloat16}
        of_layer, tensors = transform.prepare_and_transform_humming_tensors(
            raw, weight_schema=weight_schema, input_schema=input_schema, **sizes
        )
        chosen_kernel = rules.get_heuristics_config(of_layer, shape_m=n_pairs, gemm_type=indexed)
        blocks = expert_blocks(n_pairs, n_experts, chosen_kernel["block_shape"][0])
        pairs, owners = (torch.tensor(x, device=work.DEVICE, dtype=torch.int32) for x in blocks)
        n_padded = torch.tensor([len(pairs)], device=work.DEVICE, dtype=torch.int32)
        locks = torch.zeros(8 * n_units(torch), device=work.DEVICE, dtype=torch.int32)

        def product(inputs, per_input):
            return forward.humming_forward(
                of_layer,
                inputs,
                **tensors,
                sorted_ids=pairs,
                expert_ids=owners,
                num_tokens_padded=n_padded,
                locks=locks,
                top_k=per_input,
                valid_shape_m=n_pairs,
                compute_config={"gemm_type": indexed.value},
                tuning_config=chosen_kernel,
            )

        return dense, product

    (dense_up, up), (dense_down, down) = layer(2 * channels, width), layer(width, channels)

    def call():
        gate, linear = up(x, top_k).chunk(2, dim=1)
        parts = down(torch.nn.functional.silu(gate) * linear, 1)
        return (parts.view(rows, top_k, width) * shares[:, :, None]).sum(dim=1)

    # Inputs of both products are rounded to FP8.
    expected = lambda: exact.experts(x, chosen, shares, dense_up, dense_down)  # noqa: E731
    return Work([call], expected, tolerance=8e-2, note=f"{NOTE}; compiled for each size, not tuned")
