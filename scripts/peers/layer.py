#!/usr/bin/env python3
"""Times transformers' DeepSeek-V4 decoder layer beside `fathom bench slice`, one layer of each kind.

    python3 scripts/peers/layer.py --fathom PATH [--peers .gpu/peers] [--rounds 2] [--out FILE]

Flash's dimensions, bf16 weights drawn on the device, one token per sequence after `--context` others. It
takes transformers' own steps: eager, because its cache grows by concatenation and no step can be
recorded; ours are replays of a recording, as when serving. Its weights are bf16, ours FP8 and FP4: its
256 experts are 12.9 GB per layer, so it reads about four times the bytes. `--only-peer` leaves ours
out. Not here: whether the layer is right, which `check_torch.py` looks at with small dimensions.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from work import Absent, module

# The kinds as `fathom bench slice` calls them, and as transformers does.
KINDS = {
    "window": "sliding_attention",
    "ratio-4": "compressed_sparse_attention",
    "ratio-128": "heavily_compressed_attention",
}
# As in models/flash/config.json, which `check.py` compares.
FLASH = {
    "vocab_size": 129280,
    "hidden_size": 4096,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 64,
    "head_dim": 512,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "num_experts_per_tok": 6,
    "n_routed_experts": 256,
    "sliding_window": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
}
EXPERTS = "grouped_mm"
WARM_UPS = 3


class Layers:
    """One layer of each kind with drawn weights, on one device."""

    def __init__(self, folder: Path | None, sizes: dict, device: str, dtype: str):
        self.torch = torch = module("torch")
        self.transformers = module("transformers", folder)
        code = module("transformers.models.deepseek_v4.modeling_deepseek_v4")
        self.mask = code.create_sliding_window_causal_mask
        self.sizes, self.device, self.dtype = sizes, device, getattr(torch, dtype)
        # Each is the only layer of its model: masks are made for the first layer's cache.
        self.configs = {kind: self._config(kind) for kind in KINDS}
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(device):
                layers = {kind: code.DeepseekV4DecoderLayer(self.configs[kind], 0) for kind in KINDS}
                self.rotary = code.DeepseekV4RotaryEmbedding(self.configs["window"])
        finally:
            torch.set_default_dtype(before)
        self.layers = {kind: layer.eval() for kind, layer in layers.items()}
        for layer in self.layers.values():
            self._draw(layer, code.DeepseekV4PreTrainedModel._keep_in_fp32_modules_strict)

    def _config(self, kind: str):
        # Routed by score, as most layers are.
        kinds = {"layer_types": [KINDS[kind]], "mlp_layer_types": ["moe"]}
        config = self.transformers.DeepseekV4Config(num_hidden_layers=1, **kinds, **self.sizes)
        config._attn_implementation, config._experts_implementation = "eager", EXPERTS
        return config

    def _draw(self, layer, in_f32: list[str]) -> None:
        tensors = [*layer.named_parameters(), *layer.named_buffers()]
        for name, tensor in tensors:
            if set(name.split(".")) & set(in_f32):
                tensor.data = tensor.data.float()
        for name, parameter in layer.named_parameters():
            if "norm" not in name:
                # Results have about the size of the inputs.
                parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5)

    def cache(self, kind: str):
        """An empty cache."""
        return self.transformers.DynamicCache(config=self.configs[kind])

    def hidden(self, batch: int, n_tokens: int):
        """Random copies."""
        size = (batch, n_tokens, self.sizes["hc_mult"], self.sizes["hidden_size"])
        return self.torch.randn(size, device=self.device, dtype=self.dtype)

    def run(self, kind: str, hidden, cache, position: int):
        """One layer over `hidden [batch, n, copies, width]`, whose first token is at `position`."""
        embeds = hidden[:, :, 0]
        positions = self.torch.arange(hidden.shape[1], device=self.device)[None] + position
        angles = {of: self.rotary(embeds, position_ids=positions, layer_type=of) for of in ("main", "compress")}
        mask = self.mask(
            config=self.configs[kind],
            inputs_embeds=embeds,
            attention_mask=None,
            past_key_values=cache,
            position_ids=positions,
        )
        return self.layers[kind](
            hidden,
            position_embeddings=angles,
            position_ids=positions.expand(hidden.shape[0], -1),
            attention_mask=mask,
            past_key_values=cache,
        )

    def filled(self, kind: str, batch: int, context: int):
        """A cache with `context` tokens of `batch` sequences: one is run, the others are copies."""
        cache = self.cache(kind)
        self.run(kind, self.hidden(1, context), cache, 0)
        self.copied(cache, batch)
        return cache

    def copied(self, cache, batch: int) -> None:
        """Makes the one sequence of a cache `batch` of them."""
        cache.layers[0].reorder_cache(self.torch.zeros(batch, device=self.device, dtype=self.torch.long))

    def step_s(self, kind: str, batch: int, context: int, n_steps: int) -> float:
        """Median seconds of one token per sequence."""
        torch, seconds = self.torch, []
        with torch.inference_mode():
            cache = self.filled(kind, batch, context)
            for step in range(WARM_UPS + n_steps):
                hidden = self.hidden(batch, 1)
                self.wait()
                begun = time.perf_counter()
                out = self.run(kind, hidden, cache, context + step)
                self.wait()
                seconds.append(time.perf_counter() - begun)
        if out.shape != hidden.shape or not out.isfinite().all():
            raise ValueError(f"a {kind} layer leaves {tuple(out.shape)} values that are no numbers")
        return statistics.median(seconds[WARM_UPS:])

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.device == "cuda":
            self.torch.cuda.synchronize()


def ours(fathom: str, batches: list[int], context: int, scratch: Path) -> dict[tuple[str, int], float]:
    """Seconds of one of our layers by kind and batch, as `fathom bench slice` measures them."""
    out = scratch / "ours-slice.json"
    command = [fathom, "bench", "slice", "--layers", "8", "--only", "decode", "--samples", "15"]
    command += ["--batch", ",".join(map(str, batches)), "--context", str(context), "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return of_cases(json.loads(out.read_text()))


def of_cases(slice_result: dict) -> dict[tuple[str, int], float]:
    """Seconds by kind and batch in the JSON of `fathom bench slice`."""
    return {
        (kind, case["batch"]): times["seconds"]
        for case in slice_result["cases"]
        for kind, times in case["kinds"].items()
    }


def rows(own: list[dict], theirs: list[dict]) -> list[dict]:
    """Medians over the rounds, and their ratio where both were timed."""
    result = []
    for key in theirs[0]:
        kind, batch = key
        row = {"kind": kind, "batch": batch, "peer_s": statistics.median(one[key] for one in theirs)}
        samples = [one[key] for one in own if key in one]
        if samples:
            row["seconds"] = statistics.median(samples)
            row["spread"] = (max(samples) - min(samples)) / row["seconds"]
            row["times_ours"] = row["peer_s"] / row["seconds"]
        result.append(row)
    return result


def table(result: list[dict]) -> str:
    """The rows to read: above 1.00 ours is faster."""
    lines = [f"{'layer':<12}{'batch':>6}{'ours us':>10}{'spread':>8}{'transformers us':>17}{'times ours':>12}"]
    for row in result:
        line = f"{row['kind']:<12}{row['batch']:>6}"
        line += f"{row['seconds'] * 1e6:>10.1f}{row['spread']:>8.1%}" if "seconds" in row else " " * 18
        line += f"{row['peer_s'] * 1e6:>17.1f}"
        lines.append(line + (f"{row['times_ours']:>12.2f}" if "seconds" in row else ""))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fathom", help="the fathom binary; needed unless --only-peer")
    parser.add_argument("--peers", type=Path, default=Path(".gpu/peers"), help="what prepare.py fetched")
    parser.add_argument("--rounds", type=int, default=2, help="turns of ours and of the peer")
    parser.add_argument("--batch", type=int, action="append", help="sequences; 1, 8 and 32 by default")
    parser.add_argument("--context", type=int, default=1024, help="tokens before the step")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of a turn")
    parser.add_argument("--only-peer", action="store_true", help="leave ours out")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, help="write the result as JSON to this file too")
    args = parser.parse_args(arguments)
    if not args.only_peer and args.fathom is None:
        parser.error("--fathom is missing; --only-peer leaves it out")
    batches = args.batch or [1, 8, 32]
    carried = args.peers / "transformers"
    try:
        # Without a carried one, the transformers that Python has.
        layers = Layers(carried if carried.exists() else None, FLASH, args.device, "bfloat16")
    except Absent as error:
        print(f"absent: transformers: {error}")
        return 0
    own, theirs, result = [], [], []
    for _ in range(args.rounds):
        if not args.only_peer:
            scratch = args.out.parent if args.out else Path(".")
            own.append(ours(args.fathom, batches, args.context, scratch))
        times = {}
        for kind in KINDS:
            for batch in batches:
                times[kind, batch] = layers.step_s(kind, batch, args.context, args.steps)
        theirs.append(times)
        result = rows(own, theirs)
        if args.out:
            # After every round: the next may have no time left.
            versions = {"transformers": layers.transformers.__version__, "torch": layers.torch.__version__}
            value = {"context": args.context, "rounds": len(theirs), "versions": versions, "layers": result}
            value |= {"experts": EXPERTS, "weights": "bf16", "steps": "eager"}
            args.out.write_text(json.dumps(value, indent=2) + "\n")
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
