"""Requests that two parsers may read in two ways, and what the gateway makes of each.

Every case stands before `END` in one write. `REFUSED`, `TOO_LARGE`, `TOO_LONG`: an error and the connection closed, nothing
behind it read. `SERVED`: one request, answered by its provider; then END, answered with 404 and the connection closed.
"""

import json

REFUSED = (400,)
TOO_LARGE = (431,)
TOO_LONG = (414,)
SERVED = (200, 404)
LOST = (404, 404)  # a request for something that isn't here, and END
END = b"GET /end HTTP/1.1\r\nHost: mesh\r\nConnection: close\r\n\r\n"

BODY = json.dumps({"model": "sim/plain", "messages": [{"role": "user", "content": "Hello there"}]}).encode()
SIZE = b"%x" % len(BODY)
LENGTH = b"Content-Length: %d" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked"
CHUNKS = SIZE + b"\r\n" + BODY + b"\r\n0\r\n\r\n"
CHAT = b"/v1/chat/completions"


def request(
    *lines: bytes,
    body: bytes = BODY,
    method: bytes = b"POST",
    target: bytes = CHAT,
    version: bytes = b"HTTP/1.1",
    host: bytes = b"Host: mesh",
    end: bytes = b"\r\n",
) -> bytes:
    head = [method + b" " + target + b" " + version, *([host] if host else []), b"Authorization: Bearer KEY", *lines]
    return end.join(head) + end + end + body


def coded(name: bytes) -> bytes:
    """With another spelling of Transfer-Encoding."""
    return request(name, body=CHUNKS)


def chunks(body: bytes) -> bytes:
    """With another spelling of the chunks."""
    return request(CHUNKED, body=body)


def sized(spelling: bytes) -> bytes:
    """With another spelling of the first chunk's size."""
    return chunks(spelling + b"\r\n" + BODY + b"\r\n0\r\n\r\n")


def ended(trailers: bytes) -> bytes:
    return chunks(SIZE + b"\r\n" + BODY + b"\r\n0\r\n" + trailers)


