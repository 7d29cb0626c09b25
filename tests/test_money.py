import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.units import MAX_NUSD, format_usd, in_usd, parse_usd


@pytest.mark.parametrize(
    "text, expected",
    [
        ("0", 0),
        ("0.00", 0),
        ("-0", 0),
        ("25", 25_000_000_000),
        ("25.00", 25_000_000_000),
        ("0.000000001", 1),
        ("-0.000000001", -1),
        ("1.1", 1_100_000_000),
        ("007.50", 7_500_000_000),
        ("0.1234567", 123_456_700),
        ("9000000", MAX_NUSD),
        ("-9000000.000000000", -MAX_NUSD),
    ],
)
def test_parse_usd(text, expected):
    assert parse_usd(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        " 1",
        "1 ",
        "1\n",
        "+1",
        "--1",
        "1.",
        ".5",
        "1e3",
        "1_000",
        "1,5",
        "$1",
        "nan",
        "inf",
        "0x1",
        "1.0000000001",
        "\u0661",
        "1.5.0",
    ],
)
def test_what_is_no_amount(text):
    with pytest.raises(ValueError, match="is not a decimal amount in USD with at most 9 decimals"):
        parse_usd(text)


@pytest.mark.parametrize("text", ["9000000.000000001", "-9000000.000000001", "999999999999"])
def test_no_amount_is_more_than_a_lua_number_holds(text):
    with pytest.raises(ValueError, match="is more than 9000000 USD"):
        parse_usd(text)


def test_a_lua_number_holds_the_largest_amount_exactly():
    assert float(MAX_NUSD) + 1 - float(MAX_NUSD) == 1.0


@pytest.mark.parametrize(
    "amount_nusd, expected",
    [
        (0, "0.00"),
        (1, "0.000000001"),
        (-1, "-0.000000001"),
        (10_000_000, "0.01"),
        (100_000_000, "0.10"),
        (1_000_000_000, "1.00"),
        (1_234_500_000, "1.2345"),
        (-25_000_000_000, "-25.00"),
        (MAX_NUSD, "9000000.00"),
    ],
)
def test_format_usd(amount_nusd, expected):
    assert format_usd(amount_nusd) == expected


@given(st.integers(-MAX_NUSD, MAX_NUSD))
def test_an_amount_survives_its_text(amount_nusd):
    assert amount_nusd == parse_usd(format_usd(amount_nusd))


@given(st.text(max_size=20))
def test_any_text_is_an_amount_or_a_value_error(text):
    try:
        amount = parse_usd(text)
    except ValueError:
        amount = 0
    assert -MAX_NUSD <= amount <= MAX_NUSD


def test_a_record_in_usd():
    fields = {"name": "ci", "total_nusd": 1_500_000_000, "daily_nusd": None, "monthly_nusd": 0}
    assert in_usd(fields) == {"name": "ci", "total_usd": "1.50", "daily_usd": None, "monthly_usd": "0.00"}
