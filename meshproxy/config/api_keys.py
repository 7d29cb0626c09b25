"""Secrets: where a configuration says they are, and what they must be to be sent in a header."""

from collections.abc import Callable, Mapping

from msgspec import Struct

from meshproxy.config.decoding import Unfit
from meshproxy.config.names import under
from meshproxy.config.settings import Secret, Settings

ReadFile = Callable[[str], str]


class Secrets(Struct, frozen=True):
    """The API key of each upstream that has one, by upstream, and what the admin listener asks for. Never shown."""

    upstreams: dict[str, str]
    admin_token: str | None = None

    def __repr__(self) -> str:
        return "Secrets()"


def resolve_secrets(settings: Settings, env: Mapping[str, str], read_file: ReadFile) -> Secrets:
    """The secrets that the settings name. Unfit if a variable is unset or a file can't be read: every such fault at once."""
    faults: list[str] = []

    def read(path: str, secret: Secret | None) -> str:
        try:
            return "" if secret is None else _read(secret, env, read_file)
        except ValueError as error:
            faults.append(f"{path}: {error}")
            return ""

    keys = {
        name: read(f"{under('upstreams', name)}.api_key", each.api_key) for name, each in settings.upstreams.items()
    }
    admin_token = read("server.admin_token", settings.server.admin_token)
    if faults:
        raise Unfit(faults)
    return Secrets({name: key for name, key in keys.items() if key}, admin_token or None)


def _read(secret: Secret, env: Mapping[str, str], read_file: ReadFile) -> str:
    """The secret; ValueError, without it, if it can't be had."""
    try:
        value = (env[secret.env] if secret.env is not None else read_file(secret.file or "")).strip()
    except KeyError:
        raise ValueError(f"the environment has no {secret.env}") from None
    except OSError as error:
        raise ValueError(f"{secret.file} can't be read ({error.strerror})") from error
    if not (value and value.isprintable() and value.isascii()):
        raise ValueError("the secret is empty or has characters that no header may carry")
    return value
