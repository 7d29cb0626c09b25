"""Each provider's dialect, to the byte where a gateway depends on it."""

import json
from typing import Any

import pytest

from meshproxy.simulator.dialects import DIALECTS

HELLO = [{"role": "user", "content": "Hello there"}]  # 6 tokens of prompt
ASKED = {"stream": True, "stream_options": {"include_usage": True}}
SEED = 7


async def post(http, dialect: str, **fields: Any) -> tuple[int, bytes]:
    seed = {} if DIALECTS[dialect].accepted_fields else {"seed": SEED}
    body = {"model": f"sim/dialect-{dialect}+fast?tokens=24", "messages": HELLO, **seed, **fields}
    async with http.post("/v1/chat/completions", json=body) as answer:
        return answer.status, await answer.read()


async def stream(http, dialect: str, **fields: Any) -> list[Any]:
    """The events of a stream but [DONE], which asks for its usage wherever that isn't refused."""
    options = (
        ASKED if "stream_options" in (DIALECTS[dialect].accepted_fields or {"stream_options"}) else {"stream": True}
    )
    status, body = await post(http, dialect, **options, **fields)
    assert status == 200
    told = [text.removeprefix("data: ") for text in body.decode().split("\n") if text.startswith("data: ")]
    assert told.pop() == "[DONE]"
    return [json.loads(text) for text in told]


async def whole(http, dialect: str, **fields: Any) -> Any:
    status, body = await post(http, dialect, **fields)
    assert status == 200, body
    return json.loads(body)


def reported(events: list[Any]) -> Any:
    """The last report of a stream, wherever it is."""
    places = [
        place
        for event in events
        for place in (event, event.get("x_groq", {}), *event["choices"])
        if isinstance(place.get("usage"), dict)
    ]
    return places[-1]["usage"]


def text_of(events: list[Any]) -> str:
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


@pytest.mark.parametrize("dialect", [name for name, dialect in DIALECTS.items() if dialect.accepted_fields is None])
async def test_a_stream_says_what_a_whole_answer_says(http, dialect):
    answer = await whole(http, dialect)
    assert text_of(await stream(http, dialect)) == answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_stream_reports_what_a_whole_answer_reports(http, dialect):
    answer = await whole(http, dialect)
    assert reported(await stream(http, dialect)) == answer["usage"]


USAGE = {  # of 24 tokens, and of 24 thoughts where it thinks
    "azure": {"prompt_tokens": 6, "completion_tokens": 24, "total_tokens": 30},
    "anthropic": {"prompt_tokens": 2, "total_tokens": 26, "prompt_tokens_details": {"cached_tokens": 4}},
    "gemini": {"prompt_tokens": 6, "completion_tokens": 24, "total_tokens": 54},
    "xai": {"completion_tokens": 24, "total_tokens": 54, "cost_in_usd_ticks": 6 * 10_000 + 48 * 40_000},
    "deepseek": {"completion_tokens": 48, "prompt_cache_hit_tokens": 4, "prompt_cache_miss_tokens": 2},
    "perplexity": {"prompt_tokens": 6, "total_tokens": 30, "citation_tokens": 300, "reasoning_tokens": 0},
    "openrouter": {"completion_tokens": 48, "cost": (6 * 10_000 + 48 * 40_000) / 10**10},
    "mistral": {"prompt_tokens": 6, "completion_tokens": 24, "total_tokens": 30},
    "ollama": {"prompt_tokens": 6, "completion_tokens": 48, "total_tokens": 54},
}


@pytest.mark.parametrize("dialect", USAGE)
async def test_usage(http, dialect):
    usage = (await whole(http, dialect))["usage"]
    assert {name: usage[name] for name in USAGE[dialect]} == USAGE[dialect]


PLACES = {  # where a stream that asks has its reports: paths to them in its events, from the first to the last
    "azure": ["usage"],
    "gemini": ["usage"] * 4,  # the role, two of a dozen tokens, the end
    "groq": ["x_groq", "usage"],
    "mistral": ["usage"],
    "moonshot": ["choices"],
    "xai": ["usage"],
}


@pytest.mark.parametrize("dialect", PLACES)
async def test_where_a_stream_reports(http, dialect):
    places = []
    for event in await stream(http, dialect):
        places += ["usage"] if isinstance(event.get("usage"), dict) else []
        places += ["x_groq"] if "x_groq" in event else []
        places += ["choices" for choice in event["choices"] if "usage" in choice]
    assert places == PLACES[dialect]


