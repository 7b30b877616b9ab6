"""Peers' work on the CPU: their calls, and the exact results, against slow loops. Needs PyTorch, and
transformers for its layer.

Kernels that only a GPU has are replaced by loops in Python over the same bytes, written from the layouts'
other side, behind operators with the schemas of vLLM's wheel: PyTorch's dispatcher checks that each call
fits. Each loop also has a wrong form, which must be seen. Not here: times.
"""

import importlib.util
import math
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

import attention
import experts
import layer
import linear
import torch
import work
from work import Work

# As `torch.ops` shows them once the extensions are loaded.
MARLIN = (
    "moe_wna16_marlin_gemm(Tensor! a, Tensor? c_or_none, Tensor! b_q_weight, Tensor? b_bias_or_none, "
    "Tensor! b_scales, Tensor? a_scales, Tensor? global_scale, Tensor? b_zeros_or_none, "
    "Tensor! workspace, Tensor sorted_token_ids, Tensor! expert_ids, Tensor! num_tokens_past_padded, "
    "Tensor! topk_weights, int moe_block_size, int top_k, bool mul_topk_weights, int b_type_id, "
    "int size_m, int size_n, int size_k, bool use_atomic_add, bool use_fp32_reduce, bool is_zp_float, "
    "int thread_k, int thread_n, int blocks_per_sm) -> Tensor"
)
FLASHMLA = (
    "sparse_decode_fwd(Tensor q, Tensor kv, Tensor indices, Tensor? topk_length, Tensor? attn_sink, "
    "Tensor(a)? tile_scheduler_metadata, Tensor(b)? num_splits, Tensor? extra_kv, "
    "Tensor? extra_indices, Tensor? extra_topk_length, int d_v, float sm_scale, Tensor(c!)? out_=None, "
    "bool enable_batch_invariant=False) -> (Tensor(c!), Tensor, Tensor(a)?, Tensor(b)?)"
)
DEEPGEMM = [
    "get_paged_mqa_logits_metadata(Tensor context_lens, int block_kv, int num_sms, "
    "Tensor? indices=None) -> Tensor",
    "fp8_fp4_paged_mqa_logits(Tensor q, Tensor? q_sf, Tensor kv_cache, Tensor weights, "
    "Tensor context_lens, Tensor block_table, Tensor schedule_meta, int max_context_len, "
    "Tensor? indices=None) -> Tensor",
    "fp8_fp4_gemm_nt(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor(d!) d, Tensor? c=None, "
    "int[3]? recipe=None, int[2]? recipe_a=None, int[2]? recipe_b=None, str compiled_dims='nk', "
    "bool disable_ue8m0_cast=False, float? alpha=None, int epilogue_kind=0, float? epilogue_alpha=None, "
    "Tensor? epilogue_sfd=None) -> ()",
]

# Whether the stand-ins compute something else than they should.
WRONG = {"marlin": False, "humming": False, "flashmla": False, "gemm": False, "index": False}


