"""A simulated provider: an HTTP server that implements OpenAI's chat completions and fails on demand.

It allows the gateway to be tried, tested and measured without an account at a provider. Without faults its answers are
as exact as OpenAI's SDKs require. Each fault does one thing that providers and networks do in production.
docs/simulator.md lists the names of the faults.

A request's way through the files: `server` (routes) > `request` (the decoded request, or OpenAI's 400) > `behaviour`
(which faults) > `answer` (the text or JSON of the answer) > `stream` (its events, with faults) > `delivery` (timing, and the
bytes on the socket). `dialects` describes how providers differ from OpenAI.
"""

from meshproxy.simulator.behaviour import SimulatorSettings
from meshproxy.simulator.server import Running, start

__all__ = ["Running", "SimulatorSettings", "start"]
