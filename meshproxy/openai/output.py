"""Estimate output tokens that no provider reported: find the text in an event's deltas, and count its tokens.

Only what a model writes counts, once each: content, reasoning, refusals, and the names and arguments of tool calls.
What surrounds it (content filters, logprobs, obfuscation, signatures, citations, a cumulative `message`) doesn't,
whatever its size. Reasoning that a request has hidden can't be seen in the deltas: `hides_reasoning`.
"""

import contextlib
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Raw, Struct
from msgspec.json import Decoder

from meshproxy.openai.usage import decode_members, decode_value

Text = TypeVar("Text", str, bytes)

MAX_SAMPLED_CHARS: Final = 16_384  # of a longer text, this much is sampled
SAMPLES: Final = 64  # of a text that is sampled
MAX_PARTS: Final = 10_000  # of one delta's content; the rest isn't read
# If the number of events is within these factors of the estimate of their text, each is taken for one token.
FEWEST_PIECES, MOST_PIECES = 0.75, 1.6

# An assistant's audio is a token for 50 ms (developers.openai.com/api/docs/guides/realtime-costs).
AUDIO_TOKEN_S: Final = 0.05
# Bytes per second of each `audio.format`. PCM has 24,000 samples of 16 bits (OpenAI's audio guide). The others are
# compressed at a rate that isn't promised: these are the usual rates for speech.
_AUDIO_BYTES_S: Final = {"pcm16": 48_000, "wav": 48_000, "flac": 24_000, "mp3": 16_000, "aac": 16_000, "opus": 4_000}
_BASE64: Final = 3 / 4

# Each match is about one token of OpenAI's o200k_base. Measured on texts of some thousand tokens, estimate by true
# count: English 1.0 to 1.1, German and Finnish 0.8 to 1.0, French, Spanish, Vietnamese and Hebrew 1.0, Polish and
# Turkish 0.9, Russian 0.8 to 1.3, Arabic 0.8 to 1.1, Hindi 1.0, Bengali, Tamil and Thai 0.9, Korean 1.0, Chinese 1.0 to
# 1.4, Japanese 0.9 to 1.1, Python 1.1, JSON, HTML and tables 1.1, LaTeX 0.9, digits 1.0, base64 0.8, emoji 0.9 to 1.2. On
# a sentence each: Georgian, Armenian, Burmese and Telugu 0.8 to 0.9, Khmer 0.7.
_TOKEN: Final = re.compile(
    r"""
      \ ?[A-Z\u00c0-\u00de]?[a-z\u00df-\u00ff\u01a0-\u01b0\u1ea0-\u1ef9]{1,8}
    | \ ?[A-Z]{1,4}
    | [0-9]{1,3}
    | \ ?[!-/:-@\[-`{-~]{1,3}\n*
    | \ ?[\u0100-\u024f\u1e00-\u1eff][a-z\u00df-\u024f\u1e00-\u1eff]{0,3}
    | \ ?[\u0400-\u04ff]{1,5}
    | \ ?[\u0370-\u03ff\u0590-\u05ff]{1,3}
    | \ ?[\u0600-\u06ff]{1,4}
    | \ ?[\u0900-\u0bff]{1,4} | \ ?[\u0c00-\u0dff]{1,3} | [\u0e00-\u0eff]{1,4}
    | \ ?[\u0530-\u058f\u10a0-\u10ff]{1,4} | [\u1000-\u109f]{1,3} | [\u1780-\u17ff]{1,2}
    | \ ?[\uac00-\ud7af]{1,2}
    | [\u3040-\u30ff]{1,2}
    | [ \t\n\r]+(?=\ ) | [ \t\n\r]+
    | .
    """,
    re.VERBOSE | re.DOTALL,
)
_ASTRAL: Final = re.compile("[\U00010000-\U0010ffff]")  # mostly emoji, which are three tokens for two characters