def e4m3(byte: int) -> float:
    sign, exponent, fraction = -1.0 if byte >> 7 else 1.0, byte >> 3 & 15, byte & 7
    return sign * (fraction / 512 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


def e2m1(code: int) -> float:
    sign, exponent, fraction = -1.0 if code >> 3 else 1.0, code >> 1 & 3, code & 1
    return sign * (fraction / 2 if exponent == 0 else (1 + fraction / 2) * 2.0 ** (exponent - 1))


def bytes_of(tensor) -> list[int]:
    """All bytes behind a tensor, between its rows too."""
    return list(tensor.untyped_storage())[tensor.storage_offset() :]


def values_of(tensor) -> list[list[float]]:
    """FP8 values, by row."""
    return [[e4m3(byte) for byte in row] for row in tensor.view(torch.uint8).flatten(0, -2).tolist()]


def marlin_weight(words: list[list[int]], scales: list[list[int]], n: int, k: int) -> list[list[float]]:
    """One expert's `[n][k]`: each lane of a warp holds, of four blocks of 16 outputs, the inputs and
    outputs that an `m16n8k16` instruction wants of it."""
    weight = [[0.0] * k for _ in range(n)]
    for tile_k in range(k // 16):
        for tile_n in range(n // 64):
            for lane in range(32):
                for quarter in range(4):
                    word = words[tile_k][tile_n * 128 + lane * 4 + quarter]
                    for half in range(2):
                        for index, inner in enumerate((0, 1, 8, 9)):
                            column = tile_n * 64 + quarter * 16 + half * 8 + lane // 4
                            row = tile_k * 16 + lane % 4 * 2 + inner
                            nibble = half * 2 + index // 2 + 4 * (index % 2)
                            weight[column][row] = e2m1(word >> (4 * nibble) & 15)
    for column in range(n):
        # Of 64 outputs, every eighth one after the other, the middle two of four exchanged.
        at = column % 8 * 8 + column % 64 // 8
        at = column // 64 * 64 + at // 4 * 4 + (0, 2, 1, 3)[at % 4]
        for row in range(k):
            weight[column][row] *= 2.0 ** (scales[row // 32][at] - 127)
    return weight


def marlin_gemm(a, out, words, bias, scales, a_scales, global_scale, zeros, locks, pairs, owners, n_padded,
                shares, block, top_k, weighs, kind, m, n, k, *rest):  # fmt: skip
    assert (bias, a_scales, global_scale, zeros) == (None,) * 4 and kind == experts.MARLIN_E2M1
    assert (m, k) == tuple(a.shape) and scales.dtype == torch.float8_e8m0fnu and locks.sum() == 0
    x, share = a.tolist(), shares.flatten().tolist()
    n_pairs = m * top_k
    weights = {
        expert: marlin_weight(words[expert].tolist(), scales[expert].view(torch.uint8).tolist(), n, k)
        for expert in set(owners.tolist())
    }
    for at, pair in enumerate(pairs[: n_padded.item()].tolist()):
        if pair >= n_pairs:
            continue
        weight, row = weights[owners[at // block].item()], x[pair // top_k]
        if WRONG["marlin"]:
            weight = [[*column[1:], column[0]] for column in weight]
        sums = [sum(w * v for w, v in zip(column, row, strict=True)) for column in weight]
        out[pair] = torch.tensor(sums) * (share[pair] if weighs else 1.0)
    return out


def flashmla_keys(cache, ids: list[int]) -> list[list[float]]:
    memory, stride = bytes_of(cache), cache.stride(0)
    keys = []
    for id in ids:
        page = id // 64 * stride
        values, scales = page + id % 64 * 576, page + 64 * 576 + id % 64 * 8
        key = [e4m3(memory[values + d]) * 2.0 ** (memory[scales + d // 64] - 127) for d in range(448)]
        if WRONG["flashmla"]:
            key = [e4m3(memory[values + d]) for d in range(448)]
        fine = bytes(memory[values + 448 : values + 576])
        keys.append(key + torch.frombuffer(bytearray(fine), dtype=torch.bfloat16).tolist())
    return keys


def flashmla_decode(q, near, window, n_near, sink, plan, splits, far, chosen, n_far, d_v, scale, *rest):
    out = torch.full((*q.shape[:3], d_v), math.nan, dtype=torch.bfloat16)
    for row in range(q.shape[0]):
        keys = flashmla_keys(near, window[row, 0, : n_near[row]].tolist())
        keys += flashmla_keys(far, chosen[row, 0, : n_far[row]].tolist())
        for head in range(q.shape[2]):
            query = q[row, 0, head].tolist()
            scores = [scale * sum(a * b for a, b in zip(query, key, strict=True)) for key in keys]
            shares = [math.exp(score) for score in scores]
            total = sum(shares) + math.exp(sink[head].item())
            for d in range(d_v):
                out[row, 0, head, d] = sum(s * key[d] for s, key in zip(shares, keys, strict=True)) / total
    return out, torch.empty(0), torch.empty(1), torch.empty(1)


def deepgemm_gemm(a, sfa, b, sfb, d, *rest):
    x, w = values_of(a), values_of(b)
    for row, inputs in enumerate(x):
        for column, weight in enumerate(w):
            total = 0.0
            for at, (value, one) in enumerate(zip(inputs, weight, strict=True)):
                scale = sfa[row, at // 128].item() * sfb[column // 128, at // 128].item()
                total += value * one * (1.0 if WRONG["gemm"] else scale)
            d[row, column] = total


def deepgemm_logits(q, q_sf, cache, weights, lens, table, plan, n_columns, *rest):
    memory, queries, heads = bytes_of(cache), values_of(q), q.shape[2]
    out = torch.full((q.shape[0], n_columns), math.nan)
    for row in range(q.shape[0]):
        for column in range(lens[row, 0]):
            page = table[row, column // 64].item() * 64 * 132
            key = [e4m3(byte) for byte in memory[page + column % 64 * 128 :][:128]]
            scale = bytearray(memory[page + 64 * 128 + column % 64 * 4 :][:4])
            total = 0.0
            for head in range(heads):
                product = sum(a * b for a, b in zip(queries[row * heads + head], key, strict=True))
                total += weights[row, head].item() * (product if WRONG["index"] else max(product, 0.0))
            out[row, column] = total * torch.frombuffer(scale, dtype=torch.float32).item()
    return out


def humming_forward(layer, inputs, *, weight, weight_scale, sorted_ids, expert_ids, num_tokens_padded, locks,
                    top_k, valid_shape_m, compute_config, tuning_config):  # fmt: skip
    assert layer["num_experts"] == len(weight) and valid_shape_m == len(inputs) * top_k
    assert compute_config == {"gemm_type": "indexed"} and locks.sum() == 0
    out = torch.full((valid_shape_m, layer["shape_n"]), math.nan, dtype=torch.bfloat16)
    scales = weight_scale.view(torch.uint8)
    for at, pair in enumerate(sorted_ids[: num_tokens_padded.item()].tolist()):
        if pair >= valid_shape_m:
            continue
        expert = expert_ids[at // tuning_config["block_shape"][0]]
        row = inputs[pair // top_k].tolist()
        for column in range(layer["shape_n"]):
            total = 0.0
            for k, value in enumerate(row):
                nibble = k % 8 ^ 1 if WRONG["humming"] else k % 8
                code = weight[expert, column, k // 8].item() >> (4 * nibble) & 15
                total += value * e2m1(code) * 2.0 ** (scales[expert, column, k // 32].item() - 127)
            out[pair, column] = total
    return out


def humming_modules() -> dict[str, types.ModuleType]:
    """What the peer calls of the wheel's Python."""
    kinds = types.SimpleNamespace(INDEXED=types.SimpleNamespace(value="indexed"))
    functions = {
        "schema": {
            "Mxfp4WeightSchema": lambda: types.SimpleNamespace(to_humming_schema=lambda dtype: dtype),
            "HummingInputSchema": lambda **fields: fields,
        },
        "config": {"GemmType": kinds},
        "transform": {
            "prepare_and_transform_humming_tensors": lambda raw, **sizes: (sizes, raw),
        },
        "tune": {"get_heuristics_config": lambda layer, *, shape_m, gemm_type: {"block_shape": [8, 64, 64]}},
        "forward": {"humming_forward": humming_forward},
    }
    modules = {}
    for name, members in functions.items():
        modules[f"humming.{name}"] = module = types.ModuleType(f"humming.{name}")
        vars(module).update(members)
    return modules


def stand_in(space: str, operators: list[tuple[str, Callable]]) -> None:
    """Defines operators, of which only the schemas are those of the extension."""
    LIBRARIES.append(library := torch.library.Library(space, "FRAGMENT"))
    for schema, function in operators:
        library.define(schema)
        library.impl(schema.split("(")[0], function, "CompositeExplicitAutograd")


LIBRARIES: list[torch.library.Library] = []


def deepgemm_module() -> types.ModuleType:
    """The functions of the wheel's Python that peers call."""
    operators, python = torch.ops.deep_gemm, types.ModuleType("vllm.third_party.deep_gemm")
    python.fp8_gemm_nt = lambda a, b, d: operators.fp8_fp4_gemm_nt(*a, *b, d)
    python.get_paged_mqa_logits_metadata = operators.get_paged_mqa_logits_metadata
    python.fp8_fp4_paged_mqa_logits = lambda q, *rest: operators.fp8_fp4_paged_mqa_logits(*q, *rest)
    return python


def setup() -> None:
    """Moves peers to the CPU, with stand-ins for what they load."""
    torch.manual_seed(3)
    work.DEVICE = "cpu"
    stand_in("_moe_C", [(MARLIN, marlin_gemm)])
    stand_in("_flashmla_C", [(FLASHMLA, flashmla_decode)])
    plan = lambda lens, *rest: lens.clone()  # noqa: E731
    stand_in("deep_gemm", list(zip(DEEPGEMM, [plan, deepgemm_logits, deepgemm_gemm], strict=True)))
    sys.modules["vllm.third_party.deep_gemm"] = deepgemm_module()
    sys.modules.update(humming_modules())
    for peers in (experts, attention):
        peers.library = lambda *_: None


def done(peer: Callable[[dict, Path], Work | None], shape: dict) -> Work:
    """The peer's work, of which every call was made."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("deepgemm", "humming"):
            (Path(folder) / name).mkdir()
        work.ROTATED_BYTES = 1
        of_peer = peer(shape, Path(folder))
    assert of_peer is not None
    for call in of_peer.calls:
        call()
    return of_peer


EXPERTS = {"operator": "experts", "rows": 3, "width": 64, "channels": 64, "n_experts": 4, "top_k": 2}
ATTENTION = {"operator": "attention", "rows": 2, "n_heads": 2, "top_k": 5, "context": 256}
INDEX = {"operator": "index_select", "rows": 2, "n_heads": 3, "top_k": 7, "context": 256}
FP8 = {"operator": "fp8_linear", "rows": 2, "n": 128, "k": 256}


def torch_computes_the_products_and_the_experts(_fathom: str) -> None:
    bf16 = {"operator": "bf16_linear", "rows": 3, "n": 32, "k": 64}
    cases = [(linear.torch_linear, FP8), (linear.torch_linear, bf16), (experts.torch_experts, EXPERTS)]
    for peer, shape in cases:
        of_peer = done(peer, shape)
        error = of_peer.error()
        assert 0 < error < of_peer.tolerance, (shape, error)


def kernels_that_do_what_their_layouts_say_are_found_right_and_others_not(_fathom: str) -> None:
    cases = [
        ("marlin", experts.marlin_experts, EXPERTS),
        ("humming", experts.humming_experts, EXPERTS),
        ("flashmla", attention.flashmla_attention, ATTENTION),
        ("gemm", linear.deepgemm_linear, FP8),
        ("index", attention.deepgemm_index, INDEX),
    ]
    for name, peer, shape in cases:
        of_peer = done(peer, shape)
        error = of_peer.error()
        assert error < of_peer.tolerance, (name, error)
        WRONG[name] = True
        error = of_peer.error()
        WRONG[name] = False
        assert error > 5 * of_peer.tolerance, (name, error)


def what_is_no_number_or_has_another_shape_is_no_result(_fathom: str) -> None:
    exact = torch.ones(2, 3)
    assert work.relative_error(exact, exact) == 0.0
    assert work.relative_error(torch.tensor([[1.0, 1.0, math.nan]] * 2), exact) == math.inf
    assert work.relative_error(exact[:1], exact) == math.inf
    nothing = Work([lambda: exact], None, unchecked="no layout is known")
    assert nothing.error() is None


def a_choice_twice_or_out_of_bounds_is_no_choice(_fathom: str) -> None:
    exact = work.module("exact")
    scores = torch.tensor([[0.5, 3.0, 1.0]])
    assert exact.picked(scores, torch.tensor([[2, 1]])).tolist() == [[3.0, 1.0]]
    assert exact.best(scores, 2).tolist() == [[3.0, 1.0]]
    for wrong in ([[1, 1]], [[1, 3]], [[-1, 1]]):
        assert exact.picked(scores, torch.tensor(wrong)).isnan().all(), wrong


TINY = {
    "vocab_size": 64, "hidden_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 4, "head_dim": 32,
    "q_lora_rank": 32, "o_groups": 2, "o_lora_rank": 16, "num_experts_per_tok": 2, "n_routed_experts": 8,
    "sliding_window": 16, "index_n_heads": 4, "index_head_dim": 16, "index_topk": 8, "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
}  # fmt: skip


def a_step_of_transformers_layer_is_the_last_token_of_the_whole_sequence(_fathom: str) -> None:
    assert TINY.keys() == layer.FLASH.keys()
    layers = layer.Layers(None, TINY, "cpu", "float32")
    for kind in layer.KINDS:
        # The last of them closes a group of 4, and one of 128.
        for n in (160, 255):
            hidden, step = layers.hidden(1, n + 1), layers.hidden(1, n + 1)
            step[:, n:] = hidden[:, n:]
            with torch.inference_mode():
                whole = layers.run(kind, hidden, None, 0)[:, n:]
                cache, other = layers.cache(kind), layers.cache(kind)
                layers.run(kind, hidden[:, :n], cache, 0)
                layers.run(kind, step[:, :n], other, 0)
                layers.copied(cache, 3)
                last = layers.run(kind, hidden[:, n:].expand(3, -1, -1, -1), cache, n)
                otherwise = layers.run(kind, hidden[:, n:], other, n)
            assert work.relative_error(last, whole.expand(3, -1, -1, -1)) < 1e-5, (kind, n)
            assert work.relative_error(otherwise, whole) > 1e-2, (kind, n)


def transformers_layer_is_timed_on_the_cpu_as_on_a_gpu(_fathom: str) -> None:
    layers = layer.Layers(None, TINY, "cpu", "bfloat16")
    for kind in layer.KINDS:
        assert layers.step_s(kind, 2, 140, 2) > 0, kind
    parameters = dict(layers.layers["ratio-4"].named_parameters())
    assert parameters["mlp.experts.down_proj"].dtype == torch.bfloat16
    assert parameters["attn_hc.fn"].dtype == torch.float32


CHECKS = [
    torch_computes_the_products_and_the_experts,
    kernels_that_do_what_their_layouts_say_are_found_right_and_others_not,
    what_is_no_number_or_has_another_shape_is_no_result,
    a_choice_twice_or_out_of_bounds_is_no_choice,
]
if importlib.util.find_spec("transformers"):
    CHECKS += [
        a_step_of_transformers_layer_is_the_last_token_of_the_whole_sequence,
        transformers_layer_is_timed_on_the_cpu_as_on_a_gpu,
    ]
