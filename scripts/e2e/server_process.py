"""A `fathom serve` process on a free port, for the end-to-end test.

The server picks the port itself (`--port 0`) and prints its address; nothing here guesses one.
"""

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

    def signal(self, number):
        """Sends a signal."""
        self._process.send_signal(number)

    def wait(self):
        """The exit status, once the process has ended."""
        return self._process.wait(timeout=STOP_S)
