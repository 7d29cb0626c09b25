"""The benchmark: meshproxy beside nginx, HAProxy and a naive aiohttp proxy, in CPU time of the proxy. See README.md."""
