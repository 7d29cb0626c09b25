"""Estimate a prompt's tokens from the size of its JSON, and shorten a prompt to fit a model's window.

No tokenizer is used: this runs for every request. A token is three bytes of JSON; each message adds four tokens.
Measured against OpenAI's o200k_base, the estimate is 1.3
to 1.6 times the true count for English and code, 1.0 for JSON and digits, 1.6 for Chinese and Japanese, 2.8 for Russian
and Hindi, 0.8 for emoji and, in the worst case, 0.5 for random base64. It only sizes the hold and what is reserved in
the token buckets; settlement corrects it.

Media counts as what it is to a model, in any request shape: it is a long base64 string, or a `data:` URL, as the value
of anything but a text. A client can disguise text as media. Then its hold is too small, by at most the cost of one
request's prompt, and the settlement still charges what the provider reports.

The one transform is OpenRouter's `middle-out` ("Message Transforms" in their documentation): models attend least to
the middle of a long prompt, so that is cut.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from meshproxy.openai.output import estimate_from_samples, text_tokens

BYTES_PER_TOKEN = 3
MAX_SEARCHED_BYTES = 8192  # of longer JSON, this much is searched for escapes
SEARCHED_PLACES = 8  # among which it is divided: each costs 0.3 us
BYTES_OVER_PER_ESCAPE = 3  # an escape of 4 hex digits is 6 bytes of JSON, and at most 3 of UTF-8
TOKENS_PER_MESSAGE = 4  # role and delimiters; OpenAI's cookbook counts 3 and 1 for a name
TOKENS_PER_PROMPT = 3  # every prompt ends with tokens that prime the reply (OpenAI's cookbook, "How to count tokens")
# An image at high detail: 85 + 170 for each 512 px tile (OpenAI's vision guide), 8 tiles at most, and a margin.
TOKENS_PER_MEDIA = 1700

# Base64 characters per token. Audio: 32 tokens a second (Gemini API, "Audio understanding") at 96 kbit/s. Video: 263 a
# second with its sound (Gemini API, "Token counting") at 400 kbit/s. Text: a token per three bytes. Documents: most of
# a PDF is fonts and pictures, not text.
_CHARS_PER_TOKEN: Final = {b"audio": 512, b"video": 256, b"text": 4, b"document": 16}
_TEXTUAL: Final = (b"text/", b"application/json", b"application/xml", b"application/yaml")

# The first base64 characters of known media, for strings without a MIME type: MP3 (with ID3 and without), Ogg, FLAC,
# WAV and WebP (RIFF: counted as audio, the longer of the two), MP4 and QuickTime, WebM. Images are PNG, JPEG and GIF.
_MAGIC: Final = (
    (b"image", (b"iVBORw0KGgo", b"/9j/", b"R0lGOD")),
    (b"audio", (b"SUQz", b"//uQ", b"//sw", b"//vQ", b"T2dnUw", b"ZkxhQ", b"UklGR")),
    (b"video", (b"AAAAIGZ0eX", b"AAAAHGZ0eX", b"AAAAGGZ0eX", b"AAAAFGZ0eX", b"GkXfo")),
)

MIN_MEDIA_CHARS = 1024  # a shorter string costs less as text than as any media
_CONTEXT_CHARS = 160  # before a string, where its key and its kind are looked for

# What precedes a string's opening quote. Inside a text that quote is escaped.
_OPENED_BY: Final = (b":", b"[", b",")
_KEY: Final = re.compile(rb'"([^"]*)"\s*:\s*\Z')
_TEXT_KEYS: Final = frozenset(
    {b"text", b"content", b"arguments", b"reasoning", b"reasoning_content", b"thinking", b"refusal"}
)
_BASE64: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_=\\%"
_MAX_MIME_CHARS = 256
MAX_SAMPLED_BYTES = 65_536  # of longer JSON, this much is sampled
# What frames the texts of messages, between the end of one and the start of the next: names of members, in any order, the
# values of those that say what a message or part is, and brackets. Inside a text every quote is escaped.
_GAP: Final = r"[\s\[\]{},]"
_MEMBER: Final = (
    r'"(?:(?:role|type|id|tool_call_id|call_id)"\s*:\s*"[^"\\]*"|'
    r'(?:content|text|name|arguments|function|tool_calls|cache_control|refusal)"\s*:\s*(?:null|(?=["\[{])))'
)
_FRAMING: Final = re.compile(
    rf'(?:"|(?<!{_GAP})){_GAP}*+{_MEMBER}(?:"?{_GAP}*+{_MEMBER})*{_GAP}*"?|"[\s\]}}]+\Z|\A[\s\[{{]+'
)
_ESCAPE: Final = re.compile(r'\\(?:u([0-9a-fA-F]{4})|(["\\/bfnrt]))')
_ESCAPED: Final = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}  # the others are themselves

# Keys of media that the provider fetches, or that is too short to be found as a long string: each counts as one item of
# media.
_NAMED: Final = re.compile(rb'"(?:(?:image|video|audio|file)_url|input_audio|file_(?:id|uri)|source)"\s*+:')
_MUCH_BYTES = 1_048_576


class Weight(NamedTuple):
    """The weight of a prompt's JSON: the bytes that are text, and the tokens of its media."""

    text_bytes: int
    media_tokens: int


