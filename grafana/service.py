"""The dashboards of the service: what somebody on call asks first. Change them here and run build.py."""

from panels import GREEN, RED, YELLOW, M, S, board, figure, heatmap, lines, quantile, quantiles, rate, share, total

CHAT = S + ',route="/v1/chat/completions"'
CHAT_M = M + ',route="/v1/chat/completions"'
WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")
BUDGET_STEPS = ((None, RED), (0.0, YELLOW), (0.25, GREEN))
OUTPUT = M + ',type="completion"'
FAILED, ENDED = S + ',code!~"[234]..|cancelled"', S + ',code!="cancelled"'
FAMILY = "meshproxy_{}_seconds".format


def _burn(record: str, budget: float) -> list[tuple[str, str]]:
    return [(f'job:{record}:ratio_rate{window}{{job=~"$job"}} / {budget}', window) for window in WINDOWS]


SLO = board(
    "slo",
    "SLO",
    "Both objectives and their budgets. Needs the recording rules of deploy/prometheus.",
    [
        figure(
            "Availability, 1 h",
            '1 - job:meshproxy_request_errors:ratio_rate1h{job=~"$job"}',
            unit="percentunit",
            width=6,
            about="Chat completions that didn't end in a 5xx. Objective: 99.9 %.",
            steps=((None, RED), (0.999, GREEN)),
        ),
        figure(
            "Availability budget left, 30 d",
            'job:meshproxy_availability_budget:remaining30d{job=~"$job"}',
            unit="percentunit",
            width=6,
            steps=BUDGET_STEPS,
        ),
        figure(
            "First token within 2 s, 1 h",
            '1 - job:meshproxy_slow_first_tokens:ratio_rate1h{job=~"$job"}',
            unit="percentunit",
            width=6,
            about="Of all streams. Objective: 95 %.",
            steps=((None, RED), (0.95, GREEN)),
        ),
        figure(
            "First token budget left, 30 d",
            'job:meshproxy_first_token_budget:remaining30d{job=~"$job"}',
            unit="percentunit",
            width=6,
            steps=BUDGET_STEPS,
        ),
        lines(
            "Availability: burn rate",
            _burn("meshproxy_request_errors", 0.001),
            limit=14.4,
            about="How many times too fast the budget burns. 1 uses it up in 30 days; 14.4 for an hour wakes somebody.",
        ),
        lines("First token: burn rate", _burn("meshproxy_slow_first_tokens", 0.05), limit=14.4),
        lines(
            "5xx by code",
            [(rate("meshproxy_requests_total", "code", CHAT + ',code=~"5.."'), "{{code}}")],
            unit="reqps",
            stacked=True,
        ),
        lines(
            "5xx by model",
            [(rate("meshproxy_requests_total", "model", CHAT + ',code=~"5.."'), "{{model}}")],
            unit="reqps",
            stacked=True,
        ),
    ],
)

TRAFFIC = board(
    "traffic",
    "Traffic",
    "What comes in, and what becomes of it.",
    [
        figure("Requests", rate("meshproxy_requests_total", where=CHAT_M), unit="reqps"),
        figure("Streams", total("meshproxy_in_flight_requests", where=S + ',phase="stream"'), about="Under way now."),
        figure(
            "In flight, of the cap",
            share(total("meshproxy_in_flight_requests"), total("meshproxy_in_flight_limit")),
            unit="percentunit",
            steps=((None, GREEN), (0.6, YELLOW), (0.8, RED)),
        ),
        figure("Output", rate("meshproxy_tokens_total", where=OUTPUT), unit="short", about="Tokens a second."),
        figure("Refused", rate("meshproxy_requests_total", where=CHAT_M + ',code=~"4.."'), unit="reqps", about="4xx."),
        figure("Instances", f"count(meshproxy_build_info{{{S}}})"),
        lines(
            "Requests by model",
            [(rate("meshproxy_requests_total", "model", CHAT_M), "{{model}}")],
            unit="reqps",
            stacked=True,
        ),
        lines(
            "Requests by status",
            [(rate("meshproxy_requests_total", "code", CHAT_M), "{{code}}")],
            unit="reqps",
            stacked=True,
        ),
        lines(
            "In flight by phase",
            [(total("meshproxy_in_flight_requests", "phase"), "{{phase}}")],
            stacked=True,
            about="A crowd in `admit` points to Redis, in `attempt` to a provider.",
        ),
        lines(
            "Clients that hung up",
            [(rate("meshproxy_client_disconnects_total", "phase"), "{{phase}}")],
            unit="reqps",
            stacked=True,
        ),
        lines(
            "Tokens",
            [(rate("meshproxy_tokens_total", "type", M), "{{type}}")],
            about="A second. cached and cache_write are parts of prompt, reasoning of completion.",
        ),
        lines("Requests by route", [(rate("meshproxy_requests_total", "route"), "{{route}}")], unit="reqps"),
    ],
    models=True,
)

