"""LangChain's DeepSeek integration: what a chain needs works with nothing but the address changed."""

import asyncio

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_deepseek import ChatDeepSeek
from pydantic import BaseModel

from suite import no_markup, require

OFF = {"thinking": {"type": "disabled"}}


class Light(BaseModel):
    """Whether the light is on."""

    on: bool


@tool
def get_weather(city: str) -> str:
    """Weather of a city."""
    return f"4 degrees in {city}"


def client(server):
    """Names the model `deepseek-chat`, as every example does."""
    return model(server, extra_body=OFF)


def model(server, **options):
    """A chat model of this server."""
    fixed = {"model": "deepseek-chat", "api_key": "none", "max_retries": 0, "stream_usage": True}
    return ChatDeepSeek(api_base=server.url + "/v1", **fixed, **{"max_tokens": 24, **options})


def usage_holds(message):
    """LangChain's own form of the usage adds up."""
    usage = message.usage_metadata
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > 0, message


def check_invoke(client, _):
    message = client.invoke("Hello?")
    assert isinstance(message, AIMessage) and isinstance(message.content, str), message
    assert message.response_metadata["finish_reason"] in ("stop", "length"), message
    usage_holds(message)


def check_stream_adds_up(client, _):
    whole = client.invoke("Hello?", seed=5)
    streamed = None
    for chunk in client.stream("Hello?", seed=5):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed.content == whole.content, (streamed, whole)
    usage_holds(streamed)


def check_asynchronous(client, _):
    assert isinstance(asyncio.run(client.ainvoke("Hello?")), AIMessage)


def check_reasoning_is_found(_, server):
    thinker = model(server, extra_body={"thinking": {"type": "enabled"}})
    message = thinker.invoke("Hello?")
    reasoning = message.additional_kwargs["reasoning_content"]
    assert reasoning, message
    no_markup(reasoning, message.content)
    pieces = [c.additional_kwargs.get("reasoning_content", "") for c in thinker.stream("Hello?")]
    assert "".join(pieces), pieces


def check_tools_and_their_results(client, _):
    call = {"name": "get_weather", "args": {"city": "Oslo"}, "id": "c1", "type": "tool_call"}
    history = [
        HumanMessage("Weather in Oslo?"),
        AIMessage("", tool_calls=[call]),
        ToolMessage("4 degrees", tool_call_id="c1"),
    ]
    message = client.bind_tools([get_weather]).invoke(history)
    assert isinstance(message, AIMessage), message
    usage_holds(message)


def check_structured_output(_, server):
    require(server, "constrained decoding")
    roomy = model(server, extra_body=OFF, max_tokens=400)
    for method in ("function_calling", "json_schema"):
        structured = roomy.with_structured_output(Light, method=method)
        assert isinstance(structured.invoke("Is it dark?"), Light), method
