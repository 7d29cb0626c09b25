"""HTTP as bytes."""

Answer = tuple[int, dict[str, str], bytes]


def answers_in(data: bytes) -> list[Answer]:
    """Every answer in what came back on a connection, by the strictest reading: nothing may be left over."""
    answers = []
    while data:
        head, found, data = data.partition(b"\r\n\r\n")
        assert found, head
        first, *lines = head.decode("latin-1").split("\r\n")
        version, status, _ = first.split(" ", 2)
        pairs = [line.split(": ", 1) for line in lines]
        headers = {name.lower(): value for name, value in pairs}
        assert len(headers) == len(pairs), pairs  # no header twice
        if "HTTP/1.0" == version:  # closes without saying so: RFC 9112, section 9.3
            headers.setdefault("connection", "close")
        body, data = _body(int(status), headers, data)
        answers.append((int(status), headers, body))
    return answers


def _body(status: int, headers: dict[str, str], data: bytes) -> tuple[bytes, bytes]:
    if status < 200 or status == 204:
        return b"", data
    if "chunked" == headers.get("transfer-encoding"):
        return _chunks(data)
    size = int(headers["content-length"])
    assert len(data) >= size
    return data[:size], data[size:]


def _chunks(data: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        line, _, data = data.partition(b"\r\n")
        size = int(line, 16)
        assert data[size : size + 2] == b"\r\n"
        body, data = body + data[:size], data[size + 2 :]
        if not size:
            return body, data
