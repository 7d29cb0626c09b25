"""What clients send by mistake or on purpose: always the envelope, never a 500, and never a nano-dollar."""

import gzip
import json

import pytest

from meshproxy.policy.principal import Limits
from tests.harness.clients import HELLO
from tests.harness.mesh import PRICE, model

MESSAGES = json.dumps(HELLO)
DEEP = 100_000
LIMIT = 33_554_432


def body(**members):
    """A body of raw JSON members."""
    given = {"model": '"sim/plain"', "messages": MESSAGES, **members}
    return "{" + ",".join(f'"{name}":{text}' for name, text in given.items()) + "}"


UNPROCESSABLE = {
    "nothing": "",
    "white space": " \n",
    "not JSON": "hello",
    "half of it": body()[:-1],
    "two of them": body() + body(),
    "an array": "[]",
    "a string": '"messages"',
    "null": "null",
    "a number": "1e999",
    "BOM": "\ufeff" + body(),
    "trailing comma": body()[:-1] + ",}",
    "single quotes": body().replace('"', "'"),
    "comment": "/* hi */" + body(),
    "deep array": "[" * DEEP,
    "deep closed array": "[" * DEEP + "]" * DEEP,
    "deep object": '{"a":' * DEEP,
    "deep field": body(metadata="[" * DEEP + "]" * DEEP),
    "deep messages": body(messages="[" * DEEP + "]" * DEEP),
    "deep content": body(messages='[{"role":"user","content":' + "[" * DEEP + "1" + "]" * DEEP + "}]"),
    "NaN": body(temperature="NaN"),
    "NaN elsewhere": body(anything="NaN"),
    "Infinity": body(temperature="Infinity"),
    "lone surrogate in the model": body(model=r'"\ud800"'),
    "lone surrogate in a message": body(messages=r'[{"role":"user","content":"\ud800"}]'),
    "half an escape": body(messages=r'[{"role":"user","content":"\u12"}]'),
    "control character": body(messages='[{"role":"user","content":"\x01"}]'),
    "huge temperature": body(temperature="1" + "0" * 400),
    "huge max_tokens": body(max_tokens="9" * 5000),
    "huge seed": body(seed="9" * 30),
    "huge n": body(n="129"),
    "no messages": '{"model":"sim/plain"}',
    "null messages": body(messages="null"),
    "empty messages": body(messages="[]"),
    "messages of strings": body(messages='["hi"]'),
    "message without a role": body(messages='[{"content":"hi"}]'),
    "role of a number": body(messages='[{"role":1,"content":"hi"}]'),
    "content of a number": body(messages='[{"role":"user","content":1}]'),
    "content of strings": body(messages='[{"role":"user","content":["hi"]}]'),
    "temperature too high": body(temperature="2.01"),
    "temperature of a string": body(temperature='"1"'),
    "negative top_p": body(top_p="-0.1"),
    "penalty too low": body(presence_penalty="-2.1"),
    "max_tokens of zero": body(max_tokens="0"),
    "max_tokens of a float": body(max_tokens="1.5"),
    "stop of numbers": body(stop="[1]"),
    "stream of a string": body(stream='"true"'),
    "stream_options of a list": body(stream="true", stream_options="[]"),
    "tools of an object": body(tools="{}"),
    "unknown tool_choice": body(tool_choice='"maybe"'),
    "user of 257 characters": body(user='"%s"' % ("u" * 257)),
    "session_id of 257 characters": body(session_id='"%s"' % ("s" * 257)),
    "variables of numbers": body(template='"t"', variables='{"a":1}'),
    "variables of a list": body(template='"t"', variables="[]"),
    "unknown transform": body(transforms='["sideways"]'),
    "models of numbers": body(models="[1]"),
    "33 models": body(models=json.dumps(["sim/plain"] * 33)),
    "200,000 members": "{" + ",".join(f'"{number}":1' for number in range(200_000)) + "}",
}
NOT_UTF8 = {
    "latin-1": body(user='"é"').encode("latin-1"),
    "encoded surrogate": body(user='"X"').encode().replace(b"X", b"\xed\xa0\x80"),
    "overlong": body(user='"X"').encode().replace(b"X", b"\xc0\xaf"),
    "UTF-16": body().encode("utf-16"),
    "zeros": b"\0" * 100,
}
EVERYTHING = {**{name: text.encode() for name, text in UNPROCESSABLE.items()}, **NOT_UTF8}


