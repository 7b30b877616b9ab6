"""The real anthropic SDK, synchronous and asynchronous, and what its `beta` half sends.

The embedded model answers noise, so the checks are about blocks, counts and behaviour. Not here: the
events byte by byte (tests of the server crate).
"""

import asyncio
import json

import anthropic

from suite import no_markup, prompt_tokens, require

MODEL = "deepseek-v4-flash"
OFF = {"type": "disabled"}
ON = {"type": "enabled", "budget_tokens": 16}
HELLO = [{"role": "user", "content": "Hello, who are you?"}]
WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
LIGHT = {
    "name": "switch_light",
    "input_schema": {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    },
    "strict": True,
}


def client(server):
    """The SDK as most programs use it, without retries that would hide an error."""
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60)


def options(**changes):
    """Arguments of a short request that always gets the same answer."""
    greedy = {"temperature": 0}
    fixed = {"model": MODEL, "max_tokens": 24, "messages": HELLO, "thinking": OFF}
    return {**fixed, "extra_body": greedy, **changes}


def ask(client, **changes):
    """One message of the embedded model."""
    return client.messages.create(**options(**changes))


def said(message):
    """Types and texts of all blocks."""
    return [(block.type, getattr(block, "text", None)) for block in message.content]


def refused(kind, status, error_type, call):
    """Checks that `call` raises the SDK's exception `kind` with this envelope."""
    try:
        call()
    except kind as error:
        assert error.status_code == status, error.status_code
        assert error.body["type"] == "error", error.body
        assert error.body["error"]["type"] == error_type, error.body
        assert error.body["error"]["message"] and error.body["request_id"], error.body
        assert error.request_id == error.body["request_id"], error
        return
    raise AssertionError(f"accepted, but {error_type} was expected")


def usage_holds(message):
    """What every usage object keeps."""
    usage = message.usage.model_dump()
    prompt_tokens(usage)
    assert 0 < usage["output_tokens"], usage
    thought = usage["output_tokens_details"]["thinking_tokens"]
    has_thinking = any(block.type == "thinking" for block in message.content)
    assert (0 < thought <= usage["output_tokens"]) if has_thinking else thought == 0, usage


def check_message(client, _):
    message = ask(client)
    assert message.type == "message" and message.role == "assistant", message
    assert message.model == MODEL and message.id.startswith("msg_"), message
    assert [block.type for block in message.content] in (["text"], []), message
    assert message.stop_reason in ("end_turn", "max_tokens"), message
    assert message._request_id, "every response carries an id"
    usage_holds(message)


def check_thinking_blocks_are_signed_and_go_back(client, _):
    message = ask(client, thinking=ON, max_tokens=40)
    first = message.content[0]
    assert first.type == "thinking" and first.signature, message
    no_markup(*(getattr(block, "text", "") for block in message.content))
    usage_holds(message)
    answered = [*HELLO, {"role": "assistant", "content": message.content}]
    again = [*answered, {"role": "user", "content": "Go on."}]
    usage_holds(ask(client, messages=again, thinking=ON))


def check_an_empty_answer_goes_back(client, _):
    """Noise may say nothing at all; the next request then holds an assistant turn without blocks."""
    empty = [*HELLO, {"role": "assistant", "content": []}, {"role": "user", "content": "Go on."}]
    usage_holds(ask(client, messages=empty))


def check_a_stream_is_the_whole_message(client, _):
    for thinking in (OFF, ON):
        whole = ask(client, thinking=thinking) if thinking is OFF else None
        with client.messages.stream(**options(thinking=thinking)) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert text == "".join(b.text for b in final.content if b.type == "text"), final
        usage_holds(final)
        if whole:
            assert said(final) == said(whole), (final, whole)
            assert final.stop_reason == whole.stop_reason, (final, whole)
            assert final.usage.output_tokens == whole.usage.output_tokens, (final, whole)


def check_raw_events_come_in_order(client, _):
    kinds = [event.type for event in ask(client, stream=True, thinking=ON, max_tokens=40)]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"], kinds
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") > 0, kinds


def check_the_asynchronous_client_says_the_same(client, server):
    async def both():
        async with anthropic.AsyncAnthropic(base_url=server.url, auth_token="none") as other:
            whole = await ask(other)
            async with other.messages.stream(**options()) as stream:
                return whole, await stream.get_final_message()

    whole, streamed = asyncio.run(both())
    assert said(whole) == said(streamed) == said(ask(client))


def check_a_count_is_what_the_message_is_charged(client, _):
    for changes in ({}, {"thinking": ON}, {"tools": [WEATHER], "system": "Be brief."}):
        asked = {"model": MODEL, "messages": HELLO, "thinking": OFF, **changes}
        count = client.messages.count_tokens(**asked).input_tokens
        assert count == prompt_tokens(ask(client, max_tokens=2, **changes).usage.model_dump())


def check_a_repeated_prompt_is_cached(client, _):
    text = {"type": "text", "text": "A lazy dog sleeps under the old bridge. " * 50}
    system = [{**text, "cache_control": {"type": "ephemeral"}}]
    first, second = (ask(client, system=system, max_tokens=4) for _ in range(2))
    assert first.usage.cache_read_input_tokens == 0, first.usage
    assert second.usage.cache_read_input_tokens >= 256, second.usage
    assert said(first) == said(second)
    usage_holds(second)


