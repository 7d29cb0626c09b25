import io
import json
import logging
import re
import warnings

import pytest
import structlog

from meshproxy.telemetry.logs import LEVELS, RequestLog, configure

FIELDS = {
    "request_id": "req_1",
    "key_id": "key_1",
    "account": "acme",
    "model": "openai/gpt-4o",
    "upstream": "openai",
    "attempts": 1,
    "status": 200,
    "code": None,
    "stream": True,
    "prompt_tokens": 12,
    "completion_tokens": 34,
    "cost_usd": "0.00037",
    "usage_source": "reported",
    "outcome": "completed",
    "ttft_ms": 312.5,
    "duration_ms": 2381.25,
    "overhead_ms": 0.41,
}


@pytest.fixture(autouse=True)
def restore():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(capture=False)
    logging.getLogger("aiohttp.access").setLevel(logging.NOTSET)
    structlog.reset_defaults()


@pytest.fixture
def start():
    sinks = []

    def start(level="info", form="json"):
        stream = io.BytesIO()
        sink = configure(level, form, stream)
        sinks.append(sink)

        def text():
            sink.flush()
            return stream.getvalue().decode()

        return sink, text

    yield start
    for sink in sinks:
        sink.close()


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_an_event_is_one_line_of_json(start):
    _, text = start()
    structlog.get_logger("meshproxy.app").warning("reload_failed", faults=["a: b"], path=object)
    (line,) = lines(text())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("timestamp"))
    assert line == {
        "level": "warning",
        "event": "reload_failed",
        "logger": "meshproxy.app",
        "faults": ["a: b"],
        "path": "<class 'object'>",
    }
    assert list(lines(text())[0])[:3] == ["timestamp", "level", "event"]


def test_levels(start):
    _, text = start("warning")
    structlog.get_logger().info("quiet")
    logging.getLogger("aiohttp").info("quiet")
    structlog.get_logger().error("loud")
    assert [line["event"] for line in lines(text())] == ["loud"]


def test_the_standard_librarys_records_come_in_the_same_shape(start):
    _, text = start()
    logging.getLogger("aiohttp.server").error("Error handling %s", "request")
    logging.getLogger("x").info("%d", "no number")
    assert [(line["level"], line["logger"], line["event"]) for line in lines(text())] == [
        ("error", "aiohttp.server", "Error handling request"),
        ("info", "x", "%d"),
    ]


def test_warnings_are_logged(start):
    _, text = start()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=True)
        warnings.warn("old habits", UserWarning, stacklevel=1)
        logging.captureWarnings(capture=False)
    (line,) = lines(text())
    assert (line["level"], line["logger"], "old habits" in line["event"]) == ("warning", "py.warnings", True)


@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.parametrize("logger", [structlog.get_logger("a"), logging.getLogger("b")])
def test_a_traceback_shows_no_locals(start, form, logger):
    _, text = start(form=form)
    prompt = "the prompt of a customer, " * 2
    try:
        len(0 if prompt else 1)
    except TypeError:
        logger.exception("bug")
    shown = text()
    assert "TypeError" in shown
    assert "the prompt of a customer" not in shown


@pytest.mark.parametrize("form", ["json", "console"])
def test_no_secret_is_logged(start, form):
    _, text = start(form=form)
    secret, provider = "rsk_0123456789abcdef", "sk-proj-0123456789abcdef"
    structlog.get_logger().info("x", key=secret, nested={"a": [provider]}, header=f"Bearer {secret}")
    logging.getLogger("aiohttp").info("asked with %s\n%s", secret, provider)
    try:
        int(f"bad key\n{provider}")
    except ValueError:
        structlog.get_logger().exception("bug")
    shown = text()
    assert "[redacted]" in shown
    assert "0123456789abcdef" not in shown


def test_console_is_for_people(start):
    _, text = start(form="console")
    structlog.get_logger().info("serving", data="127.0.0.1:8080")
    assert re.search(r"info +\] serving +data=127\.0\.0\.1:8080\n", text())


def test_reconfigured_loggers_write_to_the_new_stream(start):
    log = structlog.get_logger()
    _, old = start()
    log.info("one")
    _, new = start("error")
    log.info("two")
    log.error("three")
    assert tuple([line["event"] for line in lines(text())] for text in (old, new)) == (["one"], ["three"])


def test_what_json_cannot_say_is_spelled(start):
    _, text = start()
    structlog.get_logger().info("odd", surrogate="\ud800", big=2**70, number=float("nan"))
    (line,) = lines(text())
    assert (line["surrogate"], line["big"]) == ("\ud800", 2**70)


def test_the_line_of_a_request(start):
    sink, text = start()
    RequestLog(sink, clock=lambda: 1700000000.0625).write(FIELDS)
    (line,) = lines(text())
    assert line == {
        "timestamp": "2023-11-14T22:13:20.062Z",
        "level": "info",
        "event": "request",
        "logger": "request",
        **FIELDS,
    }


def test_the_line_has_the_shape_of_an_event(start):
    sink, text = start()
    RequestLog(sink).write(FIELDS)
    structlog.get_logger("request").info("request", **FIELDS)
    fast, slow = (line.keys() for line in lines(text()))
    assert fast == slow


def test_the_clocks_second_is_told_anew(start):
    sink, text = start()
    times = iter([0.9375, 1.0, 1.0625])
    log = RequestLog(sink, clock=lambda: next(times))
    for _ in range(3):
        log.write(FIELDS)
    assert [line["timestamp"][17:23] for line in lines(text())] == ["00.937", "01.000", "01.062"]


def test_a_servers_failure_is_a_warning(start):
    sink, text = start()
    log = RequestLog(sink, "warning")
    log.write(FIELDS)
    log.write({**FIELDS, "status": 502, "code": "upstream_error"})
    assert [(line["level"], line["status"]) for line in lines(text())] == [("warning", 502)]


def test_odd_strings_break_no_line(start):
    sink, text = start()
    RequestLog(sink).write({**FIELDS, "model": "\ud800\n", "request_id": "rsk_0123456789abcdef"})
    (line,) = lines(text())
    assert (line["model"], line["request_id"]) == ("\ud800\n", "[redacted]")


def test_without_a_sink_a_request_is_an_event():
    with structlog.testing.capture_logs() as seen:
        RequestLog().write(FIELDS)
    told = {name: value for name, value in FIELDS.items() if value is not None}
    assert seen == [{"event": "request", "log_level": "info", **told}]


def test_in_the_consoles_format_a_request_is_an_event(start):
    sink, text = start(form="console")
    RequestLog(sink, "info", "console").write(FIELDS)
    assert "request_id=req_1" in text()
    assert LEVELS["info"] == logging.INFO
