"""The status page in a real browser, over a real gateway."""

# ruff: noqa: F401, F811 - fixtures of another file

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.cases.test_operators import TOKEN, Operator, account, create, gateway, operator
from tests.harness.process import Program
from tests.harness.waiting import PATIENCE_S, until

CHROMIUM = shutil.which("chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--remote-debugging-port=0", "about:blank"),
)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")


class Page:
    """A tab, over the DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._count = 0

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        await self._socket.send_json({"id": self._count, "method": method, "params": params})
        async with asyncio.timeout(PATIENCE_S):
            while True:
                told = await self._socket.receive_json()
                if told.get("id") == self._count:
                    assert "error" not in told, told
                    return told["result"]

    async def run(self, script: str) -> Any:
        """What an expression gives."""
        told = await self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    async def until(self, script: str) -> Any:
        """What an expression gives once that is true."""
        return await until(lambda: self.run(script), script)

    async def fill(self, form: str, **fields: str) -> None:
        """Fill a form in and send it."""
        for name, value in fields.items():
            await self.run(f"document.forms.{form}.elements.{name}.value = {json.dumps(value)}")
        await self.run(f"document.forms.{form}.requestSubmit()")

    async def find(self, account: str) -> None:
        """Find an account by its name, whatever page of the list it is on."""
        await self.run(
            "(field => {"
            f"field.value = {json.dumps(account)};"
            "field.dispatchEvent(new Event('input')); field.dispatchEvent(new Event('change'));"
            "})(document.getElementById('find'))"
        )
        await self.until(
            f"[...document.querySelectorAll('#accounts button')].some(b => b.textContent === {json.dumps(account)})"
        )

    async def press(self, text: str) -> None:
        """Press the last button with these words."""
        await self.run(
            f"[...document.querySelectorAll('button')].filter(b => b.textContent === {json.dumps(text)}).pop().click()"
        )


@pytest.fixture
async def page(tmp_path: Path) -> AsyncIterator[Page]:
    with Program(CHROMIUM, f"--user-data-dir={tmp_path / 'profile'}", *FLAGS, log=tmp_path / "log") as browser:
        port = await until(lambda: _port(tmp_path / "profile" / "DevToolsActivePort"), "the browser")
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                tab = next(each for each in await answer.json() if each["type"] == "page")
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                yield Page(socket)
        browser.stop()


def _port(file: Path) -> str:
    return file.read_text().splitlines()[0] if file.exists() and file.read_text() else ""


async def test_a_key_is_created_used_rotated_and_suspended(page, operator: Operator, account):
    await page.send("Page.navigate", url=operator.gateway.admin.replace("://", f"://operator:{TOKEN}@") + "/")
    await page.until(
        "document.getElementById('state')?.textContent === 'ready' && !document.getElementById('administration-on').hidden"
    )
    await page.fill("grant", account=account, amount_usd="12.50", ref="inv-1")
    await page.until(f"document.getElementById('chosen-name').textContent === '{account}'")
    await page.fill("create", name="from the page", models="m/good, m/short")
    secret = await page.until(
        "document.getElementById('secret').open && document.getElementById('secret-text').textContent"
    )
    await page.press("I have stored it")
    assert secret not in await page.run("document.documentElement.innerHTML")
    assert (await operator.ask(secret)).status == 200
    assert (await operator.ask(secret, "m/dies", stream=True)).status == 403
    await until(lambda: operator.data("usage", "--account", account), "the settlement")
    await page.find(account)
    await page.press(account)
    await page.until("/1 requests/.test(document.getElementById('spend-words').textContent)")
    await page.press("Rotate")
    rotated = await page.until(
        "document.getElementById('secret').open && document.getElementById('secret-text').textContent"
    )
    await page.press("I have stored it")
    await operator.becomes(rotated, 200)
    await page.run("document.querySelector('#keys button:nth-of-type(2)').click()")
    await page.until("document.querySelector('#keys .pill').textContent === 'suspended'")
    await operator.becomes(rotated, 403)


async def test_what_cant_be_is_said(page, operator: Operator, account):
    await page.send("Page.navigate", url=operator.gateway.admin.replace("://", f"://operator:{TOKEN}@") + "/")
    await page.until(
        "document.getElementById('administration-on') && !document.getElementById('administration-on').hidden"
    )
    await page.fill("grant", account=account, amount_usd="9000001")
    assert "more than" in await page.until("document.getElementById('wrong').textContent")


async def test_failures_and_upstreams_are_shown(page, operator: Operator, create):
    answer = await operator.ask(create()["key"], "m/bad")
    request_id = answer.headers["x-request-id"]
    await page.send("Page.navigate", url=operator.gateway.admin.replace("://", f"://operator:{TOKEN}@") + "/")
    await page.until(f"document.getElementById('failures')?.textContent.includes('{request_id}')")
    assert request_id in await page.run("document.getElementById('upstreams').textContent")


async def test_who_is_refused_is_shown(page, operator: Operator, create):
    made = create("--requests-per-minute", "1", "--burst", "1")
    statuses = [(await operator.ask(made["key"], "m/short")).status for _ in range(2)]
    await page.send("Page.navigate", url=operator.gateway.admin.replace("://", f"://operator:{TOKEN}@") + "/")
    shown = await page.until("document.getElementById('refusals')?.textContent")
    assert (statuses, True, True) == ([200, 429], made["account"] in shown, "key_requests" in shown)
