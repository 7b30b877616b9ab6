#!/usr/bin/env python3
"""Times peers beside `fathom bench kernels`, on the same shapes, in turns, and prints ratios.

    python3 scripts/peers/run.py --fathom PATH [--peers .gpu/peers] [--rounds 3] [--out FILE]

Shapes come from `fathom bench kernels --shapes`: there is one definition. For each operator ours and
every peer run one after the other, `--rounds` times over; medians are compared, and beside them the
spread of ours against itself: a difference below that is none. Peers that are not on this machine, or
do not have an operator, are named with the reason. `--dry-run` does everything but the timing.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from peers import NOT_TIMED, PEERS, Absent

# Calls that are recorded as one graph, and seconds that a sample takes at least.
CALLS = 16
SAMPLE_S = 0.02


def read_shapes(fathom: str) -> list[dict]:
    """The shapes that `fathom bench kernels` times."""
    output = subprocess.run([fathom, "bench", "kernels", "--shapes"], check=True, capture_output=True)
    shapes = json.loads(output.stdout)["shapes"]
    for shape in shapes:
        missing = {"name", "operator", "rows", "bytes", "flops"} - shape.keys()
        if missing:
            raise ValueError(f"a shape of {fathom} lacks {', '.join(sorted(missing))}: {shape}")
    return shapes


def ours(fathom: str, operator: str, scratch: Path) -> dict[str, float]:
    """Seconds of every shape whose name begins with `operator`, as fathom measures them."""
    out = scratch / "ours.json"
    command = [fathom, "bench", "kernels", "--only", operator, "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {kernel["name"]: kernel["seconds"] for kernel in json.loads(out.read_text())["kernels"]}


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call: recorded where that is possible, timed by events."""
    import torch

    for _ in range(3):
        call()
    torch.cuda.synchronize()

    def many():
        for _ in range(CALLS):
            call()

    run = many
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            many()
        run = graph.replay
    except RuntimeError:
        torch.cuda.synchronize()
    samples: list[float] = []
    repeats = 1
    while len(samples) < 7:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        seconds = begin.elapsed_time(end) / 1e3
        if seconds < SAMPLE_S:
            repeats *= 2
        else:
            samples.append(seconds / (repeats * CALLS))
    return statistics.median(samples)


def operators(shapes: list[dict]) -> dict[str, list[dict]]:
    """Shapes by operator: what is before the number of rows in their names."""
    groups: dict[str, list[dict]] = {}
    for shape in shapes:
        groups.setdefault(shape["name"].rsplit(" x ", 1)[0], []).append(shape)
    return groups


def compare(
    groups: dict[str, list[dict]],
    rounds: int,
    time_ours: Callable[[str], dict[str, float]],
    time_peer: Callable[[str, dict], float | None],
    seconds_left: Callable[[], float],
) -> tuple[list[dict], dict[str, str]]:
    """Rows of the table, and peers that are absent with the reason."""
    absent: dict[str, str] = {}
    rows = []
    for operator, shapes in groups.items():
        if seconds_left() <= 0:
            break
        own: dict[str, list[float]] = {shape["name"]: [] for shape in shapes}
        others: dict[tuple[str, str], list[float]] = {}
        for _ in range(rounds):
            for name, seconds in time_ours(operator).items():
                own.setdefault(name, []).append(seconds)
            for shape in shapes:
                for peer in PEERS:
                    if peer in absent:
                        continue
                    try:
                        seconds = time_peer(peer, shape)
                    except Absent as error:
                        absent[peer] = str(error)
                        continue
                    except Exception as error:
                        # A library of another version, or a device that it has broken.
                        reason = (str(error).splitlines() or [""])[0]
                        absent[peer] = f"failed: {type(error).__name__}: {reason}"
                        continue
                    if seconds is not None:
                        others.setdefault((shape["name"], peer), []).append(seconds)
        for shape in shapes:
            samples = own[shape["name"]]
            if not samples:
                continue
            median = statistics.median(samples)
            row = {"name": shape["name"], "seconds": median, "peers": {}}
            row["spread"] = (max(samples) - min(samples)) / median
            for peer in PEERS:
                if times := others.get((shape["name"], peer)):
                    seconds = statistics.median(times)
                    row["peers"][peer] = {"seconds": seconds, "times_ours": seconds / median}
            rows.append(row)
    return rows, absent


def table(rows: list[dict], absent: dict[str, str]) -> str:
    """The rows to read: above 1.00 ours is faster."""
    lines = [f"{'operator':<44}{'ours us':>10}{'spread':>8}  peer: us, times ours"]
    for row in rows:
        parts = [
            f"{peer}: {one['seconds'] * 1e6:.1f}, {one['times_ours']:.2f}"
            for peer, one in row["peers"].items()
        ]
        line = f"{row['name']:<44}{row['seconds'] * 1e6:>10.1f}{row['spread']:>8.1%}  {'; '.join(parts)}"
        lines.append(line.rstrip())
    lines += [f"absent: {peer}: {reason}" for peer, reason in absent.items()]
    lines += [f"not timed: {peer}: {reason}" for peer, reason in NOT_TIMED.items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fathom", required=True, help="the fathom binary")
    parser.add_argument("--peers", type=Path, default=Path(".gpu/peers"), help="what prepare.py fetched")
    parser.add_argument("--rounds", type=int, default=3, help="turns of ours and every peer")
    parser.add_argument("--only", default="", help="keep to operators whose name contains this")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="begin nothing after this")
    parser.add_argument("--out", type=Path, help="write the result as JSON to this file too")
    parser.add_argument("--dry-run", action="store_true", help="read shapes, look for peers, time nothing")
    args = parser.parse_args(arguments)
    begun = time.monotonic()
    shapes = [shape for shape in read_shapes(args.fathom) if args.only in shape["name"]]
    groups = operators(shapes)
    if args.dry_run:
        for operator, group in groups.items():
            print(f"{operator}: rows {', '.join(str(shape['rows']) for shape in group)}")
        print(f"peers: {', '.join(PEERS)}; not timed: {', '.join(NOT_TIMED)}")
        return 0

    def time_peer(peer: str, shape: dict) -> float | None:
        call = PEERS[peer](shape, args.peers)
        return None if call is None else timed(call)

    scratch = args.out.parent if args.out else Path(".")
    rows, absent = compare(
        groups,
        args.rounds,
        lambda operator: ours(args.fathom, operator, scratch),
        time_peer,
        lambda: args.budget_s - (time.monotonic() - begun),
    )
    print(table(rows, absent))
    if args.out:
        result = {"rounds": args.rounds, "rows": rows, "absent": absent, "not_timed": NOT_TIMED}
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
