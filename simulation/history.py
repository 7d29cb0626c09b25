"""A history: accounts, keys, prices, and steps in time.

It is data: it can be printed, shrunk and replayed. `drawing.draw` draws it from a seed, `story.play` plays it on a
gateway, `judge.judge` decides whether what came of it is right.
"""

from collections.abc import Mapping
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import fields

from simulation.accounts import AccountPlan, KeyPlan

HEARTBEAT_S = 5.0
HOLD_TTL_S = 20.0
LEASE_TOKENS = 16
DEFAULT_OUTPUT_TOKENS = 64
FIRST_BYTE_S = 30.0
IDLE_S = 20.0
WRITE_TIMEOUT_S = 30.0
DRAIN_S = 20.0
STORE_TIMEOUT_S = 2.0
WRITES_WITHIN_S = 30.0
ALLOWANCE_NUSD = 6_000_000
MAX_OUTPUT_TOKENS = 400  # of every model
CONTEXT_WINDOW = 40_000
PROVIDER_SECRET = "sim-5JvPz8QkW2xR"  # of a configured header; each provider repeats it in its errors
DIALECTS = (
    *("openai", "azure", "openrouter", "anthropic", "gemini", "xai", "mistral", "groq", "deepseek", "perplexity"),
    *("moonshot", "vllm", "ollama", "tgi"),
)

# What a provider does wrong in the report of its usage. "true": nothing.
Lie = Literal[
    "true",
    "none",
    "twice",
    "early",
    "zeros",
    "zeros_after",
    "absurd",
    "negative",
    "words",
    "floats",
    "strings",
    "no_prompt",
    "no_completion",
]
# How an answer ends. "whole": as it should. `resets`, `closes` and `stalls` happen at `Answer.at`.
End = Literal["whole", "resets", "closes", "stalls", "error_event", "no_done", "late_error", "done_twice", "ends_early"]
FaultKind = Literal[
    "lost_reply", "refused", "slow", "gone", "failover", "flush", "clock", "full", "disk_full", "disk_fails"
]
WorkerEventKind = Literal["killed", "killed_writing", "drained", "reloaded", "bad_reload"]
ChangeKind = Literal[
    "grant",
    "grant_twice",
    "requests_per_minute",
    "suspend",
    "suspend_account",
    "activate",
    "revoke",
    "template",
    "template_dropped",
    "look",
]
# What else than text may be in the deltas.
Kind = Literal["text", "reasoning", "tool", "refusal"]


