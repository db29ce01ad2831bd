"""Items read in a thread ahead of their use."""

import threading

import pytest

from segrl.data.read_ahead import read_ahead


@pytest.mark.parametrize("waiting", [1, 3])
def test_in_order_and_no_further_ahead_than_asked(waiting):
    read = []

    def one(number: int) -> int:
        assert threading.current_thread() is not threading.main_thread()
        read.append(number)
        return 10 * number

    for n, value in enumerate(read_ahead(one, range(20), waiting)):
        assert value == 10 * n
        assert len(read) <= n + 1 + waiting
    assert read == list(range(20))
    assert list(read_ahead(one, [])) == []


def test_an_error_comes_when_its_item_is_asked_for():
    found = read_ahead([1, 2].__getitem__, [0, 1, 2, 3])
    assert (next(found), next(found)) == (1, 2)
    with pytest.raises(IndexError):
        next(found)
    assert threading.active_count() >= 1
    assert list(found) == []
