"""The HTTP client side: connections to providers, and the simulated one."""