class Price(Struct, frozen=True, omit_defaults=True, repr_omit_defaults=True):
    """A model's prices: nano-USD a million tokens, and a fee a request. `reasoning` is at most `output`.

    `tiers`: the prices of a whole request whose prompt has more tokens than so many, ascending.
    """

    input: int = 2_500_000_000
    output: int = 10_000_000_000
    cached: int | None = None
    request: int = 0
    tiers: tuple[tuple[int, "Price"], ...] = ()
    reasoning: int | None = None

    @property
    def all(self) -> tuple["Price", ...]:
        """The price, and those of its tiers."""
        return (self, *(price for _, price in self.tiers))

    def of_output(self, tokens: int) -> int:
        """Return what so many tokens of output cost, in nano-USD, in this tier and without the fee."""
        return -(-tokens * self.output // 1_000_000)

    def cost(self, prompt: int, cached: int, completion: int, reasoning: int = 0) -> int:
        """Return what these tokens cost, in nano-USD, rounded up once. `reasoning` tokens are some of `completion`."""
        for above, price in reversed(self.tiers):
            if prompt > above:
                return price.cost(prompt, cached, completion, reasoning)
        at_cached = self.input if self.cached is None else self.cached
        at_reasoning = self.output if self.reasoning is None else self.reasoning
        total = (prompt - cached) * self.input + cached * at_cached
        total += (completion - reasoning) * self.output + reasoning * at_reasoning
        return (self.request if prompt or completion else 0) + -(-total // 1_000_000)


class Model(Struct, frozen=True, omit_defaults=True, repr_omit_defaults=True):
    """A model of the configuration. `routes`: names of upstreams, in the order in which they are asked.

    `services`: the prices of its service tiers by name. `weights`: of its first upstreams, which are equals.
    """

    routes: tuple[str, ...]
    price: Price = Price()
    hidden_reasoning: bool = False
    from_usage_cost: bool = False
    context_window: int = CONTEXT_WINDOW
    services: tuple[tuple[str, Price], ...] = ()
    weights: tuple[int, ...] = ()

    def equals(self, route: str) -> tuple[str, ...]:
        """Return the upstreams that are equals of one of them, and itself; nothing if it has none."""
        group = self.routes[: len(self.weights)]
        return group if route in group else ()

    @property
    def prices(self) -> tuple[Price, ...]:
        """All prices that a request for it may have."""
        return (self.price, *(price for _, price in self.services))

    def price_in(self, *tiers: str) -> Price:
        """Return the price in the first of these service tiers that has one, or is a standard one."""
        named = dict(self.services)
        found = next((tier for tier in tiers if tier in STANDARD_TIERS or tier in named), "")
        return named.get(found, self.price)


class Upstream(Struct, frozen=True, omit_defaults=True, repr_omit_defaults=True):
    """An upstream of the configuration. `is_there`: whether anything listens at its address."""

    cap_field: str = "max_tokens"
    kind: str = "openai"
    drains: bool = False
    asks_usage: bool = True
    is_there: bool = True


STANDARD_TIERS = frozenset({"auto", "default", "standard", "on_demand"})  # docs/ledger.md: at the model's own prices
UPSTREAMS = {
    "one": Upstream(),
    "two": Upstream(cap_field="max_completion_tokens"),
    "drained": Upstream(drains=True),
    "unasked": Upstream(asks_usage=False),
    "gone": Upstream(is_there=False),
}
SKEWED = 1_000_000  # times as much as the weight of its equal: in a million requests one goes there
MODELS = {
    "plain": Model(("one",), Price(cached=1_250_000_000)),
    "pair": Model(("one", "two")),
    "gone-first": Model(("gone", "two"), Price(3_000_000_000, 7_000_000_000)),
    "drained": Model(("drained",)),
    "drained-first": Model(("drained", "two")),
    "thinking": Model(("one",), hidden_reasoning=True),
    "told": Model(("two",), from_usage_cost=True),
    "reasoned": Model(("two",), Price(2_000_000_000, 8_000_000_000, reasoning=3_000_000_000)),  # as sonar-deep-research
    "fee": Model(("two",), Price(1_000_000_000, 4_000_000_000, request=3_000_000)),
    "odd": Model(("unasked",), Price(333_333_333, 999_999_999, cached=111_111_111)),
    "free": Model(("one",), Price(0, 0)),
    "tiered": Model(  # a prompt of 6 words has 20 tokens, one of 40 has 51
        ("one",),
        Price(
            2_000_000_000,
            8_000_000_000,
            cached=1_000_000_000,
            tiers=((20, Price(4_000_000_000, 12_000_000_000)), (51, Price(5_000_000_000, 20_000_000_000, 500_000_000))),
        ),
    ),
    "served": Model(
        ("two",),
        services=(
            ("flex", Price(1_000_000_000, 4_000_000_000)),
            ("priority", Price(5_000_000_000, 20_000_000_000, tiers=((51, Price(9_000_000_000, 30_000_000_000)),))),
        ),
    ),
}
GROUPS = {  # drawn in some histories alone
    "shared": Model(("one", "two", "drained"), weights=(3, 1)),
    "skewed": Model(("two", "one"), weights=(SKEWED, 1)),
}
ORDINARY = tuple(MODELS)
MODELS |= GROUPS
# What a request may have beside what decides over its answer, with the tokens of o200k_base that this adds to its prompt.
OPTIONS: Mapping[str, tuple[Any, int]] = {  # fields
    "user": ("Größe 7", 0),
    "temperature": (0.7, 0),
    "top_p": (1, 0),
    "frequency_penalty": (-0.5, 0),
    "stop": (["\n\n", "END"], 0),
    "seed": (-7, 0),
    "tool_choice": ("auto", 0),
    "tools": (
        [
            {
                "type": "function",
                "function": {
                    "name": "look_up",
                    "description": "Look up the depth of a river.",
                    "parameters": {
                        "type": "object",
                        "properties": {"river": {"type": "string"}},
                        "required": ["river"],
                    },
                },
            }
        ],
        59,
    ),
    "response_format": (
        {
            "type": "json_schema",
            "json_schema": {
                "name": "depth",
                "schema": {"type": "object", "properties": {"depth_m": {"type": "number"}}},
            },
        },
        41,
    ),
    "metadata": ({"team": "Größe & Maß", "ticket": "A-17"}, 17),
    "top_k": (40, 1),  # a field that OpenAI doesn't have
}
TURNS: Mapping[str, tuple[tuple[Mapping[str, Any], int], ...]] = {  # messages before its own, without their frames
    "system": (({"role": "system", "content": "You answer in one short sentence, and never guess."}, 11),),
    "said": (
        ({"role": "user", "content": "How deep is it in summer?"}, 7),
        ({"role": "assistant", "content": "Two metres, at most."}, 6),
    ),
    "called": (
        (
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "look_up", "arguments": '{"river": "Ob"}'},
                    }
                ],
            },
            8,
        ),
        ({"role": "tool", "tool_call_id": "call_1", "content": '{"depth_m": 2.0}'}, 9),
    ),
}
ENDINGS: Mapping[str, tuple[str, int]] = {  # after the words of its own message
    "unicode": (" Größe: 5 m², Привет, мир; 東京 🙂 e\u0301", 17),
    "escapes": (' a "quoted" line\n\tand \\ back/slash \u0001 \u2028 <b>&amp;', 18),
}
# What an answer's bytes may be beside a stream's usual ones (WHATWG HTML, "Server-sent events", 9.2.6): a byte order mark,
# lines that end in CR or CRLF, no space after `data:`, an event's data in two lines.
FORMS = ("bom", "crlf", "cr", "bare", "lines", "bare+crlf", "lines+cr", "bom+bare+lines+crlf")
TEMPLATE = "greeting"
DROPPED = 0  # the version of the global template, which is used where an account has none of its own


