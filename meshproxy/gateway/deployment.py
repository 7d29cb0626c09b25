"""What one generation of the configuration means to the pipeline. A reload builds another and swaps it in whole; requests
in flight keep the one they began with.
"""

from collections.abc import Mapping

from msgspec import Struct

from meshproxy.config import Settings
from meshproxy.policy.catalog import Catalog
from meshproxy.upstream.provider import Provider


class Deployment(Struct, frozen=True):
    """Settings, the catalogue of models built from them, and a connection pool for each upstream. `draining` are the
    upstreams that are read to the end when a client hangs up.
    """

    generation: int
    settings: Settings
    catalog: Catalog
    providers: Mapping[str, Provider]
    draining: frozenset[str]
