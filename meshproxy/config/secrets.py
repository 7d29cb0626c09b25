"""Read the secrets that a configuration refers to, and check that they can be used."""

from collections.abc import Callable, Mapping
from urllib.parse import quote

from msgspec import Struct
from msgspec.structs import replace

from meshproxy.config.load import under
from meshproxy.config.settings import Redis, Secret, Settings, Upstream, redis_url_fault

ReadFile = Callable[[str], str]


class Secrets(Struct, frozen=True):
    """The upstreams' API keys, by upstream, and the admin listener's token. The `repr` shows none of them."""

    upstreams: dict[str, str]
    admin_token: str | None = None

    def __repr__(self) -> str:
        return "Secrets()"


class SecretReader:
    """Reads secrets from `env` and files. `faults` lists those that can't be read or used, without their values."""

    def __init__(self, env: Mapping[str, str], read_file: ReadFile) -> None:
        self.faults: list[str] = []
        self._env = env
        self._read_file = read_file

    def secrets(self, settings: Settings) -> Secrets:
        """Read the API keys and the admin token. Tables that are at fault are None in `settings`, see `Decoded`."""
        upstreams = {name: upstream for name, upstream in (settings.upstreams or {}).items() if upstream is not None}
        keys = {
            name: self._text(f"{under('upstreams', name)}.api_key", upstream.api_key)
            for name, upstream in upstreams.items()
        }
        token = self._text("server.admin_token", settings.server.admin_token if settings.server is not None else None)
        return Secrets({name: key for name, key in keys.items() if key}, token or None)

    def with_secrets(self, settings: Settings) -> Settings:
        """Return the settings with the secrets that are part of them: in redis.url and in the upstreams' headers."""
        upstreams = {
            name: self._with_headers(name, upstream) if upstream is not None else upstream
            for name, upstream in (settings.upstreams or {}).items()
        }
        redis = settings.redis if settings.redis is None else self.redis(settings.redis)
        return replace(settings, upstreams=upstreams, redis=redis)

    def redis(self, redis: Redis) -> Redis:
        """Return the Redis settings with a URL that contains the password."""
        url = redis.url
        if isinstance(url, Secret):
            url = self._text("redis.url", url, is_sent=False)
            fault = redis_url_fault(url) if url else None
            if fault is not None:
                self.faults.append(f"redis.url: {fault}")
        if redis.password is None or not url:
            return replace(redis, url=url)
        password = self._text("redis.password", redis.password, is_sent=False)
        try:
            return replace(redis, url=_with_password(url, password), password=None)
        except ValueError as error:
            self.faults.append(f"redis.password: {error}")
            return redis

    def _with_headers(self, name: str, upstream: Upstream) -> Upstream:
        if not upstream.headers:
            return upstream
        path = f"{under('upstreams', name)}.headers"
        headers: dict[str, str | Secret] = {
            header: self._text(under(path, header), value) if isinstance(value, Secret) else value
            for header, value in upstream.headers.items()
        }
        return replace(upstream, headers=headers)

    def _text(self, path: str, secret: Secret | None, *, is_sent: bool = True) -> str:
        """Return the secret, or "" if there is none or it can't be used. `is_sent`: it must be valid in a header."""
        if secret is None:
            return ""
        try:
            value = self._value(secret).strip()
        except ValueError as error:
            self.faults.append(f"{path}: {error}")
            return ""
        if value and value.isprintable() and (value.isascii() or not is_sent):
            return value
        what = "characters that a header can't carry" if is_sent else "characters that can't be printed"
        self.faults.append(f"{path}: the secret is empty or has {what}")
        return ""

    def _value(self, secret: Secret) -> str:
        """Return the raw secret. Raises ValueError, without the secret, if it can't be read."""
        try:
            return self._env[secret.env] if secret.env is not None else self._read_file(secret.file or "")
        except KeyError:
            raise ValueError(f"the environment variable {secret.env} is not set") from None
        except OSError as error:
            raise ValueError(f"{secret.file} can't be read ({error.strerror})") from error


def resolved(value: str | Secret) -> str:
    """Return a value as text. Raises TypeError for a secret that `with_secrets` hasn't put into the settings."""
    if isinstance(value, Secret):
        raise TypeError("a secret of these settings was not read")
    return value


def _with_password(url: str, password: str) -> str:
    """Return the URL with a password after its user. Raises ValueError if the URL has one already."""
    scheme, separator, rest = url.partition("://")
    authority, slash, tail = rest.partition("/")
    userinfo, _, hosts = authority.rpartition("@")
    if not separator:
        raise ValueError("the embedded server has no password")
    if ":" in userinfo:
        raise ValueError("redis.url already has a password")
    return f"{scheme}://{userinfo}:{quote(password, safe='')}@{hosts}{slash}{tail}"
