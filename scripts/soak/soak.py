#!/usr/bin/env python3
"""Answers do not depend on what else the server does, and its memory does not grow.

Against `fathom serve` with its embedded model:

1. 200 seeded requests one by one, each under a cache salt of its own: nothing is shared;
2. the same at once and in random order, on a cache so small that it evicts all the time;
3. the same after a restart with the disk tier: what was cached is found again;
4. random traffic of many clients: the same requests streamed and whole, clients that hang up, bad
   requests, metrics. Every answer is compared with the first one; the server's resident memory is
   sampled, and must not grow once it is warm.

Ends with `N passed, M failed`. `cargo xtask check` runs it with fewer requests and for seconds; by hand:

    python3 scripts/soak/soak.py --fathom PATH --seconds 600
"""

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "e2e"))

from server_process import ServerProcess  # noqa: E402
from traffic import Refused, ask, exchange, fetch, requests  # noqa: E402

# About a hundred blocks beside the slots.
CACHE_BYTES = 40 << 20
SETTINGS = """
[limits]
max_model_len = 2048
queue_len = 4096
[cache]
remember_answers_mb = 1
[engine]
max_num_seqs = 24
max_num_batched_tokens = 256
"""


class Soak:
    """One run: known answers, what went wrong, and how often."""

    def __init__(self, options):
        self.options = options
        self.requests = requests(options.seed, options.requests)
        self.known = {}
        self.problems = []
        self.n_passed = 0

    def check(self, name, holds, detail=""):
        """Counts one check and says how it went."""
        self.n_passed += bool(holds)
        if not holds:
            self.problems.append(name)
        print(f"{'ok' if holds else 'FAILED':<7}{name} {detail}", flush=True)

    async def learn(self, address):
        """Asks every request alone."""
        for index, (path, body) in enumerate(self.requests):
            salted = body | {"cache_salt": f"alone {index}"}
            answer, n_cached = await ask(address, (path, salted))
            assert n_cached == 0, f"request {index} shares {n_cached} tokens with nobody"
            self.known[index] = answer

    async def compare(self, address, index, streamed):
        """Asks a request beside others. Returns its cached tokens; notes an answer that differs."""
        answer, n_cached = await ask(address, self.requests[index], streamed)
        if answer != self.known[index]:
            expected = self.known[index]
            raise AssertionError(f"request {index}: {answer} where alone {expected}")
        return n_cached

    async def at_once(self, address):
        """All requests at once in random order: cached tokens, and the answers that differ."""
        draw = random.Random(self.options.seed)
        order = list(range(len(self.requests)))
        draw.shuffle(order)
        asked = [self.compare(address, index, draw.random() < 0.5) for index in order]
        results = await asyncio.gather(*asked, return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        return sum(r for r in results if not isinstance(r, BaseException)), failures

    async def client(self, address, draw, until, counts):
        """Random traffic of one client."""
        while time.monotonic() < until:
            index = draw.randrange(len(self.requests))
            kind = draw.random()
            try:
                if kind < 0.85:
                    await self.compare(address, index, draw.random() < 0.5)
                    counts["answers"] += 1
                elif kind < 0.95:
                    await ask(address, self.requests[index], True, draw.randrange(4))
                    counts["hang-ups"] += 1
                elif kind < 0.98:
                    status, pieces = await exchange(
                        address, "POST", "/v1/chat/completions", {"model": "x", "messages": 1}
                    )
                    _ = [piece async for piece in pieces]
                    assert status in (400, 404), f"a bad request was answered with {status}"
                    counts["bad requests"] += 1
                else:
                    await fetch(address, draw.choice(["/metrics", "/v1/models", "/health"]))
                    counts["looks"] += 1
            except (AssertionError, Refused, OSError, asyncio.IncompleteReadError) as problem:
                counts["problems"] += 1
                print(f"problem: {problem!r}"[:2000], flush=True)

    async def traffic(self, address, pid):
        """The last part: clients until the time is over, memory sampled meanwhile."""
        until = time.monotonic() + self.options.seconds
        counts = dict.fromkeys(["answers", "hang-ups", "bad requests", "looks", "problems"], 0)
        clients = [
            self.client(address, random.Random(f"{self.options.seed} {n}"), until, counts)
            for n in range(self.options.clients)
        ]
        running = asyncio.gather(*clients)
        sizes = []
        while not running.done():
            sizes.append(resident_bytes(pid))
            await asyncio.wait([running], timeout=0.25)
        await running
        return counts, sizes


def resident_bytes(pid):
    """Resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def address_of(server):
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


def judge_memory(soak, sizes):
    """The second half of the samples after warm-up against the first."""
    warm = sizes[len(sizes) * 2 // 5 :]
    half = len(warm) // 2
    before, after = statistics.median(warm[:half]), statistics.median(warm[half:])
    growth = after - before
    # Allocators keep what a burst of requests once needed; within seconds every burst is a new one.
    allowed = max(0.02 * before, 6 << 20) if len(warm) > 100 else max(0.05 * before, 16 << 20)
    mib = [f"{size / 2**20:.1f}" for size in (sizes[0], before, after, max(sizes))]
    detail = f"{mib[0]} MiB at the start, medians {mib[1]} and {mib[2]}, most {mib[3]}"
    soak.check("resident memory does not grow once warm", growth <= allowed, detail)


def metric(page, name):
    """The sum of a metric over its labels."""
    lines = [line for line in page.decode().splitlines() if line.startswith(name)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def run(options):
    """All four parts; returns the number of failed checks."""
    soak = Soak(options)
    with tempfile.TemporaryDirectory() as scratch:
        settings = Path(scratch) / "fathom.toml"
        settings.write_text(SETTINGS)
        flags = ["--config", str(settings), "--kv-cache-memory-bytes", str(CACHE_BYTES)]
        flags += ["--cache-dir", str(Path(scratch) / "cache"), "--cache-disk-gb", "1"]

        with ServerProcess(options.fathom, flags) as server:
            address = address_of(server)
            began = time.monotonic()
            asyncio.run(soak.learn(address))
            n = len(soak.requests)
            soak.check(f"{n} requests one by one", True, f"{time.monotonic() - began:.1f} s")
            began = time.monotonic()
            _, failures = asyncio.run(soak.at_once(address))
            took = f"{time.monotonic() - began:.1f} s {failures[:1]}"
            soak.check(f"{n} requests at once answer the same", not failures, took)

        with ServerProcess(options.fathom, flags) as server:
            address = address_of(server)
            began = time.monotonic()
            n_cached, failures = asyncio.run(soak.at_once(address))
            took = f"{time.monotonic() - began:.1f} s {failures[:1]}"
            soak.check(f"{n} requests after a restart answer the same", not failures, took)
            page = asyncio.run(fetch(address, "/metrics"))
            loads = metric(page, "fathom_cache_loads_total")
            soak.check("the disk tier was used", loads > 0, f"{loads:.0f} loads")
            soak.check("prefixes were reused", n_cached > 0, f"{n_cached} tokens")

            counts, sizes = asyncio.run(soak.traffic(address, server.pid()))
            said = ", ".join(f"{count} {name}" for name, count in counts.items())
            soak.check("traffic without a mismatch or an error", counts["problems"] == 0, said)
            judge_memory(soak, sizes)
            page = asyncio.run(fetch(address, "/metrics"))
            # The server hears of the last hang-ups within a step.
            for _ in range(100):
                if metric(page, "fathom_requests_in_flight") == 0:
                    break
                time.sleep(0.05)
                page = asyncio.run(fetch(address, "/metrics"))
            idle = metric(page, "fathom_requests_in_flight") == 0
            soak.check("nothing is in flight at the end", idle)
            preempted = metric(page, "fathom_preemptions_total")
            print(f"       preemptions {preempted:.0f}")
        if soak.problems:
            print(server.log()[-4000:])
    return soak


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fathom", required=True, help="the server's program")
    parser.add_argument("--seconds", type=float, default=60, help="length of the random traffic")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=200, help="different requests")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    # A line for every request is not what this is about.
    os.environ.setdefault("FATHOM_LOG", "warn")
    soak = run(options)
    print(f"{soak.n_passed} passed, {len(soak.problems)} failed")
    sys.exit(1 if soak.problems else 0)


if __name__ == "__main__":
    main()
