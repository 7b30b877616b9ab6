"""Recorded sessions of coding agents, replayed turn by turn against the real model.

A transcript (`crates/server/tests/transcripts`) holds what an agent sends: path, headers, body and,
per turn, the messages it adds. The answers in it are the recorded ones; what the embedded model says
instead is noise, and is held to what holds for any answer: a whole stream, usage that adds up,
nothing of the encoding shown, and more of the prompt found in the cache turn by turn. The same
transcripts are replayed against a scripted model, with answers checked, by the server's own tests.
"""

import json
from pathlib import Path

from suite import no_markup, prompt_tokens, require, usage_holds

TRANSCRIPTS = Path(__file__).parents[2] / "crates" / "server" / "tests" / "transcripts"
BLOCK = 256
ANSWER = 12
# Of all tools, so many: what they are described with is most of the prompt, and the model on the CPU
# reads a thousand tokens a second when built for tests.
TOOLS = 4


def client(server):
    """Nothing: agents are replayed without an SDK."""
    return None


def transcript(name):
    """A transcript by its name."""
    return json.loads((TRANSCRIPTS / f"{name}.json").read_text())


def requests(recorded, **changes):
    """The bodies of a transcript, one per turn, each with all messages so far."""
    messages, body = [], recorded["body"]
    body = {**body, "tools": body["tools"][:TOOLS]}
    for turn in recorded["turns"]:
        messages = [*messages, *turn]
        yield {**body, recorded["list"]: messages, **changes}


def events(stream):
    """The JSON of every event of a stream, `[DONE]` and comments left out."""
    lines = [line for line in stream.splitlines() if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def replay(server, recorded, **changes):
    """Sends every turn, with the agent's own headers; yields the streams."""
    for body in requests(recorded, **changes):
        status, text = server.exchange(recorded["path"], body, recorded["headers"])
        assert status == 200, text
        yield text


def grows(sizes):
    """Asserts that each turn finds what the turn before had in its prompt, but for one block."""
    for (before, _), (_, cached) in zip(sizes, sizes[1:]):
        assert cached > before - 2 * BLOCK, sizes


def check_messages_as_claude_code_sends_them(_, server):
    recorded, sizes = transcript("claude_code"), []
    for text in replay(server, recorded, max_tokens=ANSWER):
        seen = events(text)
        assert [seen[0]["type"], seen[-1]["type"]] == ["message_start", "message_stop"], text
        assert seen[0]["message"]["model"] == recorded["body"]["model"], seen[0]
        for event in seen:
            no_markup(*(event.get("delta") or {}).values())
        usage = seen[-2]["usage"]
        sizes.append((prompt_tokens(usage), usage["cache_read_input_tokens"]))
    grows(sizes)
    for body in requests(recorded):
        asked = {key: body[key] for key in ("model", "messages", "system", "tools", "thinking")}
        status, count = server.post("/v1/messages/count_tokens?beta=true", asked)
        assert (status, count["input_tokens"]) == (200, sizes.pop(0)[0]), count


def check_chat_as_opencode_sends_it(_, server):
    sizes = []
    for text in replay(server, transcript("opencode"), max_tokens=ANSWER):
        assert text.endswith("data: [DONE]\n\n"), text
        *chunks, last = events(text)
        for chunk in chunks:
            delta = chunk["choices"][0]["delta"]
            no_markup(delta.get("content"), delta.get("reasoning_content"))
        assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length", "tool_calls"), chunks[-1]
        usage_holds(last["usage"])
        sizes.append((last["usage"]["prompt_tokens"], last["usage"]["prompt_cache_hit_tokens"]))
    grows(sizes)


def check_responses_as_codex_sends_them(_, server):
    require(server, "/v1/responses")
    sizes = []
    for text in replay(server, transcript("codex"), max_output_tokens=ANSWER):
        last = events(text)[-1]
        assert last["type"] in ("response.completed", "response.incomplete"), text
        for event in events(text):
            if event["type"].endswith(".delta"):
                no_markup(event["delta"])
        usage = last["response"]["usage"]
        sizes.append((usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]))
    grows(sizes)