# Members by which a client asks for reasoning that is billed and may not be shown: the path in a request and the value
# that asks for it, or in _HIDING_UNLESS the only value that doesn't. (OpenRouter, "Reasoning Tokens"; OpenAI, "Reasoning
# models": never shown; Groq, "Reasoning"; Anthropic, "OpenAI SDK compatibility" and "Extended thinking"; Gemini API,
# "OpenAI compatibility".)
_HIDING: Final[tuple[tuple[tuple[str, ...], Any], ...]] = (
    (("reasoning", "exclude"), True),
    (("reasoning", "enabled"), True),
    (("include_reasoning",), False),
    (("reasoning_format",), "hidden"),
    (("prompt_mode",), "reasoning"),  # Mistral, "Reasoning"
)
_HIDING_UNLESS: Final[tuple[tuple[tuple[str, ...], Any], ...]] = (
    (("reasoning", "effort"), "none"),
    (("reasoning", "max_tokens"), 0),
    (("reasoning_effort",), "none"),
    (("thinking", "type"), "disabled"),
    (("thinking_config",), {}),
    (("google", "thinking_config"), {}),
    (("extra_body", "google", "thinking_config"), {}),
    (("enable_thinking",), False),  # Alibaba's Model Studio, "Deep thinking", as the next
    (("thinking_budget",), 0),
    (("chat_template_kwargs", "enable_thinking"), False),  # vLLM, "Reasoning Outputs": Qwen's and DeepSeek's templates
    (("chat_template_kwargs", "thinking"), False),
)
_HIDING_MEMBERS: Final = frozenset(path[0] for path, _ in _HIDING + _HIDING_UNLESS)


class _Delta(Struct):
    content: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    reasoning_details: Any = None  # the same in parts (OpenRouter), or alone (MiniMax)
    thinking: Any = None
    refusal: Any = None
    tool_calls: Any = None
    function_call: Any = None
    audio: Any = None


class _Choice(Struct):
    delta: _Delta | None = None  # of an event
    message: _Delta | None = None  # of a whole answer, and a copy in some providers' events
    text: Any = None  # of a legacy completion, and a copy in some providers' events (Together)


class _Chunk(Struct):
    choices: list[_Choice] | None = None


class _Audio(Struct):
    format: str | None = None


_AUDIO: Final = Decoder(_Audio)
_CHUNK: Final = Decoder(_Chunk)  # other members are skipped


class Output(Struct):
    """The output of one event: `texts`, the number of choices they are from (`pieces`), and the audio's base64 length.

    `messages` are the texts of whole messages: a copy, unless the stream has no other text.
    """

    texts: list[str]
    pieces: int = 0
    audio_chars: int = 0
    messages: list[str] = []


def read_output(data: bytes) -> Output:
    """Read the deltas of an event's data. Anything but a chat chunk has no output."""
    output = Output([])
    for choice in _choices(data):
        before = len(output.texts)
        if choice.delta is not None:
            _read_delta(choice.delta, output)
        if choice.text and len(output.texts) == before:
            _read_parts(choice.text, output.texts)
        if choice.message is not None:
            message = Output([])
            _read_delta(choice.message, message)
            output.messages += message.texts
        output.pieces += len(output.texts) > before
    return output


def answer_tokens(body: bytes, requested_audio: str | None) -> tuple[int, int]:
    """Estimate a whole answer's output tokens, and the audio's part. `requested_audio` is the requested format of audio."""
    output = Output([])
    for choice in _choices(body):
        if choice.message is not None:
            _read_delta(choice.message, output)
        elif choice.text:
            _read_parts(choice.text, output.texts)
    audio = audio_tokens(output.audio_chars, requested_audio)
    return sum(map(text_tokens, output.texts)) + audio, audio


def estimate_from_samples(text: Text, sampled: int, estimate: Callable[[Text], int], samples: int = SAMPLES) -> int:
    """Return the estimate for a long text by that for samples of it, `sampled` characters or bytes in all.

    From each of so many equal stretches a sample is taken at a random place: a client that knew it could hide text elsewhere.
    """
    width, stretch = sampled // samples, len(text) / samples
    room = stretch - width
    starts = [int(stretch * at + room * random.random()) for at in range(samples)]  # noqa: S311 - no secret in it
    return sum(estimate(text[start : start + width]) for start in starts) * len(text) // sampled


def text_tokens(text: str) -> int:
    """Estimate the tokens of a text. A long text is sampled."""
    if len(text) > MAX_SAMPLED_CHARS:
        return estimate_from_samples(text, MAX_SAMPLED_CHARS, text_tokens)
    tokens = len(_TOKEN.findall(text))
    return tokens if text.isascii() else tokens + len(_ASTRAL.findall(text)) // 2


def pieces_tokens(raw: bytes, pieces: int) -> int:
    """Estimate the tokens of a text that came in `pieces` pieces. `raw` is the inside of a JSON string.

    A provider that sends one token in each event gives the exact count; the text shows whether it does.
    """
    text = raw.decode(errors="replace")
    if "\\" in text:
        with contextlib.suppress(ValueError):  # a broken escape counts as its characters
            text = json.loads(f'"{text}"', strict=False)
    tokens = text_tokens(text)
    return pieces if tokens * FEWEST_PIECES <= pieces <= tokens * MOST_PIECES else tokens


