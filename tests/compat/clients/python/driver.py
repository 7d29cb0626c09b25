"""A client written in Python, driven by lines of JSON: `python driver.py NAME`. See ../README.md for the lines."""

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

Ask = dict[str, Any]
Said = dict[str, Any]
GET_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def no_retries(ask: Ask, name: str = "max_retries") -> dict[str, int]:
    """The option that switches a client's retries off, unless its default is wanted."""
    return {} if ask["retries"] else {name: 0}


class OpenAIPython:
    """`openai`, synchronous."""

    def __init__(self, ask: Ask) -> None:
        from openai import OpenAI

        self._client = OpenAI(base_url=ask["base_url"], api_key=ask["key"], **no_retries(ask))
        self._usual = {"model": ask["model"], "messages": [{"role": "user", "content": ask["words"]}]}

    def whole(self) -> Said:
        completion = self._client.chat.completions.create(**self._usual)
        return {"text": completion.choices[0].message.content, "total": completion.usage.total_tokens}

    def stream(self) -> Iterator[Said]:
        stream = self._client.chat.completions.create(
            **self._usual, stream=True, stream_options={"include_usage": True}
        )
        with stream:
            for chunk in stream:
                if chunk.usage:
                    yield {"total": chunk.usage.total_tokens}
                for choice in chunk.choices:
                    yield {"text": choice.delta.content or ""}

    def tools(self) -> Said:
        completion = self._client.chat.completions.create(**self._usual, tools=[GET_WEATHER])
        (call,) = completion.choices[0].message.tool_calls
        return {"name": call.function.name, "arguments": json.loads(call.function.arguments)}

    @staticmethod
    def error(error: Any) -> Said:
        return {"status": getattr(error, "status_code", None), "code": error.code, "message": str(error)}


class LangChain:
    """`langchain-openai`."""

    def __init__(self, ask: Ask) -> None:
        from langchain_openai import ChatOpenAI

        self._words = ask["words"]
        self._chat = ChatOpenAI(
            model=ask["model"], base_url=ask["base_url"], api_key=ask["key"], stream_usage=True, **no_retries(ask)
        )

    def whole(self) -> Said:
        answer = self._chat.invoke(self._words)
        return {"text": answer.content, "total": answer.usage_metadata["total_tokens"]}

    def stream(self) -> Iterator[Said]:
        for chunk in self._chat.stream(self._words):
            yield {"text": chunk.content}
            if chunk.usage_metadata:
                yield {"total": chunk.usage_metadata["total_tokens"]}

    def tools(self) -> Said:
        (call,) = self._chat.bind_tools([GET_WEATHER]).invoke(self._words).tool_calls
        return {"name": call["name"], "arguments": call["args"]}

    error = staticmethod(OpenAIPython.error)


class LiteLLM:
    """`litellm.completion`, with the gateway as an OpenAI-compatible provider."""

    def __init__(self, ask: Ask) -> None:
        os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it fetches a list from the internet
        import litellm

        litellm.suppress_debug_info = True
        self._litellm = litellm
        self._usual = {
            "model": f"openai/{ask['model']}",
            "messages": [{"role": "user", "content": ask["words"]}],
            "api_base": ask["base_url"],
            "api_key": ask["key"],
            **no_retries(ask),
        }

    def whole(self) -> Said:
        completion = self._litellm.completion(**self._usual)
        return {"text": completion.choices[0].message.content, "total": completion.usage.total_tokens}

    def stream(self) -> Iterator[Said]:
        stream = self._litellm.completion(**self._usual, stream=True, stream_options={"include_usage": True})
        try:
            for chunk in stream:
                yield {"text": chunk.choices[0].delta.content or "" if chunk.choices else ""}
                if getattr(chunk, "usage", None):
                    yield {"total": chunk.usage.total_tokens}
        finally:
            if stream.completion_stream is not None:  # it is, once it broke
                stream.completion_stream.close()

    def tools(self) -> Said:
        completion = self._litellm.completion(**self._usual, tools=[GET_WEATHER])
        (call,) = completion.choices[0].message.tool_calls
        return {"name": call.function.name, "arguments": json.loads(call.function.arguments)}

    @staticmethod
    def error(error: Any) -> Said:
        return {
            "status": getattr(error, "status_code", None),
            "code": getattr(error, "code", None),
            "message": str(error),
        }


