import pytest
from ledger import format_cents, parse_cents


@pytest.mark.parametrize(("text", "cents"), [("12.34", 1234), ("0.5", 50), ("7", 700), ("-3.10", -310)])
def test_text_becomes_cents(text: str, cents: int) -> None:
    assert parse_cents(text) == cents


def test_too_many_decimals_are_refused() -> None:
    with pytest.raises(ValueError, match="two decimals"):
        parse_cents("1.234")


@pytest.mark.parametrize("cents", [0, 5, 1234, -310])
def test_there_and_back(cents: int) -> None:
    assert parse_cents(format_cents(cents)) == cents
