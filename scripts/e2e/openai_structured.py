"""What only constrained decoding can promise, through the openai SDK; and its Responses API.

The embedded model would never say anything of the kind by itself, so a right answer here is the
constraint's work alone. Every check switches itself on with its feature (`suite.require`).
"""

import asyncio
import json
from typing import Literal

import openai
from pydantic import BaseModel

from openai_sdk import HELLO, MODEL, OFF, ON, WEATHER, ask, client
from suite import no_markup, require, usage_holds

__all__ = ["client"]
ROOM = 400


class Verdict(BaseModel):
    """Small enough that noise fills it in within the limit."""

    verdict: Literal["yes", "no"]
    certain: bool


SCHEMA = {
    "type": "object",
    "properties": {"verdict": {"enum": ["yes", "no"]}, "certain": {"type": "boolean"}},
    "required": ["verdict", "certain"],
    "additionalProperties": False,
}
FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "verdict", "schema": SCHEMA, "strict": True},
}
LIGHT = {
    "type": "function",
    "function": {
        "name": "switch_light",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}},
            "required": ["on"],
            "additionalProperties": False,
        },
    },
}


def check_a_schema_is_kept_with_and_without_thinking(client, server):
    require(server, "constrained decoding")
    for thinking in (OFF, {**ON, "thinking_token_budget": 20}):
        answer = ask(client, thinking=thinking, response_format=FORMAT, max_tokens=ROOM)
        choice = answer.choices[0]
        assert choice.finish_reason == "stop", choice
        Verdict.model_validate_json(choice.message.content)
        reasoning = getattr(choice.message, "reasoning_content", None)
        assert (reasoning is not None) == (thinking is not OFF), choice
        usage_holds(answer.usage.model_dump())


def check_parse_returns_the_models_type(client, server):
    require(server, "constrained decoding")
    answer = client.chat.completions.parse(
        model=MODEL, messages=HELLO, response_format=Verdict, max_tokens=ROOM, extra_body=OFF
    )
    assert isinstance(answer.choices[0].message.parsed, Verdict), answer


def check_json_mode_gives_an_object_or_its_beginning(client, server):
    require(server, "constrained decoding")
    question = [{"role": "user", "content": "Answer in JSON."}]
    choice = ask(client, question, response_format={"type": "json_object"}, max_tokens=ROOM).choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict), choice
    else:
        assert choice.finish_reason == "length", choice
        assert choice.message.content.lstrip().startswith("{"), choice


