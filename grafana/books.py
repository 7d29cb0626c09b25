"""The dashboards of what stands behind the service: credit, limits, Redis, the processes. Change them here and run build.py."""

from panels import GREEN, RED, YELLOW, M, S, bars, board, figure, heatmap, lines, quantile, rate, share, total

CHAT = S + ',route="/v1/chat/completions"'
OUTPUT = M + ',type="completion"'
ESTIMATED, CHARGED = S + ',usage_source="estimated"', S + ',usage_source!="none"'
RENEWALS = S + ',op="renew"'
UNSENT = S + ',kind=~"disconnected|overflow"'  # errors of operations that have no duration
FAMILY = "meshproxy_{}_seconds".format


MONEY = board(
    "money",
    "Money",
    "What is spent, on what, and how sure that is.",
    [
        figure("Spent an hour", f"3600 * {rate('meshproxy_cost_usd_total', where=M)}", unit="currencyUSD", width=6),
        figure("Settled", rate("meshproxy_settlements_total"), unit="reqps", width=6),
        figure(
            "Charged by estimate",
            share(
                rate("meshproxy_settlements_total", where=ESTIMATED), rate("meshproxy_settlements_total", where=CHARGED)
            ),
            unit="percentunit",
            width=6,
            about="Of what was charged at all.",
            steps=((None, GREEN), (0.05, YELLOW), (0.1, RED)),
        ),
        figure(
            "Settlements on disk",
            total("meshproxy_journal_pending"),
            width=6,
            about="They wait for Redis.",
            steps=((None, GREEN), (1, RED)),
        ),
        lines(
            "Spend by model",
            [(f"3600 * {rate('meshproxy_cost_usd_total', 'model', M)}", "{{model}}")],
            unit="currencyUSD",
            stacked=True,
            about="USD an hour.",
        ),
        bars(
            "Spent, by model",
            f"topk(10, sum by (model) (increase(meshproxy_cost_usd_total{{{M}}}[$__range])))",
            "{{model}}",
            unit="currencyUSD",
            about="Over the time shown.",
        ),
        lines(
            "How requests ended",
            [(rate("meshproxy_settlements_total", "outcome"), "{{outcome}}")],
            unit="reqps",
            stacked=True,
        ),
        lines(
            "Where usage came from",
            [(rate("meshproxy_settlements_total", "usage_source"), "{{usage_source}}")],
            unit="reqps",
            stacked=True,
        ),
        lines(
            "Refused or ended for money",
            [(rate("meshproxy_credit_rejections_total", "reason"), "{{reason}}")],
            unit="reqps",
        ),
        lines(
            "Price of a thousand output tokens",
            [
                (
                    "1000 * "
                    + share(
                        rate("meshproxy_cost_usd_total", "model", M), rate("meshproxy_tokens_total", "model", OUTPUT)
                    ),
                    "{{model}}",
                )
            ],
            unit="currencyUSD",
            about="Prompts included: what an answer really costs.",
        ),
    ],
    models=True,
)

