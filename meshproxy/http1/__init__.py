"""HTTP/1.1 heads and framing, in both directions (RFC 9110, RFC 9112). No I/O."""
