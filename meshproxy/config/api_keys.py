"""Secrets: where a configuration says they are, and what they must be to be sent in a header."""

from collections.abc import Callable, Mapping

from meshproxy.config.decoding import Unfit
from meshproxy.config.names import under
from meshproxy.config.settings import Secret, Settings


def resolve_secrets(settings: Settings, env: Mapping[str, str], read_file: Callable[[str], str]) -> dict[str, str]:
    """The API key of each upstream that names one, by upstream; Unfit if a variable is unset or a file can't be read."""
    keys: dict[str, str] = {}
    faults: list[str] = []
    for name, upstream in settings.upstreams.items():
        if upstream.api_key is None:
            continue
        path = f"{under('upstreams', name)}.api_key"
        try:
            value = _secret(upstream.api_key, env, read_file).strip()
        except KeyError:
            faults.append(f"{path}: the environment has no {upstream.api_key.env}")
        except OSError as error:
            faults.append(f"{path}: {upstream.api_key.file} can't be read ({error.strerror})")
        except UnicodeDecodeError:
            faults.append(f"{path}: {upstream.api_key.file} is not text")
        else:
            if not value or not value.isprintable() or not value.isascii():
                faults.append(f"{path}: the secret is empty or has characters that no header may carry")
            keys[name] = value
    if faults:
        raise Unfit(faults)
    return keys


def _secret(secret: Secret, env: Mapping[str, str], read_file: Callable[[str], str]) -> str:
    return env[secret.env] if secret.env is not None else read_file(secret.file or "")
