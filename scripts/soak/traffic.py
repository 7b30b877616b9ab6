"""Requests with known answers, and a small HTTP client for them.

A request is a path and a body with everything that decides its answer (seed included). `ask` sends it,
streamed or whole, and returns what the model said in one form for both, so that answers can be compared
whatever else the server was doing. Standard library only: a soak test should not wait for its client.
"""

import asyncio
import json
import random

MODEL = "deepseek-v4-flash"
WORDS = "time river stone window paper seven green walk listen under bright market quiet north".split()
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}


class Refused(Exception):
    """The server answered with an error."""

    def __init__(self, status, body):
        super().__init__(f"status {status}: {body[:300]!r}")
        self.status = status


def requests(seed, number):
    """`number` different requests, the same for the same seed."""
    draw = random.Random(seed)
    return [_request(draw, index) for index in range(number)]


def _words(draw, least, most):
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(least, most)))


def _request(draw, index):
    body = {"model": MODEL, "max_tokens": draw.randint(2, 12), "seed": 1000 + index}
    if draw.random() < 0.7:
        body |= {"temperature": draw.choice([0.7, 1.0, 1.5]), "top_p": draw.choice([1, 0.9])}
        if draw.random() < 0.3:
            body |= {"presence_penalty": 1.0, "frequency_penalty": 0.5}
    else:
        body["temperature"] = 0
    kind = draw.random()
    if kind < 0.3:
        return "/v1/completions", body | {"prompt": _words(draw, 1, 30)}
    messages = [{"role": "user", "content": f"{index}: {_words(draw, 1, 20)}"}]
    if kind < 0.5:
        # One of a few long beginnings: what several requests share is cached.
        family = draw.randrange(4)
        beginning = _words(random.Random(family), 70 + 30 * family, 70 + 30 * family)
        messages.insert(0, {"role": "system", "content": beginning})
    elif kind < 0.55:
        call = {"name": "look_up", "arguments": json.dumps({"word": draw.choice(WORDS)})}
        call = {"id": "call_1", "type": "function", "function": call}
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": "call_1", "content": _words(draw, 1, 60)})
        body["tools"] = [TOOL]
    if draw.random() < 0.7:
        body["thinking"] = {"type": "disabled"}
    if draw.random() < 0.1:
        body["n"] = 2
    if draw.random() < 0.1:
        body["stop"] = ["e", "世"]
    return "/v1/chat/completions", body | {"messages": messages}


async def exchange(address, method, path, body=None):
    """Sends a request on a connection of its own. Returns its status, and its body piece by piece."""
    reader, writer = await asyncio.open_connection(*address)
    payload = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    writer.write(head.encode() + payload)
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    status = int(head.split(" ", 2)[1])

    async def pieces():
        try:
            if "transfer-encoding: chunked" not in head:
                yield await reader.read()
                return
            while size := int(await reader.readline(), 16):
                yield (await reader.readexactly(size + 2))[:-2]
        finally:
            writer.close()

    return status, pieces()


async def fetch(address, path):
    """The body of a GET."""
    status, pieces = await exchange(address, "GET", path)
    body = b"".join([piece async for piece in pieces])
    if status != 200:
        raise Refused(status, body)
    return body


async def ask(address, request, streamed=False, leave_after=None):
    """What the model says: one tuple for each choice, and the cached tokens of the prompt. With
    `leave_after`, hangs up after that many pieces of the stream and returns nothing."""
    path, body = request
    if streamed:
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
    status, pieces = await exchange(address, "POST", path, body)
    whole, n_pieces = bytearray(), 0
    async for piece in pieces:
        whole += piece
        n_pieces += 1
        if leave_after is not None and n_pieces > leave_after:
            await pieces.aclose()
            return None
    if status != 200:
        raise Refused(status, bytes(whole))
    if not streamed:
        return _whole(json.loads(whole))
    return _streamed(bytes(whole), body.get("n", 1))


def _usage(usage):
    return usage["completion_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def _whole(answer):
    choices = []
    for choice in answer["choices"]:
        message = choice.get("message", {"content": choice.get("text")})
        calls = [call["function"] for call in message.get("tool_calls") or []]
        calls = tuple((call["name"], call["arguments"]) for call in calls)
        texts = (message.get("reasoning_content") or "", message.get("content") or "")
        choices.append((*texts, calls, choice["finish_reason"]))
    n_tokens, n_cached = _usage(answer["usage"])
    return (tuple(choices), n_tokens), n_cached


def _streamed(text, n):
    drafts = [["", "", [], None] for _ in range(n)]
    usage, ended = None, False
    for event in text.split(b"\n\n"):
        data = event.removeprefix(b"data: ")
        if event.startswith(b":") or not event:
            continue
        if data == b"[DONE]":
            ended = True
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            raise Refused(200, data)
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            draft = drafts[choice["index"]]
            delta = choice.get("delta", {"content": choice.get("text")})
            draft[0] += delta.get("reasoning_content") or ""
            draft[1] += delta.get("content") or ""
            for call in delta.get("tool_calls") or []:
                function = call["function"]
                if function.get("name"):
                    draft[2].append([function["name"], ""])
                draft[2][-1][1] += function.get("arguments") or ""
            draft[3] = choice["finish_reason"] or draft[3]
    if not ended:
        raise Refused(200, b"the stream has no end")
    choices = [(d[0], d[1], tuple((name, text) for name, text in d[2]), d[3]) for d in drafts]
    n_tokens, n_cached = _usage(usage)
    return (tuple(choices), n_tokens), n_cached
