"""Exact results in float64, in plain PyTorch operations: what peers' results are compared with.

Inputs are read as the peer's kernel must read them (`layouts.py`); nothing is rounded on the way.
"""

import torch
from layouts import (
    BF16_VALUES,
    FP8_VALUES,
    INDEX_DIM,
    MARLIN_INPUTS,
    MARLIN_OUTPUTS,
    PAGE,
    SCALE_BYTES,
    SCALED,
    VALUE_BYTES,
    marlin_place,
    marlin_scale_place,
)

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def powers(scales):
    """Values of scale bytes: powers of two."""
    return torch.exp2(scales.double() - 127)


def e2m1(codes):
    """Values of 4-bit codes."""
    return torch.tensor(E2M1 + [-x for x in E2M1], device=codes.device, dtype=torch.float64)[codes.long()]


def linear(x, w):
    """`x [rows, k]` times `w [n, k]`."""
    return x.double() @ w.double().T


def scaled(x, scales, block: int):
    """`x [rows, k]`, each `block` of a row times its own scale."""
    return x.double() * scales.double().repeat_interleave(block, 1)


def block_scaled(w, scales, block: int):
    """`w [n, k]`, each `block` x `block` of it times its own scale."""
    return scaled(w, scales.repeat_interleave(block, 0), block)


def marlin_codes(packed):
    """Codes `[n, k]` of Marlin's words `[k / 16, 2 n]`."""
    device, (tiles, words) = packed.device, packed.shape
    shifts = 4 * torch.arange(8, device=device)
    codes = (packed[..., None].long() >> shifts & 15).view(tiles, words * 8 // 1024, 1024)
    places = [marlin_place(at) for at in range(1024)]
    order = torch.tensor([k * MARLIN_OUTPUTS + n for k, n in places], device=device)
    ordered = torch.empty_like(codes)
    ordered[..., order] = codes
    ordered = ordered.view(tiles, -1, MARLIN_INPUTS, MARLIN_OUTPUTS)
    return ordered.permute(1, 3, 0, 2).reshape(-1, tiles * MARLIN_INPUTS)


def marlin_scales(stored):
    """Scale bytes `[n, k / 32]` of Marlin's `[k / 32, n]`."""
    groups = stored.view(stored.shape[0], -1, 64)
    ordered = torch.empty_like(groups)
    ordered[..., [marlin_scale_place(at) for at in range(64)]] = groups
    return ordered.view(stored.shape).T


def fp4(codes, scales):
    """Weights `[n, k]` of codes and of the scale bytes of 32 each."""
    return scaled(e2m1(codes), powers(scales), 32)


def experts(x, chosen, shares, gate_up, down):
    """The sum of each row's experts. `x [rows, width]`; `chosen` and `shares` `[rows, top_k]`;
    `gate_up(expert) [2 channels, width]`, the gate first; `down(expert) [width, channels]`."""
    x = x.double()
    out = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        token, choice = (chosen == expert).nonzero(as_tuple=True)
        gate, up = linear(x[token], gate_up(expert)).chunk(2, dim=1)
        part = linear(gate * gate.sigmoid() * up, down(expert))
        out.index_add_(0, token, part * shares[token, choice].double()[:, None])
    return out


def flashmla_rows(pages, ids):
    """The 512 values of the rows `ids` of FlashMLA's `pages [n, 1, bytes]`."""
    flat = pages.view(pages.shape[0], -1)
    page, row = ids.flatten().long() // PAGE, ids.flatten().long() % PAGE
    values = flat[:, : PAGE * VALUE_BYTES].unflatten(1, (PAGE, VALUE_BYTES))[page, row]
    scales = flat[:, PAGE * VALUE_BYTES : PAGE * (VALUE_BYTES + SCALE_BYTES)]
    scales = scales.unflatten(1, (PAGE, SCALE_BYTES))[page, row, : FP8_VALUES // SCALED]
    coarse = scaled(values[:, :FP8_VALUES].view(torch.float8_e4m3fn), powers(scales), SCALED)
    fine = values[:, FP8_VALUES:].contiguous().view(torch.bfloat16).double()
    return torch.cat([coarse, fine], 1).view(*ids.shape, FP8_VALUES + BF16_VALUES)


def attention(q, keys, sink, scale: float):
    """`q [rows, heads, dim]` over `keys [rows, n, dim]`, which are the values too; `sink [heads]` takes a
    share and gives nothing."""
    scores = scale * q.double() @ keys.transpose(1, 2)
    sink = sink.double()[None, :, None].expand(scores.shape[0], -1, 1)
    shares = torch.cat([scores, sink], 2).softmax(2)
    return shares[..., :-1] @ keys


def index_keys(pages):
    """Keys `[n, 128]`, with their scales, of DeepGEMM's pages `[pages, 64, 1, 132]`."""
    flat = pages.view(pages.shape[0], -1)
    keys = flat[:, : PAGE * INDEX_DIM].view(torch.float8_e4m3fn).reshape(-1, INDEX_DIM)
    scales = flat[:, PAGE * INDEX_DIM :].contiguous().view(torch.float32)
    return keys.double() * scales.double().view(-1, 1)


def index_scores(q, keys, weights):
    """One row's scores: `q [heads, 128]`, `keys [n, 128]`, `weights [heads]`."""
    return (linear(keys, q).relu() * weights.double()).sum(1)


def best(scores, top_k: int):
    """The `top_k` best of `scores [rows, n]`, the best first."""
    return scores.topk(top_k, dim=1).values


def picked(scores, chosen):
    """The scores that were chosen, the best first; no numbers if one is out of bounds or chosen twice."""
    chosen = chosen.long()
    ordered = chosen.sort(dim=1).values
    inside = ((chosen >= 0) & (chosen < scores.shape[1])).all() and (ordered.diff(dim=1) > 0).all()
    if not inside:
        return torch.full(chosen.shape, torch.nan, device=scores.device)
    return scores.gather(1, chosen).sort(dim=1, descending=True).values
