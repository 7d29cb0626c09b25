"""`transforms`: shorten a prompt to fit a model's window.

The only transform is OpenRouter's `middle-out` ("Message Transforms" in their documentation): models attend least to
the middle of a long prompt, so that is cut.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from meshproxy.policy.tokens import BYTES_PER_TOKEN, TOKENS_PER_MESSAGE, weigh

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
    """Return the indices to drop: units from the middle outwards, until the rest fits or only the first and last are
    left.
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