def check_a_schema_streams_what_the_whole_answer_holds(client, server):
    require(server, "constrained decoding")
    options = {"response_format": FORMAT, "max_tokens": ROOM, "seed": 8}
    whole = ask(client, **options).choices[0].message.content
    chunks = ask(client, stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def one_call(answer, name):
    """The arguments of the only call of an answer."""
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls", choice
    [call] = choice.message.tool_calls
    assert call.function.name == name and call.id, call
    no_markup(choice.message.content, call.function.arguments)
    usage_holds(answer.usage.model_dump())
    return json.loads(call.function.arguments)


def check_a_forced_call_has_valid_arguments(client, server):
    require(server, "constrained decoding")
    named = {"type": "function", "function": {"name": "switch_light"}}
    for thinking in (OFF, {**ON, "thinking_token_budget": 20}):
        options = {"thinking": thinking, "max_tokens": ROOM, "parallel_tool_calls": False}
        answer = ask(client, tools=[LIGHT, WEATHER], tool_choice=named, **options)
        assert isinstance(one_call(answer, "switch_light")["on"], bool)
        answer = ask(client, tools=[LIGHT], tool_choice="required", **options)
        assert isinstance(one_call(answer, "switch_light")["on"], bool)


def check_a_forced_call_streams_and_goes_back(client, server):
    require(server, "constrained decoding")
    options = {"tools": [LIGHT], "tool_choice": "required", "max_tokens": ROOM}
    stream = ask(client, stream=True, parallel_tool_calls=False, **options)
    name, call_id, arguments, finish = None, None, "", None
    for chunk in stream:
        choice = chunk.choices[0]
        for call in choice.delta.tool_calls or []:
            assert call.index == 0, call
            name, call_id = name or call.function.name, call_id or call.id
            arguments += call.function.arguments or ""
        finish = choice.finish_reason
    assert (name, finish) == ("switch_light", "tool_calls"), (name, finish)
    assert isinstance(json.loads(arguments)["on"], bool), arguments
    function = {"name": name, "arguments": arguments}
    history = [
        *HELLO,
        {
            "role": "assistant",
            "tool_calls": [{"id": call_id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": call_id, "content": "done"},
    ]
    usage_holds(ask(client, history, tools=[LIGHT]).usage.model_dump())


def check_a_text_is_one_of_the_choices_and_prompts_keep_their_order(client, server):
    require(server, "constrained decoding")
    options = {"model": MODEL, "extra_body": {"structured_outputs": {"choice": ["yes", "no"]}}}
    answer = client.completions.create(prompt=["Is it?", "Is it not?"], n=2, **options)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3], answer
    assert all(choice.text in ("yes", "no") for choice in answer.choices), answer
    alone = client.completions.create(prompt="Is it?", **options).usage.prompt_tokens
    assert answer.usage.prompt_tokens > alone, answer
    texts = ["", ""]
    for chunk in client.completions.create(prompt=["a", "b"], stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert all(text in ("yes", "no") for text in texts), texts


def check_a_cut_call_is_told_by_responses(client, server):
    require(server, "constrained decoding")
    tool = {"type": "function", **LIGHT["function"]}
    options = {"tools": [tool], "tool_choice": "required", "reasoning": {"effort": "none"}}
    # How many tokens a call takes to begin and to end is the model's affair.
    for max_tokens in range(12, 200, 8):
        whole = respond(client, max_output_tokens=max_tokens, **options)
        assert whole.status == "incomplete", whole
        if getattr(whole, "finish_details", None):
            break
    assert whole.finish_details["cut_call"] is True, whole


def check_a_schema_that_cannot_be_enforced_is_422(client, server):
    require(server, "constrained decoding")
    schema = {**SCHEMA, "not": {"type": "null"}}
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    try:
        ask(client, response_format=wrong)
    except openai.UnprocessableEntityError as error:
        assert error.code == "unsupported_schema", error
        return
    raise AssertionError("a schema with `not` was accepted as strict")


def check_unenforceable_requests_are_refused_and_not_ignored(client, server):
    """The other half: as long as nothing can force an answer's form, asking for it is an error."""
    if server.forced_call_status != 422:
        return
    for options in ({"response_format": FORMAT}, {"tools": [LIGHT], "tool_choice": "required"}):
        try:
            ask(client, **options)
        except openai.UnprocessableEntityError as error:
            assert error.code == "unsupported_schema", error
        else:
            raise AssertionError(f"accepted: {options}")


def respond(client, **options):
    """One response of the Responses API."""
    options = {"model": MODEL, "input": "Hello?", "max_output_tokens": 24, **options}
    return client.responses.create(**options)


def response_usage_holds(usage):
    """The identities of the Responses API's usage."""
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens, usage
    assert 0 <= usage.input_tokens_details.cached_tokens < usage.input_tokens, usage
    assert 0 <= usage.output_tokens_details.reasoning_tokens <= usage.output_tokens, usage


def check_responses_whole_and_streamed(client, server):
    require(server, "/v1/responses")
    for effort in ("none", "high"):
        whole = respond(client, reasoning={"effort": effort})
        assert whole.status in ("completed", "incomplete") and whole.output, whole
        response_usage_holds(whole.usage)
        no_markup(whole.output_text)
        text, last, numbers = "", None, []
        for event in respond(client, reasoning={"effort": effort}, stream=True):
            numbers.append(event.sequence_number)
            if event.type == "response.output_text.delta":
                text += event.delta
            last = event
        assert numbers == sorted(set(numbers)), numbers
        assert last.type in ("response.completed", "response.incomplete"), last
        assert last.response.output_text == text, last
        response_usage_holds(last.response.usage)


def check_responses_from_the_asynchronous_client(_, server):
    require(server, "/v1/responses")

    async def one():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as other:
            return await respond(other)

    assert asyncio.run(one()).object == "response"


def check_responses_take_tool_history(client, server):
    require(server, "/v1/responses")
    call = {"type": "function_call", "call_id": "c1", "name": "get_weather"}
    history = [
        {"role": "user", "content": "Weather in Oslo?"},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {**call, "arguments": '{"city": "Oslo"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "4 degrees"},
    ]
    tool = {"type": "function", "strict": False, **WEATHER["function"]}
    answer = respond(client, input=history, tools=[tool], instructions="Be brief.")
    assert answer.output, answer
    response_usage_holds(answer.usage)


def check_responses_refuse_what_needs_state(client, server):
    require(server, "/v1/responses")
    for options in ({"previous_response_id": "resp_1"}, {"background": True}):
        try:
            respond(client, **options)
        except openai.BadRequestError as error:
            assert error.code == "unsupported_parameter", error
        else:
            raise AssertionError(f"accepted: {options}")