A, BALANCE = S + ',account=~"$account"', "meshproxy_account_balance_usd"
REFUSED_A = A + ',code=~"402|429"'
DAYS = f"min by (account) ({BALANCE}{{{A}}}) / (86400 * {rate('meshproxy_account_cost_usd_total', 'account', A)} > 0)"
TENANTS = board(
    "tenants",
    "Tenants",
    'Accounts, one by one. Needs `[metrics] accounts = "all"`.',
    [
        figure("Accounts", f"count(count by (account) (meshproxy_account_requests_total{{{S}}}))", width=6),
        figure("Requests", rate("meshproxy_account_requests_total", where=A), unit="reqps", width=6),
        figure(
            "Refused",
            rate("meshproxy_account_requests_total", where=A + ',code=~"402|429"'),
            unit="reqps",
            width=6,
            about="402 and 429.",
        ),
        figure(
            "Below 1 USD",
            f"count(min by (account) ({BALANCE}{{{A}}}) < 1) or vector(0)",
            width=6,
            about="Accounts whose credit is nearly spent.",
            steps=((None, GREEN), (1, YELLOW)),
        ),
        lines(
            "Budgets spent",
            [
                (
                    f"topk(10, max by (account, budget) (meshproxy_account_budget_spent_ratio{{{A}}} > 0))",
                    "{{account}} {{budget}}",
                )
            ],
            unit="percentunit",
            about="Of the ten nearest to their end. At 100 % requests are refused with 402.",
        ),
        lines(
            "Spend by account",
            [(f"topk(10, 3600 * {rate('meshproxy_account_cost_usd_total', 'account', A)})", "{{account}}")],
            unit="currencyUSD",
            stacked=True,
            about="USD an hour, of the ten that spend most.",
        ),
        bars(
            "Spent, by account",
            f"topk(10, sum by (account) (increase(meshproxy_account_cost_usd_total{{{A}}}[$__range])))",
            "{{account}}",
            unit="currencyUSD",
            about="Over the time shown.",
        ),
        lines(
            "Requests by account",
            [(f"topk(10, {rate('meshproxy_account_requests_total', 'account', A)})", "{{account}}")],
            unit="reqps",
            stacked=True,
        ),
        lines(
            "Refusals by account",
            [
                (
                    f"topk(10, {rate('meshproxy_account_requests_total', 'account, code', REFUSED_A)})",
                    "{{account}} {{code}}",
                )
            ],
            unit="reqps",
            about="402: no credit or budget left. 429: a bucket is empty. A tenant that floods stands out here.",
        ),
        lines(
            "Balance",
            [(f"bottomk(10, min by (account) ({BALANCE}{{{A}}}))", "{{account}}")],
            unit="currencyUSD",
            about="The ten that have least.",
        ),
        lines(
            "Days until empty",
            [
                (
                    f"bottomk(10, {DAYS})",
                    "{{account}}",
                )
            ],
            unit="d",
            about="At the rate of now.",
        ),
    ],
    accounts=True,
)

LIMITS = board(
    "limits",
    "Limits",
    "Who is told to wait, and why.",
    [
        figure("429", rate("meshproxy_requests_total", where=CHAT + ',code="429"'), unit="reqps", width=6),
        figure("402", rate("meshproxy_requests_total", where=CHAT + ',code="402"'), unit="reqps", width=6),
        figure("401 and 403", rate("meshproxy_requests_total", where=CHAT + ',code=~"401|403"'), unit="reqps", width=6),
        figure(
            "Shed",
            rate("meshproxy_requests_total", where=CHAT + ',code="503"'),
            unit="reqps",
            width=6,
            about="503: too many in flight, Redis lost, or no provider.",
            steps=((None, GREEN), (0.001, RED)),
        ),
        lines(
            "Empty buckets", [(rate("meshproxy_rate_limited_total", "limit"), "{{limit}}")], unit="reqps", stacked=True
        ),
        lines(
            "Credit and budgets",
            [(rate("meshproxy_credit_rejections_total", "reason"), "{{reason}}")],
            unit="reqps",
            stacked=True,
        ),
        lines(
            "Refusals by status",
            [(rate("meshproxy_requests_total", "code", CHAT + ',code=~"4.."'), "{{code}}")],
            unit="reqps",
            stacked=True,
        ),
        lines(
            "In flight against the cap",
            [
                (total("meshproxy_in_flight_requests", "instance"), "{{instance}}"),
                (total("meshproxy_in_flight_limit", "instance"), "{{instance}} cap"),
            ],
        ),
    ],
)

