"""`transforms`: making a prompt fit. The one there is, `middle-out`, is OpenRouter's by name and meaning ("Message Transforms" in
their documentation): models attend least to the middle of a long prompt, so that is what goes.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from meshproxy.policy.tokens import BYTES_PER_TOKEN, estimate_prompt

CUT = "\n[...]\n"  # stands where text was taken out

Message = dict[str, Any]
Count = Callable[[Message], int]


def message_tokens(message: Message) -> int:
    """The estimate of one message; the sum over messages is never less than the estimate of all."""
    return estimate_prompt(msgspec.json.encode(message), None, 1)


def middle_out(messages: Sequence[Message], budget_tokens: int, count: Count = message_tokens) -> list[Message]:
    """The messages, made to fit `budget_tokens` by `count`. System messages, the first and the last stay; messages go from the
    middle outwards, a tool's answer with the call it answers; if that isn't enough, the longest texts lose their middle.

    What can't be cut, such as images, stays: the result may be over budget still, and is the provider's to refuse.
    """
    sizes = [count(message) for message in messages]
    dropped = _middle(messages, sizes, budget_tokens)
    kept = [index for index in range(len(messages)) if index not in dropped]
    excess = sum(sizes[index] for index in kept) - budget_tokens
    shortened: dict[int, Message] = {}
    for index in sorted(kept, key=sizes.__getitem__, reverse=True):
        if excess <= 0:
            break
        shortened[index] = _shortened(messages[index], sizes[index] - excess, count)
        excess -= sizes[index] - count(shortened[index])
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


def _shortened(message: Message, tokens: int, count: Count) -> Message:
    """The message with its longest texts cut until it has at most so many tokens, or no text is left."""
    content = message.get("content")
    if isinstance(content, str):
        return _fit(content, tokens, lambda text: {**message, "content": text}, count)
    if not isinstance(content, list):
        return message
    texts = [
        index for index, part in enumerate(content) if isinstance(part, dict) and isinstance(part.get("text"), str)
    ]
    for index in sorted(texts, key=lambda at: len(content[at]["text"]), reverse=True):
        if count(message) <= tokens:
            break
        message = _fit(content[index]["text"], tokens, _replacing(message, index), count)
    return message


def _replacing(message: Message, index: int) -> Callable[[str], Message]:
    """Puts another text into one content part."""
    before, part, after = message["content"][:index], message["content"][index], message["content"][index + 1 :]
    return lambda text: {**message, "content": [*before, {**part, "text": text}, *after]}


def _fit(text: str, tokens: int, put: Callable[[str], Message], count: Count) -> Message:
    """The message with as much of the ends of a text that is too long as fits, found by halving; without any if none does."""
    fits, too_much = 0, min(len(text), tokens * BYTES_PER_TOKEN + 1)
    while too_much - fits > 1:
        kept = (fits + too_much) // 2
        if count(put(_ends(text, kept))) <= tokens:
            fits = kept
        else:
            too_much = kept
    return put(_ends(text, fits))


def _ends(text: str, kept: int) -> str:
    """So many characters of the text, half from its start and half from its end."""
    if len(text) <= len(CUT):
        return text
    return text[: kept - kept // 2] + CUT + text[len(text) - kept // 2 :]