FRAMING = {
    "content-length": (request(LENGTH), SERVED),
    "chunked": (request(CHUNKED, body=CHUNKS), SERVED),
    "length-then-coding": (request(LENGTH, CHUNKED, body=CHUNKS), REFUSED),
    "coding-then-length": (request(CHUNKED, LENGTH, body=CHUNKS), REFUSED),
    "coding-and-zero-length": (request(b"Content-Length: 0", CHUNKED, body=CHUNKS), REFUSED),
    "two-equal-lengths": (request(LENGTH, LENGTH), REFUSED),
    "two-lengths": (request(LENGTH, b"Content-Length: 3"), REFUSED),
    "listed-lengths": (request(LENGTH + b", %d" % len(BODY)), REFUSED),
    "plus-length": (request(b"Content-Length: +%d" % len(BODY)), REFUSED),
    "minus-length": (request(b"Content-Length: -1"), REFUSED),
    "hex-length": (request(b"Content-Length: 0x%x" % len(BODY)), REFUSED),
    "spaced-length": (request(b"Content-Length: 6 9"), REFUSED),
    "underscored-length": (request(b"Content-Length: 6_9"), REFUSED),
    "fullwidth-length": (request("Content-Length: \uff16".encode()), REFUSED),
    "fraction-length": (request(b"Content-Length: 69.0"), REFUSED),
    "no-length": (request(b"Content-Length: "), REFUSED),
    "endless-length": (request(b"Content-Length: " + b"9" * 40), REFUSED),
    "wrapping-length": (request(b"Content-Length: %d" % (2**64 + len(BODY))), REFUSED),
    "padded-length": (request(b"Content-Length: 0000%d" % len(BODY)), SERVED),
    "space-before-colon": (request(b"Content-Length : %d" % len(BODY)), REFUSED),
    "length-too-short": (request(b"Content-Length: %d" % (len(BODY) - 4)), (422, 400)),
    "coding-twice": (request(CHUNKED, CHUNKED, body=CHUNKS), REFUSED),
    "coding-listed-twice": (coded(b"Transfer-Encoding: chunked, chunked"), REFUSED),
    "coding-unknown": (coded(b"Transfer-Encoding: xchunked"), REFUSED),
    "coding-identity": (request(b"Transfer-Encoding: identity", LENGTH), REFUSED),
    "coding-identity-line": (request(b"Transfer-Encoding: identity", CHUNKED, body=CHUNKS), REFUSED),
    "coding-not-last": (coded(b"Transfer-Encoding: chunked, identity"), REFUSED),
    "coding-gzip": (coded(b"Transfer-Encoding: gzip, chunked"), REFUSED),
    "coding-gzip-alone": (request(b"Transfer-Encoding: gzip", LENGTH), REFUSED),
    "coding-empty-element": (coded(b"Transfer-Encoding: ,chunked"), REFUSED),
    "coding-space-before-colon": (coded(b"Transfer-Encoding : chunked"), REFUSED),
    "coding-tab-before-colon": (coded(b"Transfer-Encoding\t: chunked"), REFUSED),
    "coding-after-tab": (coded(b"Transfer-Encoding:\tchunked"), SERVED),
    "coding-vertical-tab": (coded(b"Transfer-Encoding:\x0bchunked"), REFUSED),
    "coding-in-capitals": (coded(b"Transfer-Encoding: CHUNKED"), SERVED),
    "coding-quoted": (coded(b'Transfer-Encoding: "chunked"'), REFUSED),
    "coding-nul": (coded(b"Transfer-Encoding: chunked\0"), REFUSED),
    "coding-bare-cr": (coded(b"Transfer-Encoding: chunked\r"), REFUSED),
    "coding-parameter": (coded(b"Transfer-Encoding: chunked;q=1"), REFUSED),
    "coding-folded": (coded(b"Transfer-Encoding:\r\n chunked"), REFUSED),
    "coding-bare-lf": (coded(b"X: y\nTransfer-Encoding: chunked"), REFUSED),
    "coding-underscored": (request(b"Transfer_Encoding: chunked", LENGTH), SERVED),
    "coding-in-1.0": (request(CHUNKED, body=CHUNKS, version=b"HTTP/1.0"), REFUSED),
    "get-coding-in-1.0": (
        request(CHUNKED, body=b"0\r\n\r\n", method=b"GET", target=b"/end", version=b"HTTP/1.0"),
        REFUSED,
    ),
    "length-hop-by-hop": (request(LENGTH, b"Connection: content-length"), SERVED),
    "coding-hop-by-hop": (request(CHUNKED, b"Connection: transfer-encoding", body=CHUNKS), SERVED),
    "get-with-body": (request(LENGTH, method=b"GET", target=b"/nowhere"), LOST),
    "body-that-is-a-request": (request(b"Content-Length: %d" % len(END), body=END), (422, 404)),
    "pipelined": (request(LENGTH) * 2, (200, 200, 404)),
    "pipelined-refused": (request(LENGTH) + request(LENGTH, CHUNKED, body=CHUNKS), (200, 400)),
}

CHUNK_CODING = {
    "size-minus": (sized(b"-" + SIZE), REFUSED),
    "size-plus": (sized(b"+" + SIZE), REFUSED),
    "size-0x": (sized(b"0x" + SIZE), REFUSED),
    "size-then-space": (sized(SIZE + b" "), REFUSED),
    "size-after-space": (sized(b" " + SIZE), REFUSED),
    "size-underscored": (sized(b"0_" + SIZE), REFUSED),
    "size-none": (sized(b""), REFUSED),
    "size-no-hex": (sized(b"g"), REFUSED),
    "size-zeros": (sized(b"0" * 20 + SIZE), SERVED),
    "size-wraps": (sized(b"1" + SIZE.rjust(16, b"0")), REFUSED),
    "size-bare-cr": (chunks(SIZE + b"\r" + BODY + b"\r\n0\r\n\r\n"), REFUSED),
    "size-bare-lf": (chunks(SIZE + b"\n" + BODY + b"\r\n0\r\n\r\n"), REFUSED),
    "all-bare-lf": (chunks(SIZE + b"\n" + BODY + b"\n0\n\n"), REFUSED),
    "no-crlf-behind": (chunks(SIZE + b"\r\n" + BODY + b"0\r\n\r\n"), REFUSED),
    "junk-behind": (chunks(SIZE + b"\r\n" + BODY + b"XX0\r\n\r\n"), REFUSED),
    "last-of-two-zeros": (chunks(SIZE + b"\r\n" + BODY + b"\r\n00\r\n\r\n"), SERVED),
    "extension": (sized(SIZE + b";a=b"), SERVED),
    "extension-of-10k": (sized(SIZE + b";" + b"a" * 10_000), SERVED),
    "extension-of-40k": (sized(SIZE + b";" + b"a" * 40_000), REFUSED),
    "chunks-of-a-byte": (chunks(b"1\r\n \r\n" * 10_000 + SIZE + b"\r\n" + BODY + b"\r\n0\r\n\r\n"), REFUSED),
    "extension-bare-lf": (sized(SIZE + b";a\nb"), REFUSED),
    "extension-quoted-crlf": (sized(SIZE + b';a="'), REFUSED),
    "extension-nul": (sized(SIZE + b";a=\0"), REFUSED),
    "extension-nameless": (sized(SIZE + b";"), REFUSED),
    "trailer": (ended(b"X: y\r\n\r\n"), SERVED),
    "trailer-length": (ended(b"Content-Length: 500\r\n\r\n"), REFUSED),
    "trailer-coding": (ended(b"Transfer-Encoding: chunked\r\n\r\n"), REFUSED),
    "trailer-junk": (ended(b"junk\r\n\r\n"), REFUSED),
    "trailer-bare-lf": (ended(b"X: y\n\r\n"), REFUSED),
}

