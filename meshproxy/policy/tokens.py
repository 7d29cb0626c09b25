"""How many tokens a prompt is likely to have, from the size of its JSON. No tokenizer: this is on every request's path.

A token per three bytes of JSON, and four for each message. Against OpenAI's o200k_base that was measured as 1.3 to 1.6 times the
truth for English and code, 1.0 for JSON and digits, 1.6 for Chinese and Japanese, 2.8 for Russian and Hindi, 0.8 for emoji and,
the worst there is, 0.5 for random base64. Settlement makes it right: the estimate only sizes the hold and what is taken from
the token buckets.
"""

import re
from collections.abc import Iterator

BYTES_PER_TOKEN = 3
BYTES_OVER_PER_ESCAPE = 3  # an escape of 4 hex digits is 6 bytes of JSON, and 3 at most of UTF-8
TOKENS_PER_MESSAGE = 4  # role and delimiters; OpenAI's cookbook counts 3 and 1 for a name
TOKENS_PER_MEDIA = (
    1700  # an image at high detail: 85 + 170 for each 512 px tile (OpenAI's vision guide), 8 tiles at most, and spare
)
BYTES_PER_FILE_TOKEN = 16  # of a base64 document: most of a PDF is fonts and pictures, not text

# Keys of content parts, quotes included: inside a string the quotes would be escaped, so no text can pass for media.
_MEDIA = (b'"image_url"', b'"input_audio"', b'"file"')
_DATA_URL = re.compile(rb'"url"\s*+:\s*+"(data:[a-z\\/+.-]++[^"]{0,64}?;base64,[A-Za-z0-9+\\/=_-]*+)"')
_AUDIO = re.compile(rb'"input_audio"\s*+:\s*+\{[^{}]*?"data"\s*+:\s*+"([A-Za-z0-9+\\/=_-]*+)"')
_FILE = re.compile(rb'"file_data"\s*+:\s*+"((?:data:[a-z\\/+.-]++;base64,)?[A-Za-z0-9+\\/=_-]*+)"')
_IMAGE_PART = re.compile(rb'"image_url"\s*+:')


def estimate_prompt(messages: bytes, tools: bytes | None, count: int, *, media: bool | None = None) -> int:
    """Tokens of `count` messages and of tools, each as JSON. Images, audio and files are counted as what they are to a model,
    not as the text of their base64. `media`: whether there are any, if the caller knows.
    """
    size = len(messages) + (len(memoryview(tools)) if tools is not None else 0)
    if has_media(messages) if media is None else media:
        return _with_media(messages, size, count)
    return _text(messages, size) + TOKENS_PER_MESSAGE * count


def has_media(messages: bytes) -> bool:
    """Whether there may be parts whose tokens their bytes don't bound: images, audio, files. May be true of mere text."""
    return any(messages.rfind(name) >= 0 for name in _MEDIA)  # rfind is the cheapest search that bytes have


def _with_media(messages: bytes, size: int, count: int) -> int:
    images = len(_IMAGE_PART.findall(messages))
    inline = sum(_lengths(_DATA_URL, messages))
    sounds = list(_lengths(_AUDIO, messages))
    files = list(_lengths(_FILE, messages))
    text = size - inline - sum(sounds) - sum(files)
    media = TOKENS_PER_MEDIA * (images + len(sounds)) + sum(length // BYTES_PER_FILE_TOKEN for length in files)
    return _text(messages, text) + TOKENS_PER_MESSAGE * count + media


def _lengths(pattern: re.Pattern[bytes], messages: bytes) -> Iterator[int]:
    return (match.end(1) - match.start(1) for match in pattern.finditer(messages))


def _text(messages: bytes, size: int) -> int:
    """Tokens of text. Escapes are half text at best, so what merely looks like them can't halve the estimate twice."""
    if b"\\" in messages and messages.rfind(b"\\u") >= 0:
        size = max(size - BYTES_OVER_PER_ESCAPE * messages.count(b"\\u"), size // 2)
    return -(-size // BYTES_PER_TOKEN)