def estimate_prompt(messages: bytes, others: Iterable[bytes], count: int, *, media: bool = True) -> int:
    """Estimate the tokens of `count` messages and of the request's `others`, such as tools, each as JSON.

    `media`: whether the messages may contain media.
    """
    text_bytes, media_tokens = weigh(messages) if media else (len(messages), 0)
    tokens = _text_tokens(messages, text_bytes) + media_tokens + TOKENS_PER_MESSAGE * count
    for other in others:
        text_bytes, media_tokens = weigh(other) if len(other) > MIN_MEDIA_CHARS else (len(other), 0)
        tokens += _text_tokens(other, text_bytes) + media_tokens
    return tokens


def least_tokens(messages: bytes) -> int:
    """Return a lower bound of the tokens of messages: for the decision that a model's window is surely too small.

    0 if they contain media or escapes. o200k_base makes a token of 4 to 5 bytes of English, of 6 of the plainest, and
    of 7 to 9 of Russian or Hindi.
    """
    text_bytes, media_tokens = weigh(messages)
    if media_tokens or b"\\u" in messages:
        return 0
    return text_bytes // (6 if messages.isascii() else 9)


def likely_tokens(messages: bytes, others: Iterable[bytes], count: int) -> int:
    """Estimate the tokens that providers bill for `count` messages without media, and `others`, such as tools, as JSON.

    The result is 0.8 to 1.4 times o200k_base's count. It samples the words, in some milliseconds at most.
    """
    return _message_words(messages) + sum(map(_json_words, others)) + TOKENS_PER_MESSAGE * count + TOKENS_PER_PROMPT


def _message_words(messages: bytes) -> int:
    """Estimate the tokens of the words in messages, without what frames them."""
    if len(messages) > MAX_SAMPLED_BYTES:
        return estimate_from_samples(messages, MAX_SAMPLED_BYTES, _message_words)
    return _text_words(_FRAMING.sub("", messages.decode(errors="ignore")))


def _json_words(json: bytes) -> int:
    """Estimate the tokens of the words in JSON, its names included."""
    if len(json) > MAX_SAMPLED_BYTES:
        return estimate_from_samples(json, MAX_SAMPLED_BYTES, _json_words)
    return _text_words(json.decode(errors="ignore"))


def _text_words(text: str) -> int:
    """Estimate the tokens of text in which characters are escaped as in JSON."""
    return text_tokens(_ESCAPE.sub(_unescaped, text) if "\\" in text else text)


def _unescaped(escape: re.Match[str]) -> str:
    """Return the character of an escape of JSON."""
    code, letter = escape.groups()
    return chr(int(code, 16)) if code else _ESCAPED.get(letter, letter)


def weigh(json: bytes) -> Weight:
    """Find the media in any JSON. Takes linear time on any bytes."""
    inline_bytes = media_tokens = inline = named = passed = 0
    for start, end in _long_strings(json) if len(json) > MIN_MEDIA_CHARS else ():
        tokens = _media_tokens(json, start, end)
        if tokens:
            inline += 1
            inline_bytes += end - start - 1
            media_tokens += tokens
        named += _named(json, passed, start)
        passed = end
    named += _named(json, passed, len(json))
    return Weight(len(json) - inline_bytes, media_tokens + TOKENS_PER_MEDIA * max(named - inline, 0))


