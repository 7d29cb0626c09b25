"""The HTTP client side: connections to providers."""
