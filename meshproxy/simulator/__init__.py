"""A provider of our own: a real HTTP server that speaks OpenAI's chat completions and fails on demand.

It exists so that the gateway can be tried, tested and measured without an account anywhere. The well-behaved part is as
exact as the OpenAI SDKs are strict; the ill-behaved part does, one by one, what providers and networks do in production.
docs/simulator.md lists the names by which a fault is asked for.

A request's way through the files: `app` (routes) > `ask` (what is wanted, or OpenAI's 400) > `behaviour` (which faults) >
`replies` (what will be said: `prose`, `schema`) > `chunks` (the answer) > `faults` (what becomes of it) > `delivery` (when) >
`line` (the very bytes on the socket). `dialects` has what providers make of all that. `journal` remembers what came in and how
it ended.
"""

from meshproxy.simulator.behaviour import SimulatorSettings
from meshproxy.simulator.server import Running, start

__all__ = ["Running", "SimulatorSettings", "start"]