HEADS = {
    "folded": (request(LENGTH, b"X-A: b\r\n c"), REFUSED),
    "folded-first": (b"POST /end HTTP/1.1\r\n Host: mesh\r\n\r\n", REFUSED),
    "bare-lf": (request(LENGTH, end=b"\n"), REFUSED),
    "bare-lf-once": (request(LENGTH, b"X: a\nY: b"), REFUSED),
    "bare-cr": (request(LENGTH, b"X: a\rY: b"), REFUSED),
    "nul-in-value": (request(LENGTH, b"X: a\0b"), REFUSED),
    "nul-in-name": (request(LENGTH, b"X\0: a"), REFUSED),
    "control-in-value": (request(LENGTH, b"X: a\x01b"), REFUSED),
    "delete-in-value": (request(LENGTH, b"X: a\x7fb"), REFUSED),
    "latin-1-in-value": (request(LENGTH, b"X: \xff"), SERVED),
    "latin-1-in-name": (request(LENGTH, b"X\xff: a"), REFUSED),
    "space-in-name": (request(LENGTH, b"X Y: a"), REFUSED),
    "no-colon": (request(LENGTH, b"Xa"), REFUSED),
    "no-name": (request(LENGTH, b": a"), REFUSED),
    "no-host": (request(LENGTH, host=b""), REFUSED),
    "two-hosts": (request(LENGTH, b"Host: other"), REFUSED),
    "value-of-64k": (request(LENGTH, b"X: " + b"a" * 65_536), TOO_LARGE),
    "name-and-value-of-10k": (request(LENGTH, b"X" * 10_000 + b": " + b"a" * 10_000), TOO_LARGE),
    "name-of-64k": (request(LENGTH, b"X" * 65_536 + b": a"), TOO_LARGE),
    "10k-headers": (request(LENGTH, *[b"X-%d: a" % number for number in range(10_000)]), TOO_LARGE),
    "200-headers": (request(LENGTH, *[b"X-%d: a" % number for number in range(200)]), TOO_LARGE),
    "two-content-types": (request(LENGTH, b"Content-Type: application/json", b"Content-Type: text/html"), REFUSED),
    "two-authorizations": (request(LENGTH, b"Authorization: Bearer other"), REFUSED),
    "expect-continue": (request(LENGTH, b"Expect: 100-continue"), (100, 200, 404)),
    "expect-continue-in-1.0": (request(LENGTH, b"Expect: 100-continue", version=b"HTTP/1.0"), (200,)),
    "expect-something": (request(LENGTH, b"Expect: kettle"), SERVED),
}