@pytest.mark.parametrize("name", list(EVERYTHING))
async def test_a_bad_body(mesh, name):
    caller = await mesh.key()
    before = await mesh.snapshot(caller)
    answer = await mesh.post(caller, EVERYTHING[name])
    assert (answer.status, answer.code) == (422, "validation_error")
    assert answer.error["details"]
    assert await mesh.snapshot(caller) == before
    assert mesh.received == []


@pytest.mark.parametrize("path", ["/v1/templates", "/v1/usage/events"])
@pytest.mark.parametrize(
    "data", [("[" * DEEP).encode(), b'{"since":' + b"[" * DEEP, b'{"since":"\xed\xa0\x80"}', b"[]"]
)
async def test_a_bad_body_elsewhere(mesh, path, data):
    caller = await mesh.key()
    told = {"content-type": "application/json", **caller.auth}
    answer = await mesh.request("POST", path, data=data, headers=told)
    assert (answer.status, answer.code) == (422, "validation_error")


async def test_everything_that_is_wrong_is_told(mesh):
    caller = await mesh.key()
    answer = await mesh.post(caller, body(temperature="3", user="1", messages='[{"content":"hi"}]').encode())
    details = {(detail["type"], *detail["loc"]) for detail in answer.error["details"]}
    expected = {
        ("less_than_equal", "body", "temperature"),
        ("string_type", "body", "user"),
        ("missing", "body", "messages", 0, "role"),
    }
    assert details == expected


@pytest.mark.parametrize(
    ("members", "sent"),
    [
        ({"user": '"%s"' % ("u" * 256)}, {"user": "u" * 256}),
        ({"temperature": '0.1,"temperature":0.2'}, {"temperature": 0.2}),
        ({"metadata": "[" * 100 + "1" + "]" * 100}, {}),
        ({"user": r'"😀"'}, {"user": "\U0001f600"}),
        ({"temperature": "null", "stop": "null", "models": "null", "stream": "null"}, {}),
        ({"logit_bias": '{"50256":-100}'}, {"logit_bias": {"50256": -100}}),
    ],
)
async def test_odd_but_right_bodies_pass(mesh, members, sent):
    caller = await mesh.key()
    answer = await mesh.post(caller, body(**members).encode())
    assert answer.status == 200, answer.body
    assert sent.items() <= mesh.sent.items()


async def test_ten_thousand_messages(start_mesh):
    mesh = await start_mesh(models={"m": {**model("sim", "sim/plain?tokens=8"), "context_window": 1_000_000, **PRICE}})
    caller = await mesh.key(limits=Limits(tokens_per_minute=10_000_000))
    answer = await mesh.chat(caller, model="m", messages=HELLO * 10_000)
    assert answer.status == 200
    assert len(mesh.sent["messages"]) == 10_000
    assert (await mesh.settlement(caller))["usage_source"] == "reported"


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_of_33_mib(mesh, chunked):
    caller = await mesh.key()
    size = 33 * 1024 * 1024

    async def pieces():
        for _ in range(33):
            yield b" " * (1024 * 1024)

    told = {"content-type": "application/json", **caller.auth}
    data = pieces() if chunked else b" " * size
    answer = await mesh.request("POST", "/v1/chat/completions", data=data, headers=told)
    assert (answer.status, answer.code) == (413, "request_too_large")
    assert str(LIMIT) in answer.error["message"]


