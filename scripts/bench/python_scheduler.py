#!/usr/bin/env python3
"""Our scheduler against a public Python one: CPU time of a decode step, in one run.

Installs the peer from the package index into a scratch environment, drives it with a null runner (every
sampled token is as good as any other) at 32, 256 and 1,024 running sequences and 64 waiting ones, and
runs `cargo bench -p fathom-benches --bench scheduler` before and after it. Times are CPU time of the
thread, medians of many steps; the two runs of ours show how far one figure can be trusted.

    python3 scripts/bench/python_scheduler.py            # nano-vllm
    python3 scripts/bench/python_scheduler.py --json

The peer's package is nano-vllm, vLLM's scheduler in its smallest form: one list of running sequences,
block tables, prefix hashes; no priorities, no fairness, no chunked prefill, no snapshots. It needs
neither GPU nor torch for that. Not part of `cargo xtask check`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

REQUIREMENTS = ["nano-vllm-fork==20260210", "xxhash", "numpy"]
RUNNING = [32, 256, 1024]
N_WAITING = 64
N_PROMPT = 500
N_STEPS = 600
BLOCK = 256


def environment(scratch):
    """The interpreter of a scratch environment with the peer in it."""
    python = Path(scratch) / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", scratch], check=True)
        # Without its dependencies: torch is only needed to run a model.
        install = [python, "-m", "pip", "install", "--quiet", "--no-deps", *REQUIREMENTS]
        subprocess.run(install, check=True)
    return python


def ours(program):
    """Median CPU time of our decode steps in microseconds, by running sequences."""
    command = ["cargo", "bench", "--quiet", "-p", "fathom-benches", "--bench", "scheduler", "--"]
    command = [*([program] if program else command), "--json"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return {row["running"]: row["p50_us"] for row in rows if row["workload"] == "decode"}


def peer():
    """The same for the peer. Runs inside the scratch environment."""
    package = types.ModuleType("nanovllm")
    directories = [Path(place) / "nanovllm" for place in sys.path]
    package.__path__ = [str(place) for place in directories if place.is_dir()]
    # The package's own start imports torch; its scheduler needs only the name of a class.
    sys.modules["nanovllm"] = package
    sys.modules["transformers"] = types.ModuleType("transformers")
    sys.modules["transformers"].AutoConfig = type("AutoConfig", (), {})
    from nanovllm.engine.scheduler import Scheduler
    from nanovllm.engine.sequence import Sequence
    from nanovllm.sampling_params import SamplingParams

    result = {}
    for n_running in RUNNING:
        n_tokens = N_PROMPT + N_STEPS + 300
        config = types.SimpleNamespace(
            max_num_seqs=n_running,
            max_num_batched_tokens=8192,
            eos=-1,
            num_kvcache_blocks=(n_tokens // BLOCK + 2) * n_running + 64,
            kvcache_block_size=BLOCK,
        )
        scheduler = Scheduler(config)
        limits = SamplingParams(max_tokens=n_tokens, ignore_eos=True)
        for number in range(n_running + N_WAITING):
            prompt = [i ^ number << 12 for i in range(N_PROMPT)]
            scheduler.add(Sequence(prompt, limits))

        def step():
            sequences, is_prefill = scheduler.schedule()
            scheduler.postprocess(sequences, [7] * len(sequences))
            return is_prefill

        while len(scheduler.running) < n_running:
            step()
        # As with ours, the waiting ones find no slot.
        waiting, scheduler.waiting = scheduler.waiting, type(scheduler.waiting)()
        times = []
        for _ in range(N_STEPS):
            began = time.thread_time_ns()
            is_prefill = step()
            times.append(time.thread_time_ns() - began)
            assert not is_prefill
        assert len(waiting) == N_WAITING
        result[n_running] = statistics.median(times) / 1e3
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", help="where to keep the environment; temporary by default")
    parser.add_argument("--ours", help="our benchmark's program; built by cargo by default")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        print(json.dumps(peer()))
        return
    with tempfile.TemporaryDirectory() as temporary:
        python = environment(options.scratch or temporary)
        before = ours(options.ours)
        run = [python, __file__, "--peer"]
        output = subprocess.run(run, check=True, capture_output=True, text=True).stdout
        theirs = {int(n): us for n, us in json.loads(output).items()}
        after = ours(options.ours)
    rows = []
    for n in RUNNING:
        mean = (before[n] + after[n]) / 2
        ratio = theirs[n] / mean
        rows.append(
            {
                "running": n,
                "ours_us": [before[n], after[n]],
                "nano_vllm_us": theirs[n],
                "ratio": ratio,
            }
        )
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'running':>8} {'ours':>17} {'nano-vllm':>11} {'ratio':>7}   (us of CPU per decode step)")
    for row in rows:
        first, second = row["ours_us"]
        both = f"{first:.2f} .. {second:.2f}"
        print(
            f"{row['running']:>8} {both:>17} {row['nano_vllm_us']:>11.1f} {row['ratio']:>7.1f}"
        )


if __name__ == "__main__":
    main()
