"""What SDKs do when the server has no room: they are told to come back, and do so.

The server of this suite runs one sequence, lets one wait, and gives one key one request at a time.
The rooms are taken by streams that are open until a check closes them, so nothing depends on time.
"""

import contextlib
import signal
import tempfile
import threading

import anthropic
import openai

from openai_sdk import HELLO, MODEL, OFF
from server_process import ServerProcess

CONFIG = """
[server]
drain_s = 0
[limits]
queue_len = 1
[engine]
max_num_seqs = 1
[[keys]]
key = "narrow"
max_concurrency = 1
[[keys]]
key = "wide"
"""
ENDLESS = {"max_tokens": 3000, "stream": True}


def client(server):
    """A narrow server, started by the first check and stopped by the last."""
    return Narrow(server.program)


class Narrow:
    """A server with room for one, and clients of it."""

    def __init__(self, program):
        self.program = program

    @contextlib.contextmanager
    def start(self):
        """Runs the server."""
        with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
            file.write(CONFIG)
            file.flush()
            with ServerProcess(self.program, ["--config", file.name]) as server:
                yield server


def openai_client(server, key, max_retries):
    """The openai SDK with a key of this server."""
    return openai.OpenAI(base_url=server.url, api_key=key, max_retries=max_retries, timeout=30)


def anthropic_client(server, key, max_retries):
    """The anthropic SDK with a key of this server."""
    return anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=max_retries, timeout=30)


def short(client):
    """A short answer through either SDK."""
    if isinstance(client, openai.OpenAI):
        return client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=2, extra_body=OFF
        )
    return client.messages.create(model=MODEL, messages=HELLO, max_tokens=2, extra_body=OFF)


@contextlib.contextmanager
def occupied(server, key, n):
    """`n` streams that go on until the block ends."""
    holder = openai_client(server, key, 0)
    endless = {"messages": HELLO, "extra_body": {**OFF, "ignore_eos": True}, **ENDLESS}
    streams = [holder.chat.completions.create(model=MODEL, **endless) for _ in range(n)]
    server.wait_for("fathom_requests_in_flight", lambda in_flight: in_flight == n)
    try:
        yield streams
    finally:
        for stream in streams:
            stream.close()


def statuses(server, status):
    """How many requests ended with a status."""
    lines = server.get("/metrics").decode().splitlines()
    counted = [line for line in lines if line.startswith("fathom_requests_total{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in counted if f'status="{status}"' in line)


def served_after_retry(server, status, occupy, clients):
    """Every client is refused with `status` while there is no room, and served when there is."""
    answers = []
    threads = [
        threading.Thread(target=lambda c=client: answers.append(short(c))) for client in clients
    ]
    before = {code: statuses(server, code) for code in status}
    with occupy:
        for thread in threads:
            thread.start()
        for code in status:
            while statuses(server, code) == before[code]:
                assert any(thread.is_alive() for thread in threads), f"no {code} was counted"
    for thread in threads:
        thread.join(30)
    assert len(answers) == len(clients), answers


def raised(kind, status, code, client):
    """Checks the exception of a client that does not retry."""
    try:
        short(client)
    except kind as error:
        assert error.status_code == status, error
        assert int(error.response.headers["retry-after"]) >= 1, error.response.headers
        assert getattr(error, "code", None) in (code, None), error
        return
    raise AssertionError(f"served, but {status} was expected")


def check_refusals_for_now_are_retried_and_others_are_not(narrow, _):
    with narrow.start() as server:
        with occupied(server, "narrow", 1):
            code = "concurrency_limit_exceeded"
            raised(openai.RateLimitError, 429, code, openai_client(server, "narrow", 0))
            raised(anthropic.RateLimitError, 429, code, anthropic_client(server, "narrow", 0))
        server.wait_until_idle()
        with occupied(server, "wide", 2):
            code = "queue_full"
            raised(openai.InternalServerError, 503, code, openai_client(server, "wide", 0))
            raised(anthropic.APIStatusError, 529, code, anthropic_client(server, "wide", 0))
        server.wait_until_idle()

        patient = openai_client(server, "narrow", 4)
        served_after_retry(server, [429], occupied(server, "narrow", 1), [patient])
        server.wait_until_idle()
        both = [openai_client(server, "wide", 4), anthropic_client(server, "wide", 4)]
        served_after_retry(server, [503, 529], occupied(server, "wide", 2), both)
        server.wait_until_idle()

        eager = openai_client(server, "wide", 4)
        try:
            eager.chat.completions.create(model=MODEL, messages=[], extra_body=OFF)
        except openai.BadRequestError:
            assert statuses(server, 400) == 1, "a bad request was sent again"

        # What cannot be saved: the server stops, and does not wait.
        endless = {"messages": HELLO, "extra_body": {**OFF, "ignore_eos": True}, **ENDLESS}
        running = openai_client(server, "wide", 4).chat.completions.create(model=MODEL, **endless)
        assert next(iter(running)).choices, "the stream runs"
        waiting = anthropic_client(server, "wide", 4).messages.create(model=MODEL, **endless)
        server.signal(signal.SIGTERM)
        for stream, kind in ((running, openai.APIError), (waiting, anthropic.APIError)):
            try:
                for _event in stream:
                    pass
            except kind as error:
                assert "shutting down" in str(error), error
            else:
                raise AssertionError("a stream that was cut ended as if it were whole")
        assert server.wait() == 0, "the server did not exit cleanly"