LEDGER = board(
    "ledger",
    "Ledger",
    "Redis, as the gateway sees it.",
    [
        figure(
            "Connected",
            f"min(meshproxy_ledger_connected{{{S}}})",
            width=6,
            about="1: every worker of every instance.",
            steps=((None, RED), (1, GREEN)),
        ),
        figure("Operations", rate("meshproxy_ledger_op_duration_seconds_count"), unit="ops", width=6),
        figure(
            "Failing",
            share(
                rate("meshproxy_ledger_errors_total"),
                f"({rate('meshproxy_ledger_op_duration_seconds_count')}"
                f" + {rate('meshproxy_ledger_errors_total', where=UNSENT)})",
            ),
            unit="percentunit",
            width=6,
            steps=((None, GREEN), (0.001, YELLOW), (0.01, RED)),
        ),
        figure("Settlements on disk", total("meshproxy_journal_pending"), width=6, steps=((None, GREEN), (1, RED))),
        lines(
            "Connected by instance",
            [(f"min by (instance) (meshproxy_ledger_connected{{{S}}})", "{{instance}}")],
            most=1,
            about="0: it has lost Redis.",
        ),
        heatmap(
            "Admission",
            "meshproxy_ledger_op_duration_seconds",
            where=S + ',op="admit"',
            about="Round trips of the admission script.",
        ),
        lines(
            "Round trips by operation, p99",
            [(quantile(0.99, FAMILY("ledger_op_duration"), "op"), "{{op}}")],
            unit="s",
            limit=0.05,
        ),
        lines(
            "Operations by kind",
            [(rate("meshproxy_ledger_op_duration_seconds_count", "op"), "{{op}}")],
            unit="ops",
            stacked=True,
        ),
        lines(
            "Errors",
            [(rate("meshproxy_ledger_errors_total", "kind"), "{{kind}}")],
            unit="ops",
            about="noscript is no trouble: the scripts are loaded anew. disconnected: there was no connection to send it over.",
        ),
        lines(
            "Renewals of a stream",
            [
                (
                    share(
                        rate("meshproxy_ledger_op_duration_seconds_count", where=RENEWALS),
                        rate("meshproxy_settlements_total"),
                    ),
                    "renewals a request",
                )
            ],
        ),
        lines(
            "Background tasks that failed", [(rate("meshproxy_task_failures_total", "task"), "{{task}}")], unit="ops"
        ),
    ],
)

PROCESS = board(
    "process",
    "Process",
    "The workers and what they use.",
    [
        figure(
            "Version",
            f"count by (version) (meshproxy_build_info{{{S}}})",
            legend="{{version}}",
            about="Instances by version.",
        ),
        figure("Workers", total("meshproxy_workers")),
        figure(
            "Up for",
            f"time() - max(process_start_time_seconds{{{S}}})",
            unit="s",
            about="The instance that started last.",
        ),
        figure(
            "Last reload",
            f"min(meshproxy_config_last_reload_successful{{{S}}})",
            about="1: it succeeded everywhere.",
            steps=((None, RED), (1, GREEN)),
        ),
        figure("Memory", total("process_resident_memory_bytes"), unit="bytes"),
        figure("CPU", rate("process_cpu_seconds_total"), unit="short", about="Cores."),
        lines(
            "CPU by instance",
            [(rate("process_cpu_seconds_total", "instance"), "{{instance}}")],
            about="Cores, over all workers.",
        ),
        lines(
            "Memory by instance", [(total("process_resident_memory_bytes", "instance"), "{{instance}}")], unit="bytes"
        ),
        heatmap("Event loop lag", FAMILY("event_loop_lag"), about="How late timers wake: every stream is as late."),
        lines(
            "Event loop lag by instance, p99",
            [(quantile(0.99, FAMILY("event_loop_lag"), "instance"), "{{instance}}")],
            unit="s",
            limit=0.1,
        ),
        lines("File descriptors", [(total("process_open_fds", "instance"), "{{instance}}")]),
        lines(
            "Configuration",
            [(f"meshproxy_config_generation{{{S}}}", "{{instance}}")],
            about="Generation: one more at each reload.",
        ),
    ],
)
