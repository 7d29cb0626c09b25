"""The words of the simulated model: sentences of our own, cut into tokens once, and strung together as long as is asked.

A token is a word of at most twelve letters with the space before it, or one sign. The tokens of a text, put together, are
that text to the byte.
"""

import re
from collections.abc import Iterator
from random import Random

USUAL_TOKENS = 60
MAX_QUOTE = 160

_TOKEN = re.compile(r"\s?\w{1,12}|\s?[^\w\s]|\s")
_ASKED = re.compile(r"\b(\d{1,5}) (?:words|tokens)\b")


def tokenize(text: str) -> list[str]:
    """Cut a text into tokens; nothing is lost."""
    return _TOKEN.findall(text)


def answer(rng: Random, words: str, tokens: int | None, *, unicode: bool) -> list[str]:
    """A friendly reply to `words`: exactly `tokens` long, or as long as they ask ("in 200 words"), or whole sentences of about
    sixty tokens.
    """
    asked = _ASKED.search(words)
    if tokens is None and asked:
        tokens = int(asked[1])
    wanted = USUAL_TOKENS if tokens is None else tokens
    told = tokenize(_opening(rng, words))
    sentences = _sentences(rng, unicode=unicode)
    while len(told) < wanted:
        told += next(sentences)
    return told[:tokens]


def thoughts() -> list[str]:
    """What a reasoning model says to itself first."""
    return tokenize(_THOUGHTS)


def _opening(rng: Random, words: str) -> str:
    quote = " ".join(words.split())
    if len(quote) > MAX_QUOTE:
        quote = quote[:MAX_QUOTE].rstrip() + "…"
    return rng.choice(_OPENINGS).format(quote=quote) if quote else "Hello! You said nothing, so I will begin."


def _sentences(rng: Random, *, unicode: bool) -> Iterator[list[str]]:
    """All of them in some order, and then again in another."""
    sentences = _UNICODE_TOKENS if unicode else _SENTENCE_TOKENS
    while True:
        yield from rng.sample(sentences, len(sentences))


def _cut(*sentences: str) -> list[list[str]]:
    return [tokenize(" " + sentence) for sentence in sentences]


_OPENINGS = ('You said "{quote}", and I am glad you did.', 'You asked about "{quote}"; let me think aloud.')
_THOUGHTS = "The user wants an answer. I have none of my own, so I will tell a short and friendly story instead."
_SENTENCE_TOKENS = _cut(
    "I am a simulated model, so nothing I say costs anything.",
    "Each of these words travels as an event of its own.",
    "Somewhere between us a proxy counts them and passes them on untouched.",
    "A river does not hurry, and yet it arrives at the sea.",
    "If you close the connection now, I will notice and stop.",
    "A good answer is short; a good test is long.",
    "Numbers are honest when two people count them.",
    "Ask me twice with the same seed and I will repeat myself.",
    "Every stream ends; the careful ones say so.",
    "What is held must be settled, said the clerk, and closed the book.",
    "Between the mountains a road winds down to a town of nine bridges.",
    "Rain makes the stones shine like the backs of fish.",
)
_UNICODE_TOKENS = _cut(
    "😀 Grinning, \U0001f469\u200d\U0001f469\u200d\U0001f467 a family of three.",
    "\U0001f3f3\ufe0f\u200d\U0001f308 One flag of four code points.",
    "你好世界。这是一条流。",
    "こんにちは、世界。ストリームです。",
    "안녕하세요, 세계.",
    "مرحبا بالعالم، هذا نص من اليمين إلى اليسار.",
    "שלום עולם.",
    "Zalgo e\u0301\u0327\u0323, a mark alone \u0301, and a joiner \u200d by itself.",
    "Naïve café, Straße, Ærøskøbing, Łódź, İstanbul.",
    "Separators \u2028 and \u2029 are no line ends in an event stream; nor is \x85.",
    "\U0001d578\U0001d586 and 𒀀𒁀 lie beyond the basic plane.",
)