def audio_tokens(base64_chars: int, audio_format: str | None) -> int:
    """Estimate the tokens of audio by its duration, from the length of its base64."""
    bytes_s = _AUDIO_BYTES_S.get(audio_format or "", _AUDIO_BYTES_S["pcm16"])
    return round(base64_chars * _BASE64 / bytes_s / AUDIO_TOKEN_S)


def audio_format(fields: Mapping[str, bytes | Raw]) -> str | None:
    """Return the format of audio that a request asks for, from its fields' JSON."""
    if "audio" not in fields:
        return None
    try:
        return _AUDIO.decode(fields["audio"]).format
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def hides_reasoning(fields: Mapping[str, bytes | Raw]) -> bool:
    """Return whether a request asks, in its fields' JSON, for reasoning that is billed as output and may not be shown."""
    members = _HIDING_MEMBERS & fields.keys()
    if not members:
        return False
    try:
        requested = {name: msgspec.json.decode(fields[name]) for name in members}
    except (msgspec.DecodeError, RecursionError):
        return True  # nested too deeply to read; the provider may refuse it
    return any(_at(requested, path) == value for path, value in _HIDING) or any(
        _at(requested, path) not in (None, value) for path, value in _HIDING_UNLESS
    )


def escaped(text: str) -> bytes:
    """Return a text as the inside of a JSON string."""
    try:
        return msgspec.json.encode(text)[1:-1]
    except UnicodeEncodeError:  # a lone surrogate
        return msgspec.json.encode(text.encode(errors="replace").decode())[1:-1]


def _at(value: Any, path: Sequence[str]) -> Any:
    """Return the value at a path of members; None if there is none."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _choices(data: bytes) -> list[_Choice]:
    """Decode the choices of an event or an answer; malformed ones are left out."""
    try:
        return _CHUNK.decode(data).choices or []
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    values = decode_value((decode_members(data) or {}).get("choices"))  # reads slightly invalid JSON too
    choices = []
    for value in values if isinstance(values, list) else ():
        with contextlib.suppress(msgspec.ValidationError):
            choices.append(msgspec.convert(value, _Choice))
    return choices


def _read_delta(delta: _Delta, output: Output) -> None:
    """Collect the texts and the audio of a delta."""
    content = delta.content
    if type(content) is str:
        if content:
            output.texts.append(content)
    elif content is not None:
        _read_parts(content, output.texts)
    thoughts = delta.reasoning_content
    if thoughts:
        _read_parts(thoughts, output.texts)
    if delta.reasoning and delta.reasoning != thoughts:  # some providers send the same text under both names
        _read_parts(delta.reasoning, output.texts)
    if not thoughts and not delta.reasoning and (delta.reasoning_details or delta.thinking):
        _read_parts(delta.reasoning_details or delta.thinking, output.texts)
    if delta.refusal:
        _read_parts(delta.refusal, output.texts)
    if delta.tool_calls is not None or delta.function_call is not None:
        _read_calls(delta, output.texts)
    if delta.audio is not None:
        _read_audio(delta.audio, output)


def _read_parts(value: Any, texts: list[str]) -> None:
    """Read a text, or content parts that have texts (Mistral's `text` and `thinking`), at any depth."""
    values = [value]
    for _ in range(MAX_PARTS):
        if not values:
            return
        value = values.pop()
        if isinstance(value, str):
            if value:
                texts.append(value)
        elif isinstance(value, list):
            values += reversed(value)
        elif isinstance(value, dict):
            values += [value[name] for name in ("thinking", "summary", "text") if name in value]


def _read_calls(delta: _Delta, texts: list[str]) -> None:
    """Collect the names and arguments of tool calls."""
    calls = delta.tool_calls if isinstance(delta.tool_calls, list) else []
    functions = [delta.function_call]
    functions += [call.get("function") or call.get("custom") for call in calls if isinstance(call, dict)]
    for function in functions:
        if isinstance(function, dict):
            for name in ("name", "arguments", "input"):  # `input`: of a custom tool
                value = function.get(name)
                if isinstance(value, str):
                    if value:
                        texts.append(value)
                elif value:
                    texts.append(json.dumps(value, ensure_ascii=False))


def _read_audio(audio: Any, output: Output) -> None:
    """Read audio and its transcript, which providers bill as text."""
    if isinstance(audio, dict):
        data, transcript = audio.get("data"), audio.get("transcript")
        if isinstance(data, str):
            output.audio_chars += len(data)
        if isinstance(transcript, str) and transcript:
            output.texts.append(transcript)