def check_stop_sequences(client, _):
    body = {"temperature": 0, "ignore_eos": True}
    [block] = ask(client, extra_body=body).content
    text = block.text
    windows = [text[at : at + 3] for at in range(len(text) // 3, len(text) - 3)]
    stop = next(window for window in windows if "\ufffd" not in window and window.strip())
    message = ask(client, extra_body=body, stop_sequences=[stop])
    assert message.stop_reason == "stop_sequence" and message.stop_sequence == stop, message
    assert message.content[0].text == text[: text.index(stop)], (text, message)


def check_tool_results_are_accepted(client, _):
    history = [
        {"role": "user", "content": "Weather in Oslo and Rome?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Ask for both.", "signature": "x"},
                {"type": "text", "text": "Let me look."},
                {"type": "tool_use", "id": "a", "name": "get_weather", "input": {"city": "Oslo"}},
                {"type": "tool_use", "id": "b", "name": "get_weather", "input": {"city": "Rome"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "b", "content": "21 degrees"},
                {
                    "type": "tool_result",
                    "tool_use_id": "a",
                    "is_error": True,
                    "content": [{"type": "text", "text": "no such station"}],
                },
            ],
        },
    ]
    for thinking in (OFF, ON):
        message = ask(client, messages=history, tools=[WEATHER], thinking=thinking, max_tokens=40)
        assert message.stop_reason in ("end_turn", "max_tokens", "tool_use"), message
        usage_holds(message)
    unanswered = [*history[:2], {"role": "user", "content": "And?"}]
    refused(
        anthropic.BadRequestError,
        400,
        "invalid_request_error",
        lambda: ask(client, messages=unanswered, tools=[WEATHER]),
    )


def check_errors(client, server):
    invalid, bad = "invalid_request_error", anthropic.BadRequestError
    refused(anthropic.NotFoundError, 404, "not_found_error", lambda: ask(client, model="gpt-0"))
    refused(bad, 400, invalid, lambda: ask(client, max_tokens=0))
    refused(bad, 400, invalid, lambda: ask(client, messages=[]))
    refused(bad, 400, invalid, lambda: ask(client, extra_body={"temperature": 7}))


def check_models_and_names_of_anthropic(client, server):
    page = client.models.list()
    assert page.data[0].type == "model" and not page.has_more, page
    assert client.models.retrieve(page.data[0].id).display_name
    for suffix in ("", "/anthropic"):
        other = client.with_options(base_url=server.url + suffix)
        for name in ("claude-sonnet-4-5", "claude-opus-4-1"):
            assert ask(other, model=name, max_tokens=2).model == name


def check_the_beta_half(client, _):
    beta = {"betas": ["context-management-2025-06-27", "interleaved-thinking-2025-05-14"]}
    changes = {"context_management": {"edits": [{"type": "clear_thinking_20251015"}]}}
    asked = {**options(thinking=ON), **beta, **changes}
    message = client.beta.messages.create(**asked)
    usage_holds(message)
    with client.beta.messages.stream(**asked) as stream:
        usage_holds(stream.get_final_message())


def check_no_markup_leaks_from_noise_with_tools(client, _):
    for variant in range(4):
        asked = {"tools": [WEATHER], "messages": [{"role": "user", "content": f"Try {variant}."}]}
        message = ask(client, thinking=ON, max_tokens=40, **asked)
        for block in message.content:
            no_markup(getattr(block, "text", ""), getattr(block, "thinking", ""))


def check_a_forced_call_has_valid_input(client, server):
    require(server, "constrained decoding")
    alone = {"disable_parallel_tool_use": True}
    for choice in ({"type": "any"}, {"type": "tool", "name": "switch_light"}):
        asked = {"tools": [LIGHT], "tool_choice": {**choice, **alone}, "max_tokens": 400}
        message = ask(client, **asked)
        [call] = [block for block in message.content if block.type == "tool_use"]
        assert message.stop_reason == "tool_use" and call.id.startswith("toolu_"), message
        assert isinstance(call.input["on"], bool), call
        with client.messages.stream(**options(**asked)) as stream:
            final = stream.get_final_message()
        assert [b.type for b in final.content] == [b.type for b in message.content], final
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "done"}
        history = [
            *HELLO,
            {"role": "assistant", "content": message.content},
            {"role": "user", "content": [result]},
        ]
        usage_holds(ask(client, messages=history, tools=[LIGHT]))


def check_a_schema_is_kept(client, server):
    require(server, "constrained decoding")
    schema = {**LIGHT["input_schema"]}
    form = {"format": {"type": "json_schema", "schema": schema}}
    for thinking in (OFF, {"type": "enabled", "budget_tokens": 20}):
        message = ask(client, output_config=form, thinking=thinking, max_tokens=400)
        assert message.stop_reason == "end_turn", message
        assert isinstance(json.loads(message.content[-1].text)["on"], bool), message


def check_a_cut_call_is_told(client, server):
    require(server, "constrained decoding")
    # How many tokens a call takes to begin and to end is the model's affair.
    for max_tokens in range(12, 200, 8):
        asked = {"tools": [LIGHT], "tool_choice": {"type": "any"}, "max_tokens": max_tokens}
        message = ask(client, **asked)
        assert message.stop_reason == "max_tokens" and not message.content, message
        if getattr(message, "finish_details", None):
            break
    assert message.finish_details["cut_call"] is True, message
    with client.messages.stream(**options(**asked)) as stream:
        endings = [event.delta for event in stream if event.type == "message_delta"]
    assert endings[0].finish_details == message.finish_details, endings