def _long_strings(json: bytes) -> Iterator[tuple[int, int]]:
    """Yield the positions of the quotes around each long string.

    It looks for blocks without a quote: every string that is long enough contains one. A long gap between two strings
    is found too, though it is no string; it is never taken for media.
    """
    block, size = MIN_MEDIA_CHARS // 2, len(json)
    at = passed = 0
    while at < size:
        if json.find(b'"', at, at + block) >= 0:
            at += block
            continue
        start, end = json.rfind(b'"', passed, at), json.find(b'"', at + block)
        end = size if end < 0 else end
        if start >= 0 and end - start > MIN_MEDIA_CHARS:
            yield start, end
        at = passed = end


def _named(json: bytes, start: int, end: int) -> int:
    """Count the keys between these positions that name media. In much JSON only `_url` keys count, which is faster."""
    if end - start > _MUCH_BYTES:
        return json.count(b'_url":', start, end)
    return len(_NAMED.findall(json, start, end))


def _media_tokens(json: bytes, start: int, end: int) -> int:
    """Return the tokens of the media in the string between these positions; 0 if it is text."""
    before = json[max(start - _CONTEXT_CHARS, 0) : start]
    if not before.rstrip().endswith(_OPENED_BY):
        return 0
    key = _KEY.search(before)
    if key is not None and key[1] in _TEXT_KEYS:
        return 0
    kind = b""
    begin = start + 1
    if json[begin : begin + 5].lower() == b"data:":  # in either case (RFC 3986, section 3.1)
        comma = json.find(b",", begin, begin + _MAX_MIME_CHARS)
        mime = json[begin + 5 : max(comma, begin + 5)].replace(b"\\/", b"/").lower()
        if not mime.endswith(b";base64"):
            return 0
        begin = comma + 1
        kind = b"text" if mime.startswith(_TEXTUAL) else mime.partition(b"/")[0]
    if json[begin:end].translate(None, _BASE64):
        return 0
    kind = kind or _kind_of(before, json[begin : begin + 16])
    if kind == b"image":
        return TOKENS_PER_MEDIA
    tokens = (end - begin) // _CHARS_PER_TOKEN.get(kind, _CHARS_PER_TOKEN[b"document"])
    return max(tokens, TOKENS_PER_MEDIA) if kind in {b"audio", b"video"} else max(tokens, 1)


def _kind_of(before: bytes, head: bytes) -> bytes:
    """Return the kind of base64 without a MIME type, by what precedes it or by its first characters."""
    kinds = [(before.rfind(kind), kind) for kind in (b"image", b"audio", b"video") if kind in before]
    if kinds:
        return max(kinds)[1]
    if b'"text/' in before:
        return b"text"
    return next((kind for kind, heads in _MAGIC if head.startswith(heads)), b"document")


