"""A `fathom serve` process on a free port, for the end-to-end test.

The server picks the port itself (`--port 0`) and prints its address; nothing here guesses one.
Requests here are plain HTTP, without any SDK in between.
"""

import functools
import json
import re
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

START_S = 60
STOP_S = 60


class ServerProcess:
    """Started on entering, stopped on leaving the context."""

    def __init__(self, program, flags):
        self.program = program
        self.flags = flags
        self.url = ""
        self._output = tempfile.NamedTemporaryFile()
        self._process = None

    def __enter__(self):
        # One thread: the tiny model gains little from more, and on a busy machine each of its many
        # short parallel sections would wait for a thread to be scheduled.
        command = [self.program, "serve", "--host", "127.0.0.1", "--port", "0", "--threads", "1"]
        command += self.flags
        self._process = subprocess.Popen(
            command, stdout=self._output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        deadline = time.monotonic() + START_S
        while not self._ready():
            if self._process.poll() is not None:
                raise RuntimeError(f"`{' '.join(command)}` ended at once:\n{self.log()}")
            if time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError(f"not ready after {START_S} s:\n{self.log()}")
            time.sleep(0.02)
        return self

    def _ready(self):
        address = re.search(r"http://127\.0\.0\.1:\d+", self.log())
        if address is None:
            return False
        self.url = address.group()
        try:
            self.get("/ready")
        except urllib.error.URLError:
            return False
        return True

    def __exit__(self, *_):
        if self._process.poll() is None:
            self.signal(signal.SIGTERM)
        try:
            self.wait()
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def log(self):
        """Everything the server printed so far."""
        # Through its name: a seek on the server's own file would move where the server writes.
        return Path(self._output.name).read_text(errors="replace")

    def curl_line(self):
        """The line that start-up prints for trying the server out, continuation lines joined."""
        log = self.log().replace("\\\n", " ")
        return next(line for line in log.splitlines() if line.strip().startswith("curl "))

    def get(self, path):
        """Body of a GET; raises unless its status is 2xx."""
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return response.read()

    def post(self, path, body, headers=None):
        """Status and JSON of a POST, whatever the status."""
        status, reply = self.exchange(path, body, headers)
        return status, json.loads(reply)

    def exchange(self, path, body, headers=None):
        """Status and text of a POST, whatever the status."""
        headers = {"Content-Type": "application/json", **(headers or {})}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name):
        """Sum of all samples of a metric."""
        lines = self.get("/metrics").decode().splitlines()
        samples = [line for line in lines if line.startswith((name + " ", name + "{"))]
        assert samples, f"/metrics has no {name}"
        return sum(float(line.rsplit(" ", 1)[1]) for line in samples)

    def wait_for(self, name, condition):
        """Waits until a metric's value satisfies `condition`; returns the value."""
        deadline = time.monotonic() + 10
        while not condition(value := self.metric(name)):
            assert time.monotonic() < deadline, f"{name} stays {value}"
            time.sleep(0.01)
        return value

    def wait_until_idle(self):
        """Waits until no request is in flight."""
        self.wait_for("fathom_requests_in_flight", lambda n: n == 0)

    @functools.cached_property
    def forced_call_status(self):
        """What a forced tool call is answered with: 422 as long as nothing can force one."""
        tool = {"type": "function", "function": {"name": "f"}}
        body = {"messages": [{"role": "user", "content": "f"}], "tools": [tool], "max_tokens": 1}
        forced = {"model": "deepseek-v4-flash", "tool_choice": "required", **body}
        return self.post("/v1/chat/completions", forced)[0]

    @functools.cached_property
    def responses_status(self):
        """What `/v1/responses` answers: 404 as long as it is not there."""
        body = {"model": "deepseek-v4-flash", "input": "Hi", "max_output_tokens": 1}
        return self.post("/v1/responses", body)[0]

    def pid(self):
        """The process's number."""
        return self._process.pid

    def signal(self, number):
        """Sends a signal."""
        self._process.send_signal(number)

    def wait(self):
        """The exit status, once the process has ended."""
        return self._process.wait(timeout=STOP_S)
