#!/usr/bin/env python3
"""Times peers beside `fathom bench kernels`, on the same shapes, in turns, and prints ratios.

    python3 scripts/peers/run.py --fathom PATH [--peers .gpu/peers] [--rounds 3] [--out FILE]

Shapes come from `fathom bench kernels --shapes`: there is one definition; those of operators that a peer
has are compared. For each operator ours and every peer run one after the other, `--rounds` times over,
each of 30 samples; medians are compared, and beside them the spread of ours against itself and of the
peer against itself: a difference below that is none. Before a peer is timed its result is
compared with the exact one; one that computes something else is named so and gets no ratio. (Ours are
compared by `fathom device-check`.) Peers that are not on this machine, or do not have an operator, are
named with the reason. `--dry-run` does everything but the timing.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peers import NOT_TIMED, OPERATORS, PEERS
from work import Absent, rotating

# Calls that are recorded as one graph, samples, and seconds that each takes at least: as `fathom bench kernels`.
CALLS = 16
SAMPLES = 30
SAMPLE_S = 0.002
# Rows that are compared unless others are asked for: ours are timed at more.
ROWS = "1,8,64,128,1024,4096"


@dataclass
class Sample:
    """One turn of a peer: its time, how far its result was from the exact one, and what `Work` says."""

    seconds: float
    error: float | None
    tolerance: float
    unchecked: str
    note: str


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
    while len(samples) < SAMPLES:
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


def free_memory() -> None:
    """Gives the device back what nothing holds any more: fathom runs next, in a process of its own."""
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()


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
    time_peer: Callable[[str, dict], Sample | None],
    seconds_left: Callable[[], float],
) -> tuple[list[dict], dict[str, str]]:
    """Rows of the table, and peers that are absent with the reason."""
    absent: dict[str, str] = {}
    rows = []
    for operator, shapes in groups.items():
        if seconds_left() <= 0:
            break
        own: dict[str, list[float]] = {shape["name"]: [] for shape in shapes}
        others: dict[tuple[str, str], list[Sample]] = {}
        for _ in range(rounds):
            for name, seconds in time_ours(operator).items():
                own.setdefault(name, []).append(seconds)
            for shape in shapes:
                for peer in PEERS:
                    if peer in absent:
                        continue
                    try:
                        sample = time_peer(peer, shape)
                    except Absent as error:
                        absent[peer] = str(error)
                        continue
                    except Exception as error:
                        # A library of another version, or a device that it has broken.
                        reason = (str(error).splitlines() or [""])[0]
                        absent[peer] = f"failed: {type(error).__name__}: {reason}"
                        continue
                    if sample is not None:
                        others.setdefault((shape["name"], peer), []).append(sample)
        for shape in shapes:
            samples = own[shape["name"]]
            if not samples:
                continue
            median = statistics.median(samples)
            row = {"name": shape["name"], "seconds": median, "spread": spread(samples), "peers": {}}
            for peer in PEERS:
                if turns := others.get((shape["name"], peer)):
                    row["peers"][peer] = beside(turns, median)
            rows.append(row)
    return rows, absent


def spread(turns: list[float]) -> float:
    """How far turns of one implementation lie apart, as a share of their median: A against A."""
    return (max(turns) - min(turns)) / statistics.median(turns)


def beside(turns: list[Sample], ours_s: float) -> dict:
    """A peer's turns beside our time: a ratio only where it computes the same."""
    all_seconds = [turn.seconds for turn in turns]
    seconds = statistics.median(all_seconds)
    value: dict = {"seconds": seconds, "spread": spread(all_seconds), "note": turns[0].note}
    errors = [turn.error for turn in turns if turn.error is not None]
    if not errors:
        return value | {"not_compared": turns[0].unchecked, "times_ours": seconds / ours_s}
    # JSON has no infinity.
    error = max(errors)
    value |= {"error": error if math.isfinite(error) else None, "tolerance": turns[0].tolerance}
    if error > turns[0].tolerance:
        return value | {"result_differs": True}
    return value | {"times_ours": seconds / ours_s}


def told(peer: str, one: dict) -> str:
    """A peer's part of a row."""
    text = f"{peer}: {one['seconds'] * 1e6:.1f} +-{one['spread'] / 2:.1%}"
    if one.get("result_differs"):
        error = "no number" if one["error"] is None else f"{one['error']:.1e}"
        return f"{text}, result differs (error {error}, allowed {one['tolerance']:.0e})"
    text += f", {one['times_ours']:.2f}, "
    return text + (f"not compared: {one['not_compared']}" if "not_compared" in one else f"{one['error']:.1e}")


def table(rows: list[dict], absent: dict[str, str]) -> str:
    """The rows to read: above 1.00 ours is faster."""
    lines = [f"{'operator':<44}{'ours us':>10}{'spread':>8}  peer: us and half its spread, times ours, error of its result"]
    notes: dict[str, str] = {}
    for row in rows:
        parts = [told(peer, one) for peer, one in row["peers"].items()]
        notes |= {one["note"]: peer for peer, one in row["peers"].items() if one["note"]}
        line = f"{row['name']:<44}{row['seconds'] * 1e6:>10.1f}{row['spread']:>8.1%}  {'; '.join(parts)}"
        lines.append(line.rstrip())
    lines += [f"{peer}: {note}" for note, peer in notes.items()]
    lines += [f"absent: {peer}: {reason}" for peer, reason in absent.items()]
    lines += [f"not timed: {peer}: {reason}" for peer, reason in NOT_TIMED.items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fathom", required=True, help="the fathom binary")
    parser.add_argument("--peers", type=Path, default=Path(".gpu/peers"), help="what prepare.py fetched")
    parser.add_argument("--rounds", type=int, default=3, help="turns of ours and every peer")
    parser.add_argument("--only", default="", help="keep to operators whose name contains this")
    parser.add_argument("--rows", default=ROWS, help="numbers of rows that are compared")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="begin nothing after this")
    parser.add_argument("--out", type=Path, help="write the result as JSON to this file too")
    parser.add_argument("--dry-run", action="store_true", help="read shapes, look for peers, time nothing")
    args = parser.parse_args(arguments)
    begun = time.monotonic()
    rows_wanted = {int(rows) for rows in args.rows.split(",")}
    shapes = [
        shape
        for shape in read_shapes(args.fathom)
        if args.only in shape["name"] and shape["rows"] in rows_wanted and shape["operator"] in OPERATORS
    ]
    groups = operators(shapes)
    if args.dry_run:
        for operator, group in groups.items():
            print(f"{operator}: rows {', '.join(str(shape['rows']) for shape in group)}")
        print(f"peers: {', '.join(PEERS)}; not timed: {', '.join(NOT_TIMED)}")
        return 0

    def time_peer(peer: str, shape: dict) -> Sample | None:
        work = PEERS[peer](shape, args.peers)
        if work is None:
            return None
        error = work.error()
        sample = Sample(timed(rotating(work.calls)), error, work.tolerance, work.unchecked, work.note)
        del work
        free_memory()
        return sample

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
