#!/usr/bin/env python3
"""Fathom against Hugging Face transformers on the CPU: prefill and decode of one sequence.

Both run the same checkpoint in float32 with the same number of threads. Rounds alternate between
the two programs, so that a busy machine slows both; the best round of each counts. Before anything
is timed the two must produce the same greedy tokens, or the comparison would be of two different
computations. Fathom is also timed in bf16, its default mode; that has no counterpart here.

Run by `cargo xtask bench cpu`. Not here: dequantising the checkpoint (dequantise.py).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PREFILL_TOKENS = 600
DECODE_AFTER = 128
DECODE_TOKENS = 64
TARGETS = {"decode": 30.0, "prefill": 3.0}


def fathom(args, prompt, numerics):
    """One measurement of Fathom in a process of its own."""
    command = [args.fathom, "bench", "cpu", "--model", args.model, "--prompt", prompt]
    command += ["--threads", str(args.threads), "--numerics", numerics]
    command += ["--decode-after", str(DECODE_AFTER), "--decode-tokens", str(DECODE_TOKENS)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


class Transformers:
    """The checkpoint in transformers, float32, eager attention (the only kind it has for V4)."""

    def __init__(self, model, threads):
        import torch
        from dequantise import dequantise
        from transformers import AutoModelForCausalLM

        self.torch = torch
        torch.set_num_threads(threads)
        with tempfile.TemporaryDirectory() as directory:
            dequantise(Path(model), Path(directory))
            loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.model = loaded.eval()

    def step(self, ids, cache=None):
        """Runs `ids`; the cache afterwards and the most likely next token."""
        output = self.model(
            self.torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        return output.past_key_values, int(output.logits[0, -1].argmax())

    def measure(self, ids):
        """The same measurement as `fathom bench cpu`."""
        with self.torch.inference_mode():
            start = time.perf_counter()
            self.step(ids)
            prefill_s = time.perf_counter() - start
            cache, token = self.step(ids[:DECODE_AFTER])
            tokens = [token]
            start = time.perf_counter()
            for _ in range(DECODE_TOKENS):
                cache, token = self.step([tokens[-1]], cache)
                tokens.append(token)
            decode_s = (time.perf_counter() - start) / DECODE_TOKENS
        return {"prefill_s": prefill_s, "decode_s_per_token": decode_s, "tokens": tokens}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="checkpoint directory")
    parser.add_argument("--fathom", required=True, help="the release build of `fathom`")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", help="write the result as JSON to this file")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)

    vocabulary = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
    ids = [3 + (7919 * i + i * i // 5) % (vocabulary - 40) for i in range(PREFILL_TOKENS)]
    reference = Transformers(args.model, args.threads)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as prompt:
        json.dump(ids, prompt)
        prompt.flush()
        theirs, ours = reference.measure(ids), fathom(args, prompt.name, "f32")
        if theirs["tokens"] != ours["tokens"]:
            print(f"different tokens:\n  transformers {theirs['tokens']}\n  fathom {ours['tokens']}")
            return 1
        rounds = {"transformers": [], "fathom f32": [], "fathom bf16": []}
        for index in range(args.rounds):
            rounds["transformers"].append(reference.measure(ids))
            rounds["fathom f32"].append(fathom(args, prompt.name, "f32"))
            rounds["fathom bf16"].append(fathom(args, prompt.name, "bf16"))
            print(f"round {index + 1} of {args.rounds}", flush=True)

    def best(program, what):
        return min(result[what] for result in rounds[program])

    report = {"threads": args.threads, "rounds": args.rounds, "versions": versions(), "programs": {}}
    for program in rounds:
        report["programs"][program] = {
            "prefill_tokens": PREFILL_TOKENS,
            "prefill_tokens_per_s": PREFILL_TOKENS / best(program, "prefill_s"),
            "decode_tokens_per_s": 1 / best(program, "decode_s_per_token"),
        }
    base = report["programs"]["transformers"]
    print(f"\n{'tokens per second':<16}{'prefill':>12}{'decode':>12}")
    for program, rates in report["programs"].items():
        ratios = {
            what: rates[f"{what}_tokens_per_s"] / base[f"{what}_tokens_per_s"]
            for what in ("prefill", "decode")
        }
        rates["times_transformers"] = ratios
        print(
            f"{program:<16}{rates['prefill_tokens_per_s']:12.1f}{rates['decode_tokens_per_s']:12.1f}"
            f"   {ratios['prefill']:.1f}x prefill, {ratios['decode']:.1f}x decode"
        )
    print("targets: " + ", ".join(f"{what} {target:.0f}x" for what, target in TARGETS.items()))
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=2) + "\n")
    return 0


def versions():
    """What the other side of the comparison is."""
    import torch
    import transformers

    return {"transformers": transformers.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    sys.exit(main())