def _text_tokens(json: bytes, text_bytes: int) -> int:
    """Estimate the tokens of text. Escapes lower the result by half at most, since text may only look escaped."""
    if b"\\" in json and (escapes := _escapes(json)):
        text_bytes = max(text_bytes - BYTES_OVER_PER_ESCAPE * escapes, text_bytes // 2)
    return -(-text_bytes // BYTES_PER_TOKEN)


def _escapes(json: bytes) -> int:
    """Count the escapes of 4 hex digits. In much JSON they are sampled: to search all of it takes longer than to decode it."""
    if len(json) > MAX_SEARCHED_BYTES:
        return estimate_from_samples(json, MAX_SEARCHED_BYTES, _escapes, SEARCHED_PLACES)
    if json.rfind(b"\\u") < 0:  # takes a quarter of count()'s time
        return 0
    return json.count(b"\\u") - json.count(b"\\\\u")  # a backslash that is escaped begins none


CUT = "\n[...]\n"  # marks where text was taken out

Message = dict[str, Any]


class Scale(NamedTuple):
    """How messages and texts are measured. Sizes are additive: a message shrinks by as much as its text."""

    message: Callable[[Message], int]
    text: Callable[[str], int]


def message_bytes(message: Message) -> int:
    """Return a message's size: its JSON and a comma, where media and framing count by their tokens."""
    own_bytes, media_tokens = weigh(msgspec.json.encode(message))
    return own_bytes + 1 + (media_tokens + TOKENS_PER_MESSAGE) * BYTES_PER_TOKEN


def text_bytes(text: str) -> int:
    """Return the bytes of a text in JSON."""
    return len(msgspec.json.encode(text)) - 2


JSON_BYTES = Scale(message_bytes, text_bytes)


def middle_out(messages: Sequence[Message], budget_tokens: int) -> list[Message]:
    """Return the messages shortened to `budget_tokens`, as `estimate_prompt` counts them; see `fitted`."""
    return fitted(messages, budget_tokens * BYTES_PER_TOKEN - 1, JSON_BYTES)  # 1: the array's brackets, less one comma


def fitted(messages: Sequence[Message], budget: int, scale: Scale) -> list[Message]:
    """Return the messages shortened to a budget on a scale.

    System messages, the first and the last message stay. Messages are dropped from the middle outwards, a tool's answer
    together with its call. If that isn't enough, the longest texts lose their middle.

    Images and the like can't be cut, so the result may still exceed the budget; then the provider refuses it. Apart
    from sorting, the time is linear in the size of the messages: each text is measured a fixed number of times.
    """
    sizes = [scale.message(message) for message in messages]
    dropped = _middle(messages, sizes, budget)
    kept = [index for index in range(len(messages)) if index not in dropped]
    excess = sum(sizes[index] for index in kept) - budget
    shortened: dict[int, Message] = {}
    for index in sorted(kept, key=sizes.__getitem__, reverse=True):
        if excess <= 0:
            break
        shortened[index], saved = _shortened(messages[index], excess, scale.text)
        excess -= saved
    return [shortened.get(index, messages[index]) for index in kept]


def _middle(messages: Sequence[Message], sizes: Sequence[int], budget_tokens: int) -> set[int]:
    """Return the indices to drop, from the middle outwards.

    Units are dropped until the rest fits or only the first and last are left.
    """
    units = _units(messages)
    excess = sum(sizes) - budget_tokens
    dropped: set[int] = set()
    for unit in _outwards(units[1:-1]):
        if excess <= 0:
            break
        dropped.update(unit)
        excess -= sum(sizes[index] for index in unit)
    return dropped


def _units(messages: Iterable[Message]) -> list[list[int]]:
    """Return the indices of messages that belong together: a call and its tools' answers. System messages are left out."""
    units: list[list[int]] = []
    for index, message in enumerate(messages):
        role = message.get("role")
        if role in {"system", "developer"}:
            continue
        if role in {"tool", "function"} and units:
            units[-1].append(index)
        else:
            units.append([index])
    return units


def _outwards(units: Sequence[list[int]]) -> Iterable[list[int]]:
    """Return the units from the middle to both sides in turn, the earlier side first."""
    order = sorted(range(len(units)), key=lambda at: abs(2 * at - len(units) + 1))
    return (units[at] for at in order)


def _shortened(message: Message, excess: int, size: Callable[[str], int]) -> tuple[Message, int]:
    """Cut a message's longest texts until it is smaller by `excess` or no text is left; return it and the size saved."""
    content = message.get("content")
    if isinstance(content, str):
        text, saved = _cut(content, excess, size)
        return {**message, "content": text}, saved
    if not isinstance(content, list):
        return message, 0
    parts = list(content)
    texts = [index for index, part in enumerate(parts) if isinstance(part, dict) and isinstance(part.get("text"), str)]
    total = 0
    for index in sorted(texts, key=lambda at: len(parts[at]["text"]), reverse=True):
        if total >= excess:
            break
        text, saved = _cut(parts[index]["text"], excess - total, size)
        parts[index] = {**parts[index], "text": text}
        total += saved
    return {**message, "content": parts}, total


def _cut(text: str, excess: int, size: Callable[[str], int]) -> tuple[str, int]:
    """Return a text without its middle, smaller by at least `excess` if possible, and the size saved."""
    if len(text) <= len(CUT):
        return text, 0
    whole = size(text)
    kept, kept_size = _ends(text, whole - excess - size(CUT), size)
    cut = text[: kept - kept // 2] + CUT + text[len(text) - kept // 2 :]
    return cut, whole - kept_size - size(CUT)


def _ends(text: str, room: int, size: Callable[[str], int]) -> tuple[int, int]:
    """Return how many characters, half from the start and half from the end, fit into `room`, and their size.

    Found by bisection. Each step measures only the text it adds, so all steps together measure the text once.
    """
    fits, fits_size = 0, 0
    too_many = min(len(text), max(room, 0) + 1)  # no character is smaller than 1
    while too_many - fits > 1:
        kept = (fits + too_many) // 2
        start = text[fits - fits // 2 : kept - kept // 2]
        end = text[len(text) - kept // 2 : len(text) - fits // 2]
        kept_size = fits_size + size(start) + size(end)
        if kept_size <= room:
            fits, fits_size = kept, kept_size
        else:
            too_many = kept
    return fits, fits_size
