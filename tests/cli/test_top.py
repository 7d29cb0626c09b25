REQUESTS = [
    ("acme", "key_1", "a/b", "s1", 1_500_000_000),
    ("acme", "key_1", "a/b", "s2", 500_000_000),
    ("acme", "key_2", "c", None, 250_000_000),
    ("bolt", "key_3", "c", None, 1),
]


def test_shows_the_most_expensive_first(settle, data, run):
    settle(*REQUESTS)
    rows = data("top")
    assert [(row["account"], row["model"], row["requests"], row["cost_usd"]) for row in rows] == [
        ("acme", "a/b", 2, "2.00"),
        ("acme", "c", 1, "0.25"),
        ("bolt", "c", 1, "0.000000001"),
    ]
    assert data("top", "--account", "bolt") == [rows[2]]
    assert rows[0] == {
        "account": "acme",
        "model": "a/b",
        "requests": 2,
        "requests_per_minute": 0.4,
        "prompt_tokens": 20,
        "completion_tokens": 10,
        "cost_usd": "2.00",
    }
    assert run("top", "--once")[1].splitlines()[1].split()[:3] == ["acme", "a/b", "2"]


def test_of_nothing(run):
    assert run("top") == (0, "nothing was settled in the last 5 min\n", "")
