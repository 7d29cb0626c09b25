"""Secrets: where a configuration says they are, and what they must be to be sent in a header."""

from collections.abc import Callable, Mapping

from meshproxy.config.decoding import Unfit
from meshproxy.config.names import under
from meshproxy.config.settings import Secret, Settings

ReadFile = Callable[[str], str]


def resolve_secrets(settings: Settings, env: Mapping[str, str], read_file: ReadFile) -> dict[str, str]:
    """The API key of each upstream that names one, by upstream. Unfit if a variable is unset or a file can't be read: every
    such fault at once, the admin token's included.
    """
    keys: dict[str, str] = {}
    faults: list[str] = []
    for name, upstream in settings.upstreams.items():
        if upstream.api_key is not None:
            keys[name] = _read(f"{under('upstreams', name)}.api_key", upstream.api_key, env, read_file, faults)
    _admin_token(settings, env, read_file, faults)
    if faults:
        raise Unfit(faults)
    return keys


def resolve_admin_token(settings: Settings, env: Mapping[str, str], read_file: ReadFile) -> str | None:
    """What the admin listener asks for; None if it asks for nothing. Unfit if it can't be had."""
    faults: list[str] = []
    token = _admin_token(settings, env, read_file, faults)
    if faults:
        raise Unfit(faults)
    return token


def _admin_token(settings: Settings, env: Mapping[str, str], read_file: ReadFile, faults: list[str]) -> str | None:
    secret = settings.server.admin_token
    return None if secret is None else _read("server.admin_token", secret, env, read_file, faults)


def _read(path: str, secret: Secret, env: Mapping[str, str], read_file: ReadFile, faults: list[str]) -> str:
    """The secret, or "" and a fault."""
    try:
        value = (env[secret.env] if secret.env is not None else read_file(secret.file or "")).strip()
    except KeyError:
        faults.append(f"{path}: the environment has no {secret.env}")
    except OSError as error:
        faults.append(f"{path}: {secret.file} can't be read ({error.strerror})")
    except UnicodeDecodeError:
        faults.append(f"{path}: {secret.file} is not text")
    else:
        if value and value.isprintable() and value.isascii():
            return value
        faults.append(f"{path}: the secret is empty or has characters that no header may carry")
    return ""