async def test_a_large_body_that_fits(start_mesh):
    mesh = await start_mesh(models={"m": {**model("sim", "sim/plain?tokens=8"), "context_window": 10_000_000}})
    caller = await mesh.key(credit="100")
    answer = await mesh.chat(caller, model="m", messages=[{"role": "user", "content": "x" * 4_000_000}])
    assert answer.status == 200


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "x-unknown"])
async def test_compressed_bodies(mesh, coding):
    caller = await mesh.key()
    answer = await mesh.post(caller, gzip.compress(body().encode()), headers={"content-encoding": coding})
    assert (answer.status, answer.code) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer rsk_",
        "Bearer  ",
        "rsk_" + "x" * 43,
        "Basic cnNrX3g6",
        "Bearer rsk_x y",
        "Bearer rsk_x, Bearer rsk_y",
        "Bearer rsk_" + "x" * 5000,
        "Bearer rsk_é",
        "Bearer sk-proj-" + "x" * 43,
        "Token rsk_" + "x" * 43,
    ],
)
async def test_authorization_in_odd_shapes(mesh, authorization):
    caller = await mesh.key()
    line = b"" if authorization is None else f"authorization: {authorization}\r\n".encode("latin-1")
    status, headers, told = await exchange(mesh, line)
    assert (status, told["error"]["code"]) == (401, "unauthorized")
    assert headers[b"content-type"] == b"application/json"
    assert await mesh.spent(caller) == 0


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
async def test_the_scheme_is_read_as_rfc_9110_wants(mesh, scheme):
    caller = await mesh.key()
    status, _, _ = await exchange(mesh, f"authorization: {scheme} {caller.secret}\r\n".encode())
    assert status == 200


async def test_a_request_id_that_is_not_taken(mesh):
    caller = await mesh.key()
    line = f"authorization: Bearer {caller.secret}\r\nx-request-id: a b\r\n".encode()
    status, headers, _ = await exchange(mesh, line)
    assert status == 200
    assert headers[b"x-request-id"].startswith(b"req_")


async def test_a_request_id_cannot_bring_a_header_along(mesh):
    caller = await mesh.key()
    line = f"authorization: Bearer {caller.secret}\r\nx-request-id: a\r\nset-cookie: b=c\r\n".encode()
    status, headers, _ = await exchange(mesh, line)
    assert (status, headers[b"x-request-id"]) == (200, b"a")
    assert b"set-cookie" not in headers
    for bare in (b"\n", b"\r"):
        status, headers, _ = await exchange(mesh, b"x-request-id: a%bset-cookie: b=c\r\n" % bare)
        assert 400 <= status < 500
        assert b"set-cookie" not in headers


async def test_a_valid_request_id_is_kept(mesh):
    caller, given = await mesh.key(), "x" * 128
    answer = await mesh.chat(caller, model="sim/plain", headers={"x-request-id": given})
    assert answer.headers["x-request-id"] == given
    assert (await mesh.settlement(caller))["request_id"] == given
    assert (await mesh.chat(caller, model="no/such", headers={"x-request-id": given})).error["request_id"] == given


@pytest.mark.parametrize(
    "query",
    [
        "since=yesterday",
        "until=2026-13-01",
        "since=2026-01-02&until=2026-01-01",
        "group_by=colour",
        "since=0001-01-01T00:00:00%2B23:59",
        "until=0001-01-01T00:00:00",
        "until=9999-12-31T23:59:59-23:59",
        "since=1999-01-01",
        "since=" + "9" * 5000,
        "since=%00",
        "since=2026-01-01&since=2026-01-02",
    ],
)
async def test_bad_questions_about_usage(mesh, query):
    caller = await mesh.key()
    answer = await mesh.request("GET", f"/v1/usage?{query}", headers=caller.auth)
    assert (answer.status, answer.code) == (422, "validation_error")


@pytest.mark.parametrize("query", ["free=&free=nonsense", "free=true&free=true", "provider=a&provider=b"])
async def test_a_parameter_given_twice_is_refused(mesh, query):
    caller = await mesh.key()
    answer = await mesh.request("GET", f"/v1/models?{query}", headers=caller.auth)
    assert (answer.status, answer.code) == (422, "validation_error")


