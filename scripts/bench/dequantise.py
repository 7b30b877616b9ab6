"""Writes a V4 checkpoint with every weight dequantised to float32.

The result is what Hugging Face transformers loads as `deepseek_v4` without its FP8 and FP4 kernels,
which need a GPU. Values do not change: each weight becomes code x scale, both exact in float32.
Tensor names stay those of the release; transformers renames them as it loads. MTP tensors are left
out, because transformers does not build that block.

Not here: running the model (hf_cpu.py).
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """E8M0 bytes as float32: 2 ** (byte - 127)."""
    return torch.exp2(scale.view(torch.uint8).float() - 127.0)


def fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """E4M3 `[out, in]` with one scale per 128x128 block."""
    rows, cols = weight.shape
    spread = power_of_two(scale).repeat_interleave(128, 0).repeat_interleave(128, 1)
    return weight.float() * spread[:rows, :cols]


def fp4(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Packed E2M1 `[out, in / 2]`, low nibble first, with one scale per 32 inputs of a row."""
    packed = weight.view(torch.uint8)
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).long()
    values = E2M1[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    return values * power_of_two(scale).repeat_interleave(32, 1)


def dequantise(source: Path, target: Path) -> None:
    """Writes the dequantised copy of the checkpoint `source` into the directory `target`."""
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {name: safe_open(source / name, "pt") for name in sorted(set(index.values()))}

    def read(name: str) -> torch.Tensor:
        return shards[index[name]].get_tensor(name)

    tensors = {}
    for name in index:
        if name.startswith("mtp.") or name.endswith(".scale"):
            continue
        weight = read(name)
        scale_name = name.removesuffix("weight") + "scale"
        if scale_name in index and name.endswith(".weight"):
            expand = fp4 if weight.dtype == torch.int8 else fp8
            weight = expand(weight, read(scale_name))
        elif weight.is_floating_point():
            weight = weight.float()
        tensors[name] = weight.contiguous()

    config = json.loads((source / "config.json").read_text())
    for key in ("quantization_config", "expert_dtype"):
        config.pop(key, None)
    config["torch_dtype"] = "float32"
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, target / name)
