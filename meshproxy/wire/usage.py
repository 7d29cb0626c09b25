"""What a provider says a request used, and the right to disbelieve it."""

from msgspec import Struct


class Usage(Struct, frozen=True):
    """Tokens of one request. `cached`, `cache_write` and `audio_prompt` are parts of `prompt`; `reasoning` and
    `audio_completion` are parts of `completion` (OpenAI, "The usage object" of the chat completion reference).
    """

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    cache_write: int = 0
    reasoning: int = 0
    audio_prompt: int = 0
    audio_completion: int = 0

    @property
    def total(self) -> int:
        """Prompt and completion together."""
        return self.prompt + self.completion