async def test_azure_begins_with_filter_results_and_no_choices(http):
    first = (await stream(http, "azure"))[0]
    assert (first["choices"], first["prompt_filter_results"][0]["prompt_index"]) == ([], 0)


async def test_azure_has_filter_results_beside_each_text(http):
    choices = [event["choices"][0] for event in await stream(http, "azure") if event["choices"]]
    assert all("content_filter_results" in choice for choice in choices if choice["delta"].get("content"))


async def test_openais_obfuscation_differs_in_length(http):
    lengths = {len(event["obfuscation"]) for event in await stream(http, "openai") if "obfuscation" in event}
    assert len(lengths) > 5


async def test_perplexity_says_the_message_so_far(http):
    choices = [event["choices"][0] for event in await stream(http, "perplexity")]
    messages = [choice["message"]["content"] for choice in choices if "message" in choice]
    assert messages[-1] == "".join(choice["delta"].get("content") or "" for choice in choices)


async def test_openrouter_says_each_thought_twice(http):
    deltas = [event["choices"][0]["delta"] for event in await stream(http, "openrouter") if event["choices"]]
    thoughts = [delta for delta in deltas if "reasoning" in delta]
    assert [delta["reasoning"] for delta in thoughts] == [delta["reasoning_details"][0]["text"] for delta in thoughts]


@pytest.mark.parametrize("dialect", ["gemini", "xai"])
async def test_hidden_thoughts_are_hidden(http, dialect):
    assert "reasoning" not in json.dumps([event["choices"] for event in await stream(http, dialect)])


async def test_what_comes_before_an_answer(http):
    _, streamed = await post(http, "deepseek", stream=True)
    _, unstreamed = await post(http, "deepseek")
    assert (streamed.startswith(b": keep-alive\n\n"), unstreamed.startswith(b"\n\n{")) == (True, True)


@pytest.mark.parametrize(
    "dialect, cap, made",
    [("ollama", "max_completion_tokens", 48), ("ollama", "max_tokens", 5), ("vllm", "max_completion_tokens", 5)],
)
async def test_a_cap_is_read_under_the_dialects_names(http, dialect, cap, made):
    answer = await whole(http, dialect, **{cap: 5})
    assert answer["usage"]["completion_tokens"] == made


@pytest.mark.parametrize(
    "dialect, field, status",
    [
        ("mistral", {"max_completion_tokens": 5}, 422),
        ("mistral", ASKED, 422),
        ("groq", {"logprobs": True}, 400),
        ("azure", {"anything": 1}, 200),
    ],
)
async def test_a_field_is_refused(http, dialect, field, status):
    body = {"model": f"sim/dialect-{dialect}+fast", "messages": HELLO, **field}
    async with http.post("/v1/chat/completions", json=body) as answer:
        assert answer.status == status


ERRORS = [
    ("azure", "filter", 400, ["error", "innererror", "code"], "ResponsibleAIPolicyViolation"),
    ("gemini", "context", 400, [0, "error", "status"], "INVALID_ARGUMENT"),
    ("xai", "context", 400, ["code"], "Client specified an invalid argument"),
    ("mistral", "quota", 402, ["message"], "Payment required"),
    ("openrouter", "filter", 403, ["error", "metadata", "reasons"], ["violence"]),
    ("vllm", "context", 400, ["code"], 400),
    ("tgi", "context", 422, ["error_type"], "validation"),
    ("llamacpp", "context", 400, ["error", "n_ctx"], 8192),
    ("ollama", "context", 400, ["error", "code"], None),
    ("moonshot", "key", 401, ["error", "code"], "invalid_api_key"),
]


@pytest.mark.parametrize("dialect, kind, status, path, value", ERRORS)
async def test_errors(http, dialect, kind, status, path, value):
    body = {"model": f"sim/dialect-{dialect}+error-{kind}", "messages": HELLO}
    async with http.post("/v1/chat/completions", json=body) as answer:
        found = json.loads(await answer.read())
    for step in path:
        found = found[step]
    assert (answer.status, found) == (status, value)


BILLS = {  # prompt, of it cached, and all that was made
    "azure": (6, 0, 24),
    "gemini": (6, 0, 48),
    "anthropic": (6, 4, 24),
    "perplexity": (306, 0, 24),
}


@pytest.mark.parametrize("dialect", BILLS)
@pytest.mark.parametrize("fields", [{}, {"stream": True}], ids=["whole", "stream"])
async def test_the_bill(http, simulator, dialect, fields):
    await post(http, dialect, **fields)
    (entry,) = simulator.history.requests
    assert tuple(entry.billed.values()) == BILLS[dialect]