def template_system(version: int) -> str:
    """Return the system message of a version of TEMPLATE, with its slot."""
    return f"Version {version}: answer in {{{{ manner }}}} words,{' and be kind' * (version % 3)}."


def first_version(account: int) -> int:
    """Return the version of TEMPLATE that an account has at first: no two accounts have the same."""
    return 1 + 100 * account


def rendered(version: int, manner: str) -> str:
    """Return the system message that goes to a provider."""
    return template_system(version).replace("{{ manner }}", manner)


class Answer(Struct, frozen=True, omit_defaults=True, repr_omit_defaults=True):
    """What a provider does with one call.

    `words`: the tokens of text that it wants to write, for each choice. `hidden`: tokens of reasoning that it bills
    and doesn't show. `gap_s`: between events. `delay_s`: before the head. `pause_s`: between its head and its body.
    `lingers_s`: between its last event and the end of its body. `status`: an error's, or 200; `error` is which. `at`: the
    share of the body that is sent before the end. `pieces`: in how many bytes writes are cut; 0: an event each.
    `heeds_cap`: whether a cap stops it. `bulk`: bytes that each event has beside its text. `tier`: the service tier that
    it names; "asked": the request's. `form`: in which bytes it is written, of FORMS. `dated`: its wait is told as a date.
    """

    dialect: str = "openai"
    words: int = 8
    per_event: int = 1
    hidden: int = 0
    cached: int = 0
    gap_s: float = 0.0
    delay_s: float = 0.0
    status: int = 200
    error: str = ""
    wait_s: float | None = None
    lie: Lie = "true"
    kind: Kind = "text"
    end: End = "whole"
    at: float = 1.0
    pieces: int = 0
    framing: Literal["chunked", "close", "length"] = "chunked"
    gzip: bool = False
    content_type: str | None = ""
    other_shape: bool = False
    comments: int = 0
    heeds_cap: bool = True
    pause_s: float = 0.0
    lingers_s: float = 0.0
    bulk: int = 0
    tier: str = ""
    form: str = ""
    dated: bool = False

    @property
    def is_good(self) -> bool:
        """Whether it is an answer that a client can be given whole."""
        ends_well = self.end in {"whole", "done_twice", "late_error"}
        return self.status == 200 and not self.error and ends_well and not self.is_silent

    @property
    def refuses(self) -> Literal["", "request", "model", "gateway"]:
        """What its error refuses (docs/errors.md): a request everywhere, or only by this model, or the gateway."""
        if self.error in {"context", "parameter", "large", "endpoint"}:
            return "model"
        if self.error == "flagged":
            return "request"
        return "gateway" if self.error in {"key", "permission", "model", "credit", "balance", "bad_key"} else ""

    @property
    def is_silent(self) -> bool:
        """Whether it comes later than an upstream is waited for, or stops for longer."""
        return self.end == "stalls" or self.delay_s > FIRST_BYTE_S or max(self.pause_s, self.gap_s) > IDLE_S