class Mesh:
    """`meshapi`, Mesh's own: its base URL has no /v1."""

    def __init__(self, ask: Ask) -> None:
        from meshapi import ChatCompletionParams, ChatMessage, MeshAPI, Tool

        base_url = ask["base_url"].removesuffix("/v1")
        self._client = MeshAPI(base_url=base_url, token=ask["key"], **no_retries(ask))
        self._tool = Tool.model_validate(GET_WEATHER)
        messages = [ChatMessage(role="user", content=ask["words"])]
        self._asked = ChatCompletionParams(model=ask["model"], messages=messages)

    def whole(self) -> Said:
        reply = self._client.chat.completions.create(self._asked)
        return {"text": reply.choices[0].message.content, "total": reply.usage.total_tokens}

    def stream(self) -> Iterator[Said]:
        for chunk in self._client.chat.completions.stream(self._asked):
            for choice in chunk.choices:
                yield {"text": choice.delta.content or ""}
            if chunk.usage:
                yield {"total": chunk.usage.total_tokens}

    def tools(self) -> Said:
        reply = self._client.chat.completions.create(self._asked.model_copy(update={"tools": [self._tool]}))
        (call,) = reply.choices[0].message.tool_calls
        return {"name": call.function.name, "arguments": json.loads(call.function.arguments)}

    @staticmethod
    def error(error: Any) -> Said:
        return {"status": error.status or None, "code": error.error_code, "message": str(error)}


class PydanticAI:
    """`pydantic-ai`: an agent."""

    def __init__(self, ask: Ask) -> None:
        from openai import AsyncOpenAI
        from pydantic_ai import Agent
        from pydantic_ai.models.openai import OpenAIChatModel
        from pydantic_ai.providers.openai import OpenAIProvider

        client = AsyncOpenAI(base_url=ask["base_url"], api_key=ask["key"], **no_retries(ask))
        model = OpenAIChatModel(ask["model"], provider=OpenAIProvider(openai_client=client))
        self._agent = Agent(model)
        self._words = ask["words"]

    def whole(self) -> Said:
        result = self._agent.run_sync(self._words)
        return {"text": result.output, "total": _usage(result)}

    def stream(self) -> Iterator[Said]:
        """What came, then what went wrong: the stream belongs to one task, so it is read at once."""
        parts: list[Said] = []
        try:
            asyncio.run(self._read(parts))
        finally:
            yield from parts

    def hang_up(self) -> Said:
        parts: list[Said] = []
        asyncio.run(self._read(parts, leave=True))
        return parts[0]

    async def _read(self, parts: list[Said], *, leave: bool = False) -> None:
        async with self._agent.run_stream(self._words) as result:
            async for text in result.stream_text(delta=True, debounce_by=None):
                parts.append({"text": text})
                if leave:
                    return
            parts.append({"total": _usage(result)})

    def tools(self) -> Said:
        seen: list[Said] = []

        def get_weather(city: str) -> str:
            """The weather in a city."""
            seen.append({"name": "get_weather", "arguments": {"city": city}})
            return "rain"

        self._agent.tool_plain(get_weather)
        self._agent.run_sync(self._words)
        (call,) = seen
        return call

    @staticmethod
    def error(error: Any) -> Said:
        body = getattr(error, "body", None) or {}
        return {"status": getattr(error, "status_code", None), "code": body.get("code"), "message": str(error)}


def _usage(result: Any) -> int:
    usage = result.usage() if callable(result.usage) else result.usage
    return usage.total_tokens


CLIENTS = {
    "openai": OpenAIPython,
    "langchain": LangChain,
    "litellm": LiteLLM,
    "meshapi": Mesh,
    "pydantic-ai": PydanticAI,
}


def answer(client: Any, action: str) -> Said:
    """What the client saw; of a stream what it saw until it broke, if it did."""
    if action != "stream":
        return getattr(client, action)()
    said: Said = {"text": "", "total": None}
    try:
        for part in client.stream():
            said = {"text": said["text"] + part.get("text", ""), "total": part.get("total", said["total"])}
    except Exception as error:  # noqa: BLE001 - whatever a client raises is what is looked at
        return {**said, "error": client.error(error)}
    return said


def hang_up(client: Any) -> Said:
    """Read the first words, then leave."""
    if hasattr(client, "hang_up"):
        return client.hang_up()
    stream = client.stream()
    for part in stream:
        if part.get("text"):
            break
    stream.close()
    return {"text": part["text"]}


def main() -> None:
    kind = CLIENTS[sys.argv[1]]
    for line in sys.stdin:
        ask = json.loads(line)
        client = kind(ask)
        try:
            said = hang_up(client) if ask["do"] == "hang_up" else answer(client, ask["do"])
        except Exception as error:  # noqa: BLE001 - the same
            said = {"error": kind.error(error)}
        print(json.dumps(said), flush=True)


main()
