"""The real openai SDK, synchronous and asynchronous.

The embedded model answers noise, so the checks are about shape, counts and behaviour, never about
what a sentence means. Not here: the wire format byte by byte (tests of the server crate), structured
output and `/v1/responses` (`openai_structured`).
"""

import asyncio
import json
import signal
import urllib.request

import openai

from server_process import ServerProcess
from suite import no_markup, usage_holds

MODEL = "deepseek-v4-flash"
OFF = {"thinking": {"type": "disabled"}}
ON = {"thinking": {"type": "enabled"}}
HELLO = [{"role": "user", "content": "Hello, who are you?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


def client(server):
    """The SDK as most programs use it, without retries that would hide an error."""
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60)


def ask(client, messages=HELLO, thinking=OFF, **options):
    """One chat completion of the embedded model."""
    options = {"model": MODEL, "max_tokens": 24, **options}
    return client.chat.completions.create(messages=messages, extra_body=thinking, **options)


def refused(kind, status, code, param, call):
    """Checks that `call` raises the SDK's exception `kind` with this envelope."""
    try:
        call()
    except kind as error:
        assert error.status_code == status, error.status_code
        assert error.code == code, (error.code, code)
        assert error.param == param, (error.param, param)
        assert error.message, "an error needs a message"
        return
    raise AssertionError(f"accepted, but {code} was expected")


def check_models(client, _):
    listed = client.models.list().data
    assert len(listed) == 1 and listed[0].object == "model", listed
    assert client.models.retrieve(listed[0].id).id == listed[0].id
    refused(openai.NotFoundError, 404, "model_not_found", "model", lambda: client.models.retrieve("x"))


def check_chat(client, _):
    answer = ask(client)
    choice = answer.choices[0]
    assert answer.object == "chat.completion" and answer.model == MODEL, answer
    assert answer.id.startswith("chatcmpl-") and answer.system_fingerprint.startswith("fp_"), answer
    assert choice.message.role == "assistant" and isinstance(choice.message.content, str), choice
    assert getattr(choice.message, "reasoning_content", None) is None, choice
    assert choice.finish_reason in ("stop", "length"), choice
    usage_holds(answer.usage.model_dump(), reasoning=False)


def check_length_counts_every_token(client, _):
    body = {**OFF, "ignore_eos": True}
    answer = ask(client, thinking=body, max_tokens=17)
    assert answer.choices[0].finish_reason == "length", answer
    assert answer.usage.completion_tokens == 17, answer.usage


def check_thinking(client, _):
    answer = ask(client, thinking=ON, max_tokens=32)
    message = answer.choices[0].message
    assert isinstance(message.reasoning_content, str) and isinstance(message.content, str), message
    assert "</think>" not in message.reasoning_content + message.content, message
    usage_holds(answer.usage.model_dump())


def check_legacy_names_set_the_thinking_default(client, _):
    for model, thinks in (("deepseek-reasoner", True), ("deepseek-chat", False)):
        answer = ask(client, thinking={}, model=model)
        reasoning = getattr(answer.choices[0].message, "reasoning_content", None)
        assert (reasoning is not None) == thinks, (model, answer)
        assert answer.model == model, answer.model


def collect(stream):
    """Concatenated deltas, the finish reason and the usage of a stream, checking its order."""
    text = {"content": "", "reasoning_content": ""}
    finish, usage, ids = None, None, set()
    for chunk in stream:
        ids.add(chunk.id)
        assert chunk.object == "chat.completion.chunk", chunk
        if not chunk.choices:
            usage = chunk.usage
            continue
        choice = chunk.choices[0]
        assert finish is None, "a delta came after the finish reason"
        for field in text:
            text[field] += getattr(choice.delta, field, None) or ""
        if getattr(choice.delta, "reasoning_content", None):
            assert not text["content"], "reasoning came after content"
        finish = choice.finish_reason
    assert len(ids) == 1, ids
    return text, finish, usage


def check_stream_equals_the_whole_answer(client, _):
    for thinking in (OFF, ON):
        options = {"thinking": thinking, "temperature": 0.7, "seed": 11, "max_tokens": 40}
        whole = ask(client, **options)
        stream = ask(client, stream=True, stream_options={"include_usage": True}, **options)
        text, finish, usage = collect(stream)
        message = whole.choices[0].message
        assert text["content"] == message.content, (text, message)
        assert text["reasoning_content"] == (getattr(message, "reasoning_content", None) or "")
        assert finish == whole.choices[0].finish_reason, (finish, whole)
        usage_holds(usage.model_dump())
        assert usage.completion_tokens == whole.usage.completion_tokens, usage


def check_usage_can_be_on_every_chunk(client, _):
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = []
    for chunk in ask(client, stream=True, stream_options=options, max_tokens=8):
        assert chunk.usage.total_tokens == chunk.usage.prompt_tokens + chunk.usage.completion_tokens
        counts.append(chunk.usage.completion_tokens)
    assert counts == sorted(counts) and counts[-1] >= 1, counts


def check_stream_without_usage_option_has_none(client, _):
    _, finish, usage = collect(ask(client, stream=True, max_tokens=8))
    assert finish in ("stop", "length") and usage is None, (finish, usage)


def check_temperature_zero_and_seed_repeat(client, _):
    for options in ({"temperature": 0}, {"temperature": 1.0, "seed": 3}):
        first, second = (ask(client, **options).choices[0].message.content for _ in range(2))
        assert first == second, (options, first, second)


def check_stop_string_is_cut(client, _):
    body = {**OFF, "ignore_eos": True}
    whole = ask(client, thinking=body, temperature=0).choices[0].message.content
    windows = [whole[at : at + 3] for at in range(len(whole) // 3, len(whole) - 3)]
    stop = next(window for window in windows if "\ufffd" not in window)
    answer = ask(client, thinking=body, temperature=0, stop=[stop])
    assert answer.choices[0].message.content == whole[: whole.index(stop)], (whole, stop, answer)
    assert answer.choices[0].finish_reason == "stop", answer


def check_several_choices(client, _):
    answer = ask(client, n=3, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2], answer
    alone = ask(client, seed=5).choices[0].message.content
    assert answer.choices[0].message.content == alone, "choice 0 is not the n = 1 answer"


def check_tool_history_is_accepted(client, _):
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Hangzhou"}'},
    }
    history = [
        {"role": "user", "content": "Weather in Hangzhou?"},
        {"role": "assistant", "content": None, "reasoning_content": "Ask.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "24 degrees"},
    ]
    for thinking in (OFF, ON):
        answer = ask(client, history, thinking, tools=[WEATHER])
        assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls"), answer
        usage_holds(answer.usage.model_dump())
    unanswered = [*history[:2], {"role": "user", "content": "And?"}]
    refused(
        openai.BadRequestError,
        400,
        "invalid_message_sequence",
        "messages[1]",
        lambda: ask(client, unanswered, tools=[WEATHER]),
    )


def check_a_repeated_prompt_is_cached(client, _):
    long = [{"role": "user", "content": "The quick brown fox jumps over the lazy dog. " * 40}]
    first, second = (ask(client, long, temperature=0) for _ in range(2))
    assert first.usage.prompt_tokens > 600, first.usage
    assert second.usage.prompt_tokens_details.cached_tokens >= 256, second.usage
    assert second.choices[0].message.content == first.choices[0].message.content
    usage_holds(second.usage.model_dump())


def check_the_sdks_own_message_goes_back(client, _):
    answer = ask(client, thinking=ON)
    again = [*HELLO, answer.choices[0].message, {"role": "user", "content": "Go on."}]
    assert ask(client, again).usage.prompt_tokens > answer.usage.prompt_tokens


def check_unknown_model(client, _):
    refused(
        openai.NotFoundError, 404, "model_not_found", "model", lambda: ask(client, model="no-such")
    )


def check_bad_parameters(client, _):
    for code, param, options in (
        ("decimal_above_max_value", "temperature", {"temperature": 2.5}),
        ("integer_below_min_value", "max_tokens", {"max_tokens": 0}),
        ("empty_array", "messages", {"messages": []}),
        ("conflicting_parameters", "stream_options", {"stream_options": {"include_usage": True}}),
    ):
        refused(openai.BadRequestError, 400, code, param, lambda: ask(client, **options))


def check_base_urls_with_and_without_v1(client, server):
    for suffix in ("", "/v1", "/beta"):
        other = client.with_options(base_url=server.url + suffix)
        assert ask(other, max_tokens=2).choices, suffix


async def one_stream(client, index):
    """Reads a stream to its end, or drops every third one midway; returns what happened."""
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": f"Question {index}: " + "why? " * (index % 7)}],
        max_tokens=48 + index,
        stream=True,
        extra_body={**(OFF if index % 2 else ON), "ignore_eos": True},
    )
    n_deltas = 0
    async for chunk in stream:
        n_deltas += bool(chunk.choices)
        if index % 3 == 0 and n_deltas == 8:
            await stream.close()
            return "dropped"
        if chunk.choices and chunk.choices[0].finish_reason:
            finish = chunk.choices[0].finish_reason
    return finish


def check_fifty_streams_with_a_third_dropped(_, server):
    async def all_streams():
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none") as client:
            return await asyncio.gather(*(one_stream(client, index) for index in range(50)))

    ends = asyncio.run(all_streams())
    assert ends.count("dropped") == 17, ends
    assert ends.count("length") == 33, ends
    server.wait_until_idle()
    assert json.loads(server.get("/health"))["status"] == "ok"
    assert server.metric("fathom_requests_cancelled_total") >= 17
    assert server.metric("fathom_completion_tokens_total") > 33 * 48


def check_the_asynchronous_client_says_the_same(client, server):
    async def both():
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as other:
            whole = await ask(other, seed=4)
            stream = await ask(other, seed=4, stream=True)
            text = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return whole.choices[0].message.content, "".join(text)

    whole, streamed = asyncio.run(both())
    assert whole == streamed == ask(client, seed=4).choices[0].message.content


def check_the_stream_helper_puts_a_completion_together(client, _):
    options = {"messages": HELLO, "model": MODEL, "max_tokens": 24, "seed": 9, "extra_body": OFF}
    with client.chat.completions.stream(**options) as stream:
        kinds = {event.type for event in stream}
        try:
            final = stream.get_final_completion()
        except openai.LengthFinishReasonError as cut:
            final = cut.completion
    assert {"chunk", "content.delta", "content.done"} <= kinds, kinds
    whole = client.chat.completions.create(**options)
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason


def check_logprobs_belong_to_the_text(client, _):
    answer = ask(client, logprobs=True, top_logprobs=3, temperature=0)
    entries = answer.choices[0].logprobs.content
    bytes_ = b"".join(bytes(entry.bytes) for entry in entries)
    assert bytes_.decode(errors="replace") == answer.choices[0].message.content, answer
    for entry in entries:
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True), entry
        assert entry.logprob <= 0, entry


def check_text_completions_and_their_streams(client, _):
    options = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 12, "seed": 3}
    whole = client.completions.create(**options)
    assert whole.object == "text_completion" and whole.usage.completion_tokens <= 12, whole
    stream = client.completions.create(stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    echoed = client.completions.create(echo=True, **options)
    assert echoed.choices[0].text == options["prompt"] + whole.choices[0].text
    filled = client.completions.create(**options, suffix="the end.")
    assert filled.usage.prompt_tokens > whole.usage.prompt_tokens, filled


def check_raw_responses_carry_the_request_id(client, _):
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=2,
        extra_body=OFF,
        extra_headers={"X-Request-Id": "my-own-id"},
    )
    assert raw.headers["x-request-id"] == "my-own-id", raw.headers
    assert int(raw.headers["openai-processing-ms"]) >= 0, raw.headers
    assert raw.parse()._request_id == "my-own-id"


