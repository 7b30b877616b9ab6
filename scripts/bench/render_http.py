"""Rendering and tokenising a chat over HTTP: `fathom serve` against vLLM's Rust front end.

Both servers get the same tokenizer and the same chats, in turns, and must answer with the same ids.
`vllm-rs render` answers `/v1/chat/completions/render`; ours answers `/tokenize`. Reported is the CPU
time of the servers' processes per request, medians, and the time a client waits.

Each of our requests has a cache salt of its own, so that nothing is known from the one before; a
last row shows what is known: the same conversation, one turn longer each time.

Not here: making the tokenizer (make_tokenizer.py), installing vLLM's wheel (`cargo xtask bench text`).
"""

import argparse
import http.client
import json
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from pathlib import Path


def conversation(n_bytes: int) -> list[dict]:
    """Questions and answers made of this repository's code, about `n_bytes` in all."""
    root = Path(__file__).resolve().parents[2]
    files = sorted(root.glob("crates/*/src/**/*.rs"))
    text = "".join(path.read_text() for path in files)
    # Spellings of control tokens are the one thing that the two read differently.
    text = text.replace("\uff5c", "|").replace("think>", "thought>")
    messages, at = [{"role": "system", "content": text[:1500]}], 1500
    while sum(len(message["content"]) for message in messages) < n_bytes:
        for role, size in [("user", 600), ("assistant", 2600)]:
            piece = text[at : at + size]
            at = (at + size) % (len(text) - 4000)
            messages.append({"role": role, "content": piece.strip() + " 你好，世界。"})
    messages.append({"role": "user", "content": "Go on."})
    return messages


class Server:
    """A started program, its port and its CPU time."""

    def __init__(self, name: str, command: list[str], port: int, path: str) -> None:
        self.name, self.port, self.path = name, port, path
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)

    def wait(self) -> None:
        """Returns when the server answers."""
        for _ in range(600):
            if self.process.poll() is not None:
                self.log.seek(0)
                raise SystemExit(f"{self.name} stopped: {self.log.read().decode()[-2000:]}")
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.2)
        raise SystemExit(f"{self.name} does not answer")

    def cpu_ms(self) -> float:
        """CPU milliseconds of all its threads so far."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e6

    def post(self, body: dict) -> tuple[list[int], float, float]:
        """The ids, CPU milliseconds of the server, and milliseconds waited."""
        text = json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        cpu, start = self.cpu_ms(), time.perf_counter()
        connection.request("POST", self.path, text, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        waited = (time.perf_counter() - start) * 1e3
        # What a server does after its answer belongs to it as well.
        time.sleep(0.01)
        cpu = self.cpu_ms() - cpu
        if response.status != 200:
            raise SystemExit(f"{self.name} answers {response.status}: {answer[:500]}")
        answer = json.loads(answer)
        return answer.get("tokens") or answer.get("token_ids"), cpu, waited


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def compare(ours: Server, theirs: Server, messages: list[dict], n_runs: int) -> dict:
    """One row: both on the same chat, in turns."""
    seen = {ours.name: [], theirs.name: []}
    n_tokens = 0
    for run in range(n_runs + 1):
        body = {"model": "bench", "messages": messages}
        mine = ours.post(body | {"thinking": {"type": "disabled"}, "cache_salt": f"run {run}"})
        other = theirs.post(body | {"chat_template_kwargs": {"thinking": False}})
        if mine[0] != other[0]:
            raise SystemExit("the two servers give different ids")
        n_tokens = len(mine[0])
        if run > 0:
            seen[ours.name].append(mine[1:])
            seen[theirs.name].append(other[1:])
    row = {"tokens": n_tokens, "bytes": sum(len(m["content"].encode()) for m in messages)}
    for name, runs in seen.items():
        row[name] = {
            "cpu_ms": statistics.median(cpu for cpu, _ in runs),
            "waited_ms": statistics.median(waited for _, waited in runs),
        }
    row["cpu_ratio"] = row[theirs.name]["cpu_ms"] / row[ours.name]["cpu_ms"]
    return row


def growing(ours: Server, messages: list[dict], n_runs: int) -> dict:
    """Our server on a conversation that gets one turn longer with each request."""
    messages, runs = list(messages), []
    for run in range(n_runs + 1):
        body = {"model": "bench", "messages": messages, "thinking": {"type": "disabled"}}
        _, cpu, waited = ours.post(body)
        if run > 0:
            runs.append((cpu, waited))
        messages.append({"role": "assistant", "content": f"Answer {run}. " + "And so on. " * 50})
        messages.append({"role": "user", "content": "Go on."})
    return {
        "cpu_ms": statistics.median(cpu for cpu, _ in runs),
        "waited_ms": statistics.median(waited for _, waited in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("nano", "tokenizer", "fathom", "vllm", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # The demo model's weights know fewer ids, which matters to nobody who only tokenises.
        model = Path(folder) / "bench"
        shutil.copytree(args.nano, model)
        shutil.copy(args.tokenizer, model / "tokenizer.json")
        ports = free_port(), free_port()
        serve = [args.fathom, "serve", "--model", model, "--port", str(ports[0])]
        serve += ["--served-model-name", "bench"]
        render = [args.vllm, "render", model, "--port", str(ports[1])]
        render += ["--served-model-name", "bench"]
        ours = Server("fathom", serve, ports[0], "/tokenize")
        theirs = Server("vllm-rs", render, ports[1], "/v1/chat/completions/render")
        try:
            ours.wait()
            theirs.wait()
            report = {}
            for name, size, n_runs in [("100 KB", 100_000, 30), ("4 MB", 4_000_000, 5)]:
                messages = conversation(size)
                row = compare(ours, theirs, messages, n_runs)
                row["growing"] = growing(ours, messages, n_runs)
                report[name] = row
                print(
                    f"{name} chat, {row['tokens']} tokens: fathom {row['fathom']['cpu_ms']:.1f} ms "
                    f"CPU, vllm-rs {row['vllm-rs']['cpu_ms']:.1f} ms: {row['cpu_ratio']:.1f}x; "
                    f"waited {row['fathom']['waited_ms']:.1f} and "
                    f"{row['vllm-rs']['waited_ms']:.1f} ms; growing by a turn "
                    f"{row['growing']['cpu_ms']:.1f} ms CPU"
                )
            args.out.write_text(json.dumps(report, indent=2))
        finally:
            for server in (ours, theirs):
                server.process.terminate()
                server.process.wait()


if __name__ == "__main__":
    main()