LATENCY = board(
    "latency",
    "Latency",
    "How long clients wait, and how much of it is ours.",
    [
        heatmap("Time to first token", FAMILY("time_to_first_token"), where=M),
        lines("Time to first token", quantiles(FAMILY("time_to_first_token"), M), unit="s", limit=2),
        heatmap(
            "Time per output token",
            FAMILY("time_per_output_token"),
            where=M,
            about="After the first. 25 ms is 40 tokens a second.",
        ),
        lines("Time per output token", quantiles(FAMILY("time_per_output_token"), M), unit="s"),
        heatmap("Longest silence of a stream", FAMILY("stream_max_gap"), where=M),
        lines("Longest silence of a stream", quantiles(FAMILY("stream_max_gap"), M), unit="s"),
        heatmap("Whole request", FAMILY("request_duration"), where=M),
        lines(
            "Whole request",
            [
                (quantile(0.95, FAMILY("request_duration"), "stream", M), "p95, stream {{stream}}"),
                (quantile(0.5, FAMILY("request_duration"), "stream", M), "p50, stream {{stream}}"),
            ],
            unit="s",
        ),
        heatmap(
            "The gateway's own time",
            FAMILY("overhead"),
            about="Received to sent upstream, and first byte in to first byte out; the round trip to Redis is in it.",
        ),
        lines("The gateway's own time", quantiles(FAMILY("overhead")), unit="s"),
        lines(
            "First token by model, p95",
            [(quantile(0.95, FAMILY("time_to_first_token"), "model", M), "{{model}}")],
            unit="s",
            width=24,
        ),
    ],
    models=True,
)

UPSTREAMS = board(
    "upstreams",
    "Upstreams",
    "The providers, as the gateway sees them.",
    [
        figure("Attempts", rate("meshproxy_upstream_requests_total"), unit="reqps", width=6),
        figure(
            "Failing",
            share(
                rate("meshproxy_upstream_requests_total", where=FAILED),
                rate("meshproxy_upstream_requests_total", where=ENDED),
            ),
            unit="percentunit",
            width=6,
            steps=((None, GREEN), (0.05, YELLOW), (0.2, RED)),
        ),
        figure("Breakers open", total("meshproxy_upstream_breaker_open"), width=6, steps=((None, GREEN), (1, RED))),
        figure(
            "Streams broken off",
            rate("meshproxy_settlements_total", where=S + ',outcome="upstream_failed"'),
            unit="reqps",
            width=6,
            about="Providers that failed after their stream had begun.",
        ),
        lines(
            "Attempts by upstream",
            [(rate("meshproxy_upstream_requests_total", "upstream"), "{{upstream}}")],
            unit="reqps",
            stacked=True,
        ),
        lines(
            "Attempts by what came of them",
            [(rate("meshproxy_upstream_requests_total", "code"), "{{code}}")],
            unit="reqps",
            stacked=True,
        ),
        lines(
            "Failures by upstream and kind",
            [
                (
                    rate("meshproxy_upstream_requests_total", "upstream, code", S + ',code!~"[23]..|cancelled"'),
                    "{{upstream}} {{code}}",
                )
            ],
            unit="reqps",
        ),
        lines(
            "Breakers",
            [(f"max by (upstream) (meshproxy_upstream_breaker_open{{{S}}})", "{{upstream}}")],
            most=1,
            about="1: open.",
        ),
        lines(
            "Attempts a request",
            [(share(rate("meshproxy_upstream_requests_total"), rate("meshproxy_settlements_total")), "attempts")],
            about="More than 1: others stand in. Less: requests end before an attempt.",
        ),
        lines(
            "Usage reports refused",
            [(rate("meshproxy_usage_refused_total", "upstream, reason"), "{{upstream}} {{reason}}")],
            unit="ops",
            about="Reports that can't be true; these requests are billed by an estimate.",
        ),
        lines(
            "State",
            [
                (
                    f'max by (upstream, state) (meshproxy_upstream_state{{{S},state!="serving"}}) > 0',
                    "{{upstream}} {{state}}",
                )
            ],
            most=1,
            about="ejected: tried after its equals, for it fails; open: not tried at all. Nothing here: all serve.",
        ),
        lines(
            "First token by upstream, p95",
            [(quantile(0.95, FAMILY("upstream_time_to_first_token"), "upstream"), "{{upstream}}")],
            unit="s",
            about="The slow member of a pair stands above its equals.",
        ),
        lines(
            "Latency by model and upstream, median",
            [
                (
                    quantile(0.5, FAMILY("upstream_latency"), "model, upstream, stream"),
                    "{{model}} {{upstream}}, stream {{stream}}",
                )
            ],
            unit="s",
            about="Upstreams of the same model compared, as in MeshproxyUpstreamSlowMember. Streams to their first event.",
        ),
        lines(
            "Failures by model and cause",
            [(rate("meshproxy_failures_total", "model, cause"), "{{model}} {{cause}}")],
            unit="reqps",
            stacked=True,
            about="By the error's code: ledger_unavailable is Redis, overloaded this instance, the others are providers.",
        ),
        lines(
            "Whole answer by upstream, p95",
            [(quantile(0.95, FAMILY("upstream_request_duration"), "upstream"), "{{upstream}}")],
            unit="s",
        ),
        lines("Silence within streams", quantiles(FAMILY("stream_max_gap")), unit="s", limit=10),
    ],
)
