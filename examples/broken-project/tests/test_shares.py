import pytest
from ledger import split


def test_an_even_split() -> None:
    assert split(900, [1, 1, 1]) == [300, 300, 300]


def test_no_cent_is_lost() -> None:
    assert sum(split(1000, [1, 1, 1])) == 1000


def test_the_rest_goes_to_those_who_lost_most() -> None:
    assert split(100, [1, 2, 4]) == [14, 29, 57]


def test_weights_that_divide_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot divide"):
        split(100, [0, 0])
