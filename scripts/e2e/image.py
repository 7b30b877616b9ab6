"""What the container image runs beside the server: the command that asks how it is."""

import http.server
import socket
import subprocess
import threading

from dockerfile import FILE, health_command

LIMIT_S = 10


def client(server):
    """Nothing: the command asks by itself."""
    return None


def is_well(port):
    """Whether the image's health command says that what listens on `port` is well."""
    command, environment = health_command(FILE.read_text())
    assert environment["FATHOM_PORT"], "the command asks the port that the server listens on"
    environment = {"PATH": "/usr/bin:/bin", **environment, "FATHOM_PORT": str(port)}
    done = subprocess.run(command, env=environment, timeout=LIMIT_S, capture_output=True)
    return done.returncode == 0


def check_a_server_is_well(_, server):
    assert is_well(server.url.rsplit(":", 1)[1])


def check_nobody_is_not_well(_, server):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert not is_well(unused.getsockname()[1])


def check_an_error_is_not_well(_, server):
    class Failing(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(503 if self.path == "/health" else 200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Failing) as failing:
        thread = threading.Thread(target=failing.serve_forever)
        thread.start()
        try:
            assert not is_well(failing.server_port)
        finally:
            failing.shutdown()
            thread.join()