START_LINES = {
    "absolute-form": (request(LENGTH, target=b"http://mesh" + CHAT), SERVED),
    "absolute-form-elsewhere": (request(LENGTH, target=b"http://other" + CHAT), SERVED),
    "absolute-form-no-path": (request(LENGTH, target=b"http://other"), LOST),
    "absolute-form-undecodable": (request(LENGTH, target=b"http://xn--a" + CHAT), REFUSED),
    "absolute-form-bad-v6": (request(LENGTH, target=b"http://[::1" + CHAT), REFUSED),
    "absolute-form-bad-port": (request(LENGTH, target=b"http://mesh:99999" + CHAT), REFUSED),
    "absolute-form-https": (request(LENGTH, target=b"https://mesh" + CHAT), SERVED),
    "asterisk-get": (request(method=b"GET", target=b"*", body=b""), REFUSED),
    "asterisk": (request(LENGTH, target=b"*"), REFUSED),
    "asterisk-options": (request(method=b"OPTIONS", target=b"*", body=b""), LOST),
    "authority-form": (request(LENGTH, target=b"other:443"), REFUSED),
    "connect": (request(method=b"CONNECT", target=b"other:443", body=b""), (404,)),
    "connect-undecodable": (request(method=b"CONNECT", target=b"xn--a:443", body=b""), REFUSED),
    "no-slash": (request(LENGTH, target=CHAT[1:]), REFUSED),
    "two-slashes": (request(LENGTH, target=b"/" + CHAT), LOST),
    "dots": (request(LENGTH, target=b"/x/.." + CHAT), LOST),
    "encoded-slash": (request(LENGTH, target=b"/v1/chat%2fcompletions"), LOST),
    "encoded-letter": (request(LENGTH, target=b"/v1/ch%61t/completions"), SERVED),
    "encoded-crlf": (request(LENGTH, target=b"/v1/%0d%0ax-a:%20b"), LOST),
    "bad-percent": (request(LENGTH, target=b"/v1/%zz"), LOST),
    "query": (request(LENGTH, target=CHAT + b"?x=1"), SERVED),
    "fragment": (request(LENGTH, target=CHAT + b"#x"), SERVED),
    "nul": (request(LENGTH, target=b"/v1\0"), REFUSED),
    "latin-1": (request(LENGTH, target=b"/v1/\xff"), REFUSED),
    "space": (request(LENGTH, target=b"/v1/chat completions"), REFUSED),
    "tab": (request(LENGTH, target=b"/v1/chat\tcompletions"), REFUSED),
    "two-spaces": (request(LENGTH, target=b" " + CHAT), SERVED),
    "target-of-100k": (request(LENGTH, target=b"/" + b"a" * 100_000), TOO_LONG),
    "lower-case-method": (request(LENGTH, method=b"post"), REFUSED),
    "control-in-method": (request(LENGTH, method=b"P\x01ST"), REFUSED),
    "unknown-method": (request(LENGTH, method=b"BREW"), REFUSED),
    "endless-method": (request(LENGTH, method=b"A" * 100_000), REFUSED),
    "http-0.9": (b"GET /end\r\n", REFUSED),
    "http-0.9-alone": (b"GET /end\r\n\r\n", REFUSED),
    "http-1": (request(LENGTH, version=b"HTTP/1"), REFUSED),
    "http-1.2": (request(LENGTH, version=b"HTTP/1.2"), REFUSED),
    "http-1.10": (request(LENGTH, version=b"HTTP/1.10"), REFUSED),
    "http-2.0": (request(LENGTH, version=b"HTTP/2.0"), REFUSED),
    "http-2.0-without-body": (request(b"Content-Length: 0", version=b"HTTP/2.0", body=b""), REFUSED),
    "http-in-small": (request(LENGTH, version=b"http/1.1"), REFUSED),
    "space-behind-version": (request(LENGTH, version=b"HTTP/1.1 "), REFUSED),
    "http-2-preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", REFUSED),
    "tls": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40), REFUSED),
    "zeros": (bytes(100) + b"\r\n\r\n", REFUSED),
    "blank": (b"   \r\n\r\n", REFUSED),
    "crlf-ahead": (b"\r\n\r\n" + request(LENGTH), SERVED),
    "lf-ahead": (b"\n" + request(LENGTH), SERVED),
    "upgrade-websocket": (
        request(b"Upgrade: websocket", b"Connection: Upgrade", method=b"GET", target=b"/nowhere", body=b""),
        (404,),
    ),
    "upgrade-h2c": (
        request(LENGTH, b"Upgrade: h2c", b"Connection: Upgrade, HTTP2-Settings", b"HTTP2-Settings: AA"),
        (200,),
    ),
}

CASES = {**FRAMING, **CHUNK_CODING, **HEADS, **START_LINES}
