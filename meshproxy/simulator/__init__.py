"""A provider of our own: a real HTTP server that speaks OpenAI's chat completions and fails on demand.

It exists so that the gateway can be tried, tested and measured without an account anywhere. The well-behaved part is as
exact as the OpenAI SDKs are strict; the ill-behaved part does, one by one, what providers and networks do in production.
docs/simulator.md lists the names by which a fault is asked for.

A request's way through the files: `server` (routes) > `request` (what is wanted, or OpenAI's 400) > `behaviour` (which faults) >
`answer` (what is said, in words or by a schema) > `stream` (its chunks) > `delivery` (when, and the bytes on the socket).
`dialects` has what providers make of all that. `journal` remembers what came in and how it ended.
"""

from meshproxy.simulator.behaviour import SimulatorSettings
from meshproxy.simulator.server import Running, start

__all__ = ["Running", "SimulatorSettings", "start"]
