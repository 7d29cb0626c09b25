"""`transforms`: making a prompt fit. The one there is, `middle-out`, is OpenRouter's by name and meaning ("Message Transforms" in
their documentation): models attend least to the middle of a long prompt, so that is what goes.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from meshproxy.policy.tokens import BYTES_PER_TOKEN, TOKENS_PER_MESSAGE, weigh

CUT = "\n[...]\n"  # stands where text was taken out

Message = dict[str, Any]


class Scale(NamedTuple):
    """How large a message is, and a text in it. Sizes are additive: a message is smaller by what its text is smaller."""

    message: Callable[[Message], int]
    text: Callable[[str], int]


def message_bytes(message: Message) -> int:
    """A message's bytes of JSON and a comma, with its media and its framing as so many bytes as their tokens are worth."""
    own_bytes, media_tokens = weigh(msgspec.json.encode(message))
    return own_bytes + 1 + (media_tokens + TOKENS_PER_MESSAGE) * BYTES_PER_TOKEN


def text_bytes(text: str) -> int:
    """The bytes of a text in JSON."""
    return len(msgspec.json.encode(text)) - 2


JSON_BYTES = Scale(message_bytes, text_bytes)


def middle_out(messages: Sequence[Message], budget_tokens: int) -> list[Message]:
    """The messages, made to fit `budget_tokens` by `estimate_prompt`; see `fitted`."""
    return fitted(messages, budget_tokens * BYTES_PER_TOKEN - 1, JSON_BYTES)  # 1: brackets and commas


def fitted(messages: Sequence[Message], budget: int, scale: Scale) -> list[Message]:
    """The messages, made to fit a budget on a scale. System messages, the first and the last stay; messages go from the middle
    outwards, a tool's answer with the call it answers; if that isn't enough, the longest texts lose their middle.

    What can't be cut, such as images, stays: the result may be over budget still, and is the provider's to refuse. The time it
    takes grows with the size of the messages, sorting apart: each text is measured a fixed number of times.
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
    """Which messages go: units from the middle outwards, until the rest fits or only the first and the last are left."""
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
    """Indices of messages that go together: an assistant's call and its tools' answers. System messages are in none."""
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
    """From the middle to both sides in turn, the earlier side first."""
    order = sorted(range(len(units)), key=lambda at: abs(2 * at - len(units) + 1))
    return (units[at] for at in order)


def _shortened(message: Message, excess: int, size: Callable[[str], int]) -> tuple[Message, int]:
    """The message with its longest texts cut until it is smaller by `excess` or no text is left, and how much smaller it is."""
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
    """A text without its middle, smaller by at least `excess` where it has so much, and how much smaller it is."""
    if len(text) <= len(CUT):
        return text, 0
    whole = size(text)
    kept, kept_size = _ends(text, whole - excess - size(CUT), size)
    cut = text[: kept - kept // 2] + CUT + text[len(text) - kept // 2 :]
    return cut, whole - kept_size - size(CUT)


def _ends(text: str, room: int, size: Callable[[str], int]) -> tuple[int, int]:
    """How many characters, half from the start and half from the end, fit into a room, and how large they are. Found by
    halving; each step measures only what it adds to what fits, so that all of them together measure the text once.
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
