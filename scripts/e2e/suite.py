"""Suites of checks: how they are found, run, skipped and counted.

A suite is a module whose functions named `check_...` take `(client, server)`; `client` is what its
function `client(server)` returns. A check fails by raising, and is skipped by raising `Skipped` with
the reason, which is printed. What the server cannot do yet is found out by asking it, so that a
check switches itself on with the feature.
"""

import time
import traceback


class Skipped(Exception):
    """A check has no meaning here; the text says why."""


class Tally:
    """Checks so far, over all suites."""

    def __init__(self, only):
        self._only = only
        self.passed = 0
        self.failed = 0

    def run(self, suite, checks, *arguments):
        """Runs those `checks` (pairs of name and function) whose name fits; none hides another."""
        checks = [(name, check) for name, check in checks if self._only in f"{suite}.{name}"]
        if not checks:
            return
        print(f"-- {suite}", flush=True)
        for name, check in checks:
            start = time.monotonic()
            try:
                check(*arguments)
                self.passed += 1
                verdict = "ok"
            except Skipped as reason:
                verdict = f"skipped: {reason}"
            except Exception:  # noqa: BLE001 - every failure is reported, none hides the others
                self.failed += 1
                verdict = "FAILED\n" + traceback.format_exc()
            print(f"{name:<58} {time.monotonic() - start:6.2f} s  {verdict}", flush=True)

    def wants(self, suite):
        """Whether a check of `suite` may fit; saves importing what nobody asked for."""
        return not self._only or "." not in self._only or self._only.split(".")[0] in suite


def checks_of(module):
    """The checks of a module, in the order of its text."""
    return [
        (name.removeprefix("check_"), value)
        for name, value in vars(module).items()
        if name.startswith("check_")
    ]


def require(server, capability):
    """Skips the check unless the server has `capability`."""
    status, refused = {
        "constrained decoding": lambda: (server.forced_call_status, 422),
        "/v1/responses": lambda: (server.responses_status, 404),
    }[capability]()
    if status == refused:
        raise Skipped(f"no {capability}: the server answers {refused}")


def usage_holds(usage, reasoning=None):
    """Asserts the identities that every usage object of the OpenAI surface keeps."""
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"], usage
    hit, miss = usage["prompt_cache_hit_tokens"], usage["prompt_cache_miss_tokens"]
    assert hit + miss == usage["prompt_tokens"], usage
    assert usage["prompt_tokens_details"]["cached_tokens"] == hit < usage["prompt_tokens"], usage
    thought = usage["completion_tokens_details"]["reasoning_tokens"]
    assert 0 <= thought <= usage["completion_tokens"], usage
    if reasoning is not None:
        assert (thought > 0) == reasoning, usage


def prompt_tokens(usage):
    """All prompt tokens that a usage object of the Messages surface counts."""
    cached = usage["cache_read_input_tokens"]
    assert usage["cache_creation_input_tokens"] == 0 <= cached, usage
    assert usage["input_tokens"] > 0, "the last prompt token is always computed"
    return usage["input_tokens"] + cached


def no_markup(*texts):
    """Asserts that no text shows what belongs to the encoding alone."""
    for text in texts:
        for mark in ("｜DSML｜", "<think>", "</think>", "<｜"):
            assert mark not in (text or ""), (mark, text)