def check_a_client_that_times_out_leaves_nothing_running(client, server):
    hasty = client.with_options(timeout=0.3)
    try:
        ask(hasty, thinking={**OFF, "ignore_eos": True}, max_tokens=20_000)
    except openai.APITimeoutError:
        server.wait_until_idle()
        return
    raise AssertionError("20,000 tokens within 0.3 s")


def check_no_markup_leaks_from_noise_with_tools(client, _):
    for seed in range(4):
        answer = ask(client, thinking=ON, tools=[WEATHER], seed=seed, max_tokens=40)
        message = answer.choices[0].message
        no_markup(message.content, message.reasoning_content)
        for call in message.tool_calls or []:
            assert call.function.name == WEATHER["function"]["name"], call
            assert isinstance(json.loads(call.function.arguments), dict), call


def check_ready_and_health(_, server):
    assert json.loads(server.get("/ready"))["status"] == "ready"
    assert json.loads(server.get("/health"))["status"] == "ok"


def check_curl_line_of_the_start_up_print(_, server):
    line = server.curl_line()
    start = line.index("'{")
    body = line[start + 1 : line.rindex("'")]
    request = urllib.request.Request(
        server.url + "/v1/chat/completions",
        body.encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        assert json.loads(response.read())["choices"], "no choices"


def check_api_key(_, server):
    with ServerProcess(server.program, ["--api-key", "secret-key"]) as locked:
        good = openai.OpenAI(base_url=locked.url, api_key="secret-key", max_retries=0)
        assert ask(good, max_tokens=2).choices
        bad = good.with_options(api_key="wrong")
        refused(openai.AuthenticationError, 401, "invalid_api_key", None, lambda: ask(bad))


def check_two_ranks_give_the_same_answer(client, server):
    answers = set()
    for size in ("1", "2"):
        flags = ["--numerics", "f32", "--tensor-parallel-size", size]
        with ServerProcess(server.program, flags) as ranks:
            other = client.with_options(base_url=ranks.url)
            answers.add(ask(other, temperature=0, max_tokens=12).choices[0].message.content)
    assert len(answers) == 1, answers


def check_a_stream_survives_the_drain(_, server):
    """Stops its own server while a stream runs: the stream ends normally, so does the process."""
    with ServerProcess(server.program, []) as stopping:
        client = openai.OpenAI(base_url=stopping.url, api_key="none", max_retries=0)
        stream = ask(client, thinking={**OFF, "ignore_eos": True}, max_tokens=200, stream=True)
        first = next(iter(stream))
        assert first.choices, first
        stopping.signal(signal.SIGTERM)
        _, finish, _ = collect(stream)
        assert finish == "length", finish
        assert stopping.wait() == 0, "the server did not exit cleanly"