class Request(Struct, frozen=True, omit_defaults=True, repr_omit_defaults=True):
    """One client's request.

    `at_s`: when it is sent. `name`: of it alone; its text has a marker made of this, or of the name of what it repeats.
    `repeats`: the name of the request whose Idempotency-Key and body this one sends again; with `other_body` another body.
    `text_of`: the name of a request whose body and Idempotency-Key it sends with another key.
    `answers`: what the providers do with the first call, the second, ...; the last stands for all that follow. `reads`:
    how the client does so: "all", "slowly", or it "hangs_up" `after` so many bytes, "half_closes" then, "leaves" after so many
    seconds, or "stalls" after so many bytes and reads no more. `waits`: after a 429, or where all providers fail, it is
    sent once more, exactly when it was told to. `tier`: its service tier. `template`: the template that it names, and
    `manner` the value of its slot; None: it has none. `named`: the text of its Idempotency-Key; "": its marker.
    `options`, `turns`, `ending`: names of what it has of OPTIONS, TURNS and ENDINGS. `in_parts`: its message's content is
    a list. `escaped`: its JSON is ASCII. `invalid`: what of INVALID is wrong with it.
    """

    name: str
    at_s: float = 0.0
    key: int = 0
    model: str = "plain"
    fallbacks: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    n: int = 1
    max_tokens: int | None = None
    timeout_s: float | None = None
    prompt_words: int = 6
    keyed: bool = False
    named: str = ""
    other_body: bool = False
    repeats: str = ""
    text_of: str = ""
    session: str = ""
    reads: Literal["all", "slowly", "hangs_up", "half_closes", "leaves", "stalls"] = "all"
    after: float = 0.0
    sends_in: int = 1
    worker: int = 0
    connection: str = ""
    waits: bool = False
    tier: str = ""
    template: str = ""
    manner: str | None = None
    options: tuple[str, ...] = ()
    turns: tuple[str, ...] = ()
    ending: str = ""
    in_parts: bool = False
    escaped: bool = False
    invalid: str = ""
    answers: tuple[Answer, ...] = (Answer(),)


class Fault(Struct, frozen=True, omit_defaults=True, repr_omit_defaults=True):
    """Something that happens to the store, `for_s` long.

    `lost_reply`: the next `count` commands run and their connection closes instead of a reply. `refused`: writes are
    (READONLY). `full`: writes that need memory are. `slow`: replies take `delay_s`. `gone`: no connection. `failover`: gone,
    and then as it was a second before. `flush`: it forgets its scripts. `clock`: its clock jumps by `delay_s`.
    `disk_full`, `disk_fails`: of the gateway's machine; no file can be written, or `room` bytes at most.
    """

    at_s: float
    what: FaultKind
    for_s: float = 0.0
    delay_s: float = 0.0
    count: int = 1
    room: int = 0


class Outage(Struct, frozen=True, omit_defaults=True, repr_omit_defaults=True):
    """An upstream that gives every call the same answer, for so long. A request's own answers are for its other calls."""

    at_s: float
    upstream: str = "one"
    for_s: float = 0.0
    answer: Answer = Answer(status=500, error="failed")


class WorkerEvent(Struct, frozen=True, omit_defaults=True, repr_omit_defaults=True):
    """Something that happens to a worker: it is killed (and another begins `for_s` later) or drained, or all reload.

    `killed_writing`: at its next write to the disk from then on, or after WRITES_WITHIN_S without one. A reload has other
    `prices` of models, other upstreams of them (`routes`), or another path in the address of an upstream (`places`).
    """

    at_s: float
    what: WorkerEventKind
    worker: int = 0
    for_s: float = 1.0
    prices: tuple[tuple[str, Price], ...] = ()
    routes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    places: tuple[tuple[str, str], ...] = ()


