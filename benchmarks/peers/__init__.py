"""AI gateways beside which meshproxy is measured, each where its program is on the path.

They have keys, limits and a log on, where they have them. A peer is a row of PEERS and, for most, a configuration beside this
file. `$NAME` in an argument, header or configuration is filled in: PORT and ADMIN_PORT (free), UNARY and STREAMS (the upstreams'
ports), KEY (a key made for the run), CONF and DIRECTORY.
"""

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from string import Template

from benchmarks.processes import PROXY_CORE, Process, free_ports, program
from benchmarks.proxies import UNARY_MODEL, Proxy, Start, Upstreams

HERE = Path(__file__).parent
READY_WITHIN_S = 90.0  # LiteLLM imports for half a minute


@dataclass(frozen=True)
class Peer:
    """A gateway of others.

    `arguments` follow the program. `share`: how much of a case's load it can be asked to take. `warm_up_s`: until its compiler is
    done. `prefixes` go before a model's name, where a gateway picks the upstream by it.
    """

    name: str
    program: str
    arguments: tuple[str, ...]
    configuration: str = ""
    file_name: str = ""  # what the gateway wants its configuration to be called
    share: float = 1.0
    warm_up_s: int = 2
    prefixes: tuple[str, str] = ("", "")  # of whole answers, of streams
    headers: Mapping[str, str] = field(default_factory=dict)
    stream_headers: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


PEERS = (
    # agentgateway.dev/docs, "LLM" and the repository's examples/llm-basic
    Peer("agentgateway", "agentgateway", ("-f", "$CONF"), "agentgateway.yaml"),
    # docs.getbifrost.ai/deployment-guides/config-json; the model names the provider
    Peer(
        "bifrost",
        "bifrost-http",
        ("-host", "127.0.0.1", "-port", "$PORT", "-app-dir", "$DIRECTORY", "-log-level", "info"),
        "bifrost.json",
        file_name="config.json",
        prefixes=("openai/", "streams/"),
    ),
    # www.envoyproxy.io/docs/envoy/latest/configuration/overview/examples: no AI gateway, but what several are built on
    Peer(
        "envoy",
        "envoy",
        ("-c", "$CONF", "--concurrency", "1", "--log-level", "error"),
        "envoy.yaml",
        stream_headers={"x-upstream": "streams"},
    ),
    # docs.litellm.ai/docs/proxy/configs: a master key, no database
    Peer(
        "litellm",
        "litellm",
        ("--config", "$CONF", "--host", "127.0.0.1", "--port", "$PORT", "--num_workers", "1"),
        "litellm.yaml",
        share=0.05,
    ),
    # portkey.ai/docs/product/ai-gateway/universal-api: all is in the request's headers; the open gateway has no keys or limits
    Peer(
        "portkey",
        "gateway",
        ("--port=$PORT", "--headless"),
        share=0.1,
        warm_up_s=6,
        headers={"x-portkey-provider": "openai", "x-portkey-custom-host": "http://127.0.0.1:$UNARY/v1"},
        stream_headers={"x-portkey-custom-host": "http://127.0.0.1:$STREAMS/v1"},
        environment={"NODE_ENV": "production"},
    ),
)


def available() -> list[Start]:
    """Return how to start each peer whose program is on the path."""
    return [_start(peer) for peer in PEERS if Path(program(peer.program)).is_absolute()]


def _start(peer: Peer) -> Start:
    start: Callable[[Upstreams, Path], AbstractContextManager[Proxy]] = partial(_running, peer)
    start.__name__ = peer.name  # type: ignore[attr-defined]
    return start


@contextmanager
def _running(peer: Peer, behind: Upstreams, directory: Path) -> Iterator[Proxy]:
    port, admin_port = free_ports(2)
    own = directory / peer.name
    own.mkdir(exist_ok=True)
    conf = own / (peer.file_name or peer.configuration or "none")
    names = {
        "PORT": str(port),
        "ADMIN_PORT": str(admin_port),
        "UNARY": str(behind.unary),
        "STREAMS": str(behind.streams),
        "KEY": f"sk-{secrets.token_hex(24)}",
        "CONF": str(conf),
        "DIRECTORY": str(own),
        "UNARY_MODEL": UNARY_MODEL,
    }

    def filled(text: str) -> str:
        return Template(text).substitute(names)

    if peer.configuration:
        conf.write_text(filled((HERE / peer.configuration).read_text()))
    argv = [program(peer.program), *map(filled, peer.arguments)]
    environment = {**os.environ, **peer.environment}
    with Process(
        argv, PROXY_CORE, [port], stderr=own / "log", cwd=own, env=environment, ready_within_s=READY_WITHIN_S
    ) as process:
        headers = {name: filled(value) for name, value in peer.headers.items()}
        stream_headers = {name: filled(value) for name, value in peer.stream_headers.items()}
        yield Proxy(
            peer.name,
            process,
            port,
            port,
            names["KEY"],
            share=peer.share,
            warm_up_s=peer.warm_up_s,
            headers=headers,
            stream_headers=headers | stream_headers,
            prefixes=peer.prefixes,
        )
