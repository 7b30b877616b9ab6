"""Every snippet of the documents is run, with the address of the server under test.

Python and JavaScript are executed, `curl` too. Configuration of agents that are not installed here is
read the way they read it, and what they would send with it (`agents`) is sent. Commands that install
or start something are checked for their options only.
"""

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import tempfile
import tomllib
from pathlib import Path

import agents
import node_sdk
from server_process import ServerProcess
from suite import Skipped, require

ROOT = Path(__file__).parents[2]
DOCUMENTS = ["README.md", "crates/server/CLIENTS.md"]
ADDRESS = "http://127.0.0.1:8000"
# Commands whose only part that can be wrong here is their being mentioned at all.
ONLY_NAMED = ("pip install", "npm install", "claude", "codex", "opencode", "cargo run", "cargo xtask")


def client(server):
    """Nothing: a snippet makes its own."""
    return None


def snippets():
    """Pairs of a name (document, line, language) and a check of that snippet."""
    found = []
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        for match in re.finditer(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            language, title, source = match.groups()
            run = RUNNERS.get(language, unknown)
            line = text.count("\n", 0, match.start()) + 1
            name = f"{document}:{line} {title or language}"
            found.append((name, lambda _, server, r=run, s=source, t=title: r(server, s, t)))
    assert len(found) > 10, "the documents have lost their snippets"
    return found


def python(server, source, _):
    """Runs a Python snippet in this process: importing the SDKs anew would take longer than it."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(source.replace(ADDRESS, server.url), "snippet", "exec"), {})  # noqa: S102
    assert output.getvalue().strip(), "a snippet shows what it got"


def javascript(server, source, _):
    """Runs a JavaScript snippet."""
    assert node_sdk.run(server, source.replace(ADDRESS, server.url)).strip()


def shell(server, source, _):
    """Runs `curl`, checks options of `fathom serve`, and replays agents for exported settings."""
    exported = {}
    for command in commands(source):
        words = shlex.split(command, comments=True)
        if not words or command.startswith(ONLY_NAMED):
            continue
        if words[0] == "curl":
            curl(server, command)
        elif words[0] == "export":
            exported.update(word.split("=", 1) for word in words[1:])
        elif words[0] == "fathom":
            options_exist(server, words)
        else:
            raise AssertionError(f"nobody checks `{command}`")
    if exported:
        claude_code(server, exported)


def commands(source):
    """The commands of a snippet, continuation lines and quoted line ends joined."""
    joined, command = source.replace("\\\n", " "), ""
    for line in joined.splitlines():
        command += line
        if command.count("'") % 2 == 0:
            yield command.strip()
            command = ""
        else:
            command += "\n"


def curl(server, command):
    """Runs one `curl`; its answer is JSON, events, or metrics."""
    if shutil.which("curl") is None:
        raise Skipped("no curl")
    command = command.replace("curl ", "curl --silent --show-error --fail-with-body ", 1)
    done = subprocess.run(
        ["bash", "-c", command.replace(ADDRESS, server.url)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if done.stdout.startswith("{"):
        json.loads(done.stdout)
    else:
        assert "data: " in done.stdout or "fathom_" in done.stdout, done.stdout


def options_exist(server, words):
    """Every option of a `fathom` command is one that its help names."""
    shown = subprocess.run(
        [server.program, *words[1:2], "--help"], capture_output=True, text=True, check=True
    ).stdout
    for option in (word for word in words if word.startswith("--")):
        assert re.search(rf"{option}\b", shown), f"`{' '.join(words)}`: no {option}"


def claude_code(server, settings):
    """Sends what Claude Code sends when its environment is `settings`."""
    base = settings["ANTHROPIC_BASE_URL"].replace(ADDRESS, server.url)
    assert base.startswith(server.url), settings
    assert settings.get("ANTHROPIC_AUTH_TOKEN"), "without a token it asks to log in"
    recorded = agents.transcript("claude_code")
    named = [value for name, value in settings.items() if name.endswith("_MODEL")]
    assert named, "a model must be named"
    for model in named:
        body = next(agents.requests(recorded, model=model, max_tokens=4))
        status, text = server.exchange(base.removeprefix(server.url) + recorded["path"], body)
        assert status == 200, text


def settings_json(server, source, title):
    """Settings of Claude Code or of opencode."""
    settings = json.loads(source)
    if "env" in settings:
        return claude_code(server, settings["env"])
    [provider] = settings["provider"].values()
    assert provider["npm"] == "@ai-sdk/openai-compatible", provider
    path = provider["options"]["baseURL"].removeprefix(ADDRESS)
    for model in provider["models"]:
        body = next(agents.requests(agents.transcript("opencode"), model=model, max_tokens=4))
        status, text = server.exchange(f"{path}/chat/completions", body)
        assert status == 200, text
    name, model = settings["model"].split("/", 1)
    assert name in settings["provider"] and model in provider["models"], settings
    return None


def toml(server, source, _):
    """Settings of Codex, or a configuration file of the server itself, which is started with it."""
    settings = tomllib.loads(source)
    if "model_providers" in settings:
        return codex(server, settings)
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        # The checkpoint of an example is not here.
        file.write(re.sub(r"^model = .*$", "", source, flags=re.MULTILINE))
        file.flush()
        with ServerProcess(server.program, ["--config", file.name]) as other:
            assert json.loads(other.get("/ready"))["status"] == "ready"
    return None


def codex(server, settings):
    """Sends what Codex sends with these settings."""
    provider = settings["model_providers"][settings["model_provider"]]
    path = provider["base_url"].removeprefix(ADDRESS)
    wire = provider["wire_api"]
    name, endpoint = {"chat": ("codex_chat", "chat/completions"), "responses": ("codex", "responses")}[wire]
    if wire == "responses":
        require(server, "/v1/responses")
    limit = "max_tokens" if wire == "chat" else "max_output_tokens"
    changes = {"model": settings["model"], limit: 4}
    body = next(agents.requests(agents.transcript(name), **changes))
    status, text = server.exchange(f"{path}/{endpoint}", body)
    assert status == 200, text


def text(*_):
    """Output or a diagram: nothing to run."""


def unknown(*_):
    """A snippet that would go stale unnoticed."""
    raise AssertionError(f"its language is none of {', '.join(RUNNERS)}")


RUNNERS = {
    "bash": shell,
    "sh": shell,
    "python": python,
    "javascript": javascript,
    "json": settings_json,
    "toml": toml,
    "text": text,
}