@pytest.mark.parametrize(
    "name", ["%00", "%ff", "x" * 5000, "%F0%9F%98%80", "a%0d%0ab", "..%2f..", "%ED%A0%80", "~", "*"]
)
@pytest.mark.parametrize("kind", ["models", "templates"])
async def test_odd_names_in_paths(mesh, kind, name):
    caller = await mesh.key()
    lines = ["host: m", f"authorization: Bearer {caller.secret}", "connection: close"]
    got = await mesh.raw("\r\n".join([f"GET /v1/{kind}/{name} HTTP/1.1", *lines, "\r\n"]).encode())
    assert got.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400"))
    assert json.loads(got.partition(b"\r\n\r\n")[2])["error"]["code"]


@pytest.mark.parametrize(
    "given",
    [
        b"",
        b"[]",
        b"{",
        b'{"name":1}',
        b'{"name":"a/b","system":"s"}',
        b"\xff",
        b"[" * DEEP,
        b'{"name":"t","system":"%b"}' % (b"x" * 2_000_000),
    ],
)
@pytest.mark.parametrize("method", ["POST", "PATCH"])
async def test_bad_templates(mesh, method, given):
    caller = await mesh.key()
    told = {"content-type": "application/json", **caller.auth}
    path = "/v1/templates"
    if method == "PATCH":
        good = json.dumps({"name": "t", "system": "s"}).encode()
        assert (await mesh.request("POST", path, data=good, headers=told)).status == 201
        path = "/v1/templates/t"
    answer = await mesh.request(method, path, data=given, headers=told)
    assert (answer.status, answer.code) == (422, "validation_error")


@pytest.mark.parametrize(
    "content",
    [
        "x" * 40_000,
        "\U0001f600" * 20_000,
        [{"type": "text", "text": "x" * 40_000}],
        [{"type": "text", "text": "x" * 40_000, "deep": json.loads("[" * 300 + "]" * 300)}],
    ],
)
async def test_middle_out_of_odd_messages(start_mesh, content):
    mesh = await start_mesh(
        models={"m": {**model("sim", "sim/plain?tokens=8"), "context_window": 8192, "max_output_tokens": 64}}
    )
    caller = await mesh.key()
    answer = await mesh.chat(
        caller, model="m", transforms=["middle-out"], messages=[{"role": "user", "content": content}]
    )
    assert answer.status == 200, answer.body
    assert len(mesh.received[0].raw_body) < 33_000


async def exchange(mesh, lines):
    """A chat completion by hand with more header lines: status, headers and the JSON of the answer."""
    data = body().encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: m\r\nconnection: close\r\ncontent-type: application/json\r\n"
    got = await mesh.raw(head + lines + b"content-length: %d\r\n\r\n" % len(data) + data)
    told, _, text = got.partition(b"\r\n\r\n")
    first, *rest = told.split(b"\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(b": ") for line in rest)}
    return int(first.split()[1]), headers, json.loads(text)


async def test_an_address_that_is_not_on_the_list_gets_nothing(start_mesh):
    mesh = await start_mesh(server={"allowed_clients": ["192.0.2.0/24"]})
    caller = await mesh.key()
    inside, outside = (
        {**caller.auth, "x-forwarded-for": "192.0.2.7"},
        {**caller.auth, "x-forwarded-for": "198.51.100.1"},
    )
    for method, path, body in (("POST", "/v1/chat/completions", b"{}"), ("GET", "/v1/models", b"")):
        refused = await mesh.request(method, path, headers=outside, data=body)
        assert (refused.status, refused.json["error"]["code"]) == (403, "forbidden")
        assert (await mesh.request(method, path, headers=inside, data=body)).status != 403


async def test_an_address_that_fails_too_often_has_to_wait(start_mesh):
    mesh = await start_mesh(server={"failed_logins_per_minute": 2})
    caller = await mesh.key()
    wrong = {"authorization": "Bearer rsk_wrong"}
    assert [(await mesh.request("GET", "/v1/models", headers=wrong)).status for _ in range(3)] == [401, 401, 429]
    refused = await mesh.chat(caller, messages=HELLO)
    assert (
        refused.status,
        refused.json["error"]["code"],
        refused.headers["retry-after"],
    ) == (429, "rate_limit_exceeded", "30")
    elsewhere = {**caller.auth, "x-forwarded-for": "192.0.2.7"}
    assert (await mesh.request("GET", "/v1/models", headers=elsewhere)).status == 200