class Change(Struct, frozen=True, omit_defaults=True, repr_omit_defaults=True):
    """An operator's change: a grant (of nano-USD), another limit of a key, a suspension, a revocation.

    `template`: another version (`amount`) of the account's own template. `look`: no change, the account is read.
    """

    at_s: float
    what: ChangeKind
    account: int = 0
    key: int = 0
    amount: int = 0


Step = Request | Fault | WorkerEvent | Change | Outage


class History(Struct, frozen=True, omit_defaults=True, repr_omit_defaults=True):
    """All that happens, and to whom. `credit`: what each account is granted at the beginning, in nano-USD.

    `fast_path`: without it aiohttp's server takes all requests. `journal_bytes`: a journal's size at most. `kept_bytes`: an
    answer's that is kept for repeats. `accounts`: limits and budgets of the first accounts. `midnight_s`: when a day ends
    (UTC), in seconds as `at_s`; None: at any time. `ends_month`: whether a month does then.
    """

    seed: int
    profile: str
    credit: tuple[int, ...] = (1_000_000_000,)
    keys: tuple[KeyPlan, ...] = (KeyPlan(),)
    workers: int = 1
    local: bool = False
    fast_path: bool = True
    journal_bytes: int | None = None
    kept_bytes: int | None = None
    accounts: tuple[AccountPlan, ...] = ()
    midnight_s: float | None = None
    ends_month: bool = False
    steps: tuple[Step, ...] = ()

    def account(self, number: int) -> AccountPlan:
        """Return the limits and budgets of an account."""
        return self.accounts[number] if number < len(self.accounts) else AccountPlan()

    @property
    def requests(self) -> list[Request]:
        """The requests among the steps."""
        return [step for step in self.steps if isinstance(step, Request)]

    @property
    def faults(self) -> list[Fault]:
        """What happens to the store."""
        return [step for step in self.steps if isinstance(step, Fault)]

    @property
    def worker_events(self) -> list[WorkerEvent]:
        """What happens to workers."""
        return [step for step in self.steps if isinstance(step, WorkerEvent)]

    @property
    def changes(self) -> list[Change]:
        """What an operator changes."""
        return [step for step in self.steps if isinstance(step, Change)]

    @property
    def fills_disks(self) -> bool:
        """Whether a journal may refuse a settlement."""
        return self.journal_bytes is not None or any(fault.what in {"disk_full", "disk_fails"} for fault in self.faults)


def describe(history: History) -> list[str]:
    """Describe a history in lines, for people. Fields with their usual values are left out."""
    lines = [
        f"seed {history.seed} ({history.profile}): {history.workers} workers, on_failure = "
        + ("local" if history.local else "deny")
        + ("" if history.fast_path else ", fast_path = false")
        + ("" if history.journal_bytes is None else f", journal_max_bytes = {history.journal_bytes}")
        + ("" if history.kept_bytes is None else f", idempotency.max_bytes = {history.kept_bytes}")
    ]
    if history.midnight_s is not None:
        lines.append(f"  a {'month' if history.ends_month else 'day'} ends at {history.midnight_s:g}")
    plans = [history.account(number) for number in range(len(history.credit))]
    lines += [
        f"  account a{number}: {credit / 1e9:.9f} USD" + (f", {_shown(plan)}" if plan != AccountPlan() else "")
        for number, (credit, plan) in enumerate(zip(history.credit, plans, strict=True))
    ]
    lines += [f"  key k{number}: {_shown(key)}" for number, key in enumerate(history.keys)]
    return lines + [f"  {_shown(step)}" for step in history.steps]


def _shown(value: Any) -> str:
    """Return a value as Python, without fields that equal their defaults (msgspec's own repr leaves out those that are them)."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))}{',' * (len(value) == 1)})"
    if not isinstance(value, Struct):
        return repr(value)
    pairs = ((field, getattr(value, field.name)) for field in fields(value))
    differing = (f"{field.name}={_shown(each)}" for field, each in pairs if each != field.default)
    return f"{type(value).__name__}({', '.join(differing)})"
