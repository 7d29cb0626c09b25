"""What a worker hears that is just starting. The rest of the supervisor's work is tested on processes, in tests/deploy."""

from msgspec.structs import replace

from meshproxy.app.reload import Standing
from meshproxy.app.supervisor import Child, Supervisor
from meshproxy.config import Secrets, Settings

FIRST = Standing(Settings(), Secrets({}))
FAILED = replace(FIRST, reload_failed=True)


class Line:
    """A control that keeps what it is asked, and is told by a test what happens meanwhile."""

    def __init__(self, meanwhile):
        self.asked = []
        self._meanwhile = meanwhile

    async def ask(self, question):
        self.asked.append(question)
        self._meanwhile()
        return b"\xc0"


async def test_a_worker_hears_what_changed_while_it_was_starting():
    supervisor = Supervisor(FIRST, [None])

    def a_reload_fails():
        supervisor.standing = FAILED

    line = Line(a_reload_fails)
    assert await supervisor._brief(Child(1, 0, None, line))
    assert [FIRST, FAILED] == line.asked
    assert supervisor.up.is_set()


async def test_not_all_are_up_before_the_last_is():
    supervisor = Supervisor(FIRST, [None, None])
    assert await supervisor._brief(Child(1, 0, None, Line(lambda: None)))
    assert not supervisor.up.is_set()
    assert await supervisor._brief(Child(2, 0, None, Line(lambda: None)))
    assert supervisor.up.is_set()


async def test_one_who_is_gone_before_it_serves_is_no_worker():
    def gone():
        raise ConnectionError

    supervisor = Supervisor(FIRST, [None])
    assert not await supervisor._brief(Child(1, 0, None, Line(gone)))
    assert [] == supervisor.workers()
