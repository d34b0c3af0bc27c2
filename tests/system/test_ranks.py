"""Ranks that share work get the same values and the same errors, and none waits for one that has ended."""

from __future__ import annotations

import errno
import pickle
from typing import Any

import pytest

from alignvlm.errors import UserError
from alignvlm.system.ranks import ALONE, Ranks
from data_pipeline.errors import DataError
from tests.evaluation.thread_ranks import ThreadRanks


def full(rank: int) -> DataError:
    error = DataError(f"no room for {rank}")
    error.__cause__ = OSError(errno.ENOSPC, "full")
    return error


class Piped(Ranks):
    """Another rank whose values come through pickle, as they do between processes."""

    rank, size = 1, 2

    def __init__(self, told: Any) -> None:
        self.told = told

    def broadcast(self, value: Any) -> Any:
        return self.all_gather(value)[0]

    def all_gather(self, value: Any) -> list[Any]:
        return pickle.loads(pickle.dumps([self.told, value]))


def test_what_rank_0_finds_is_known_to_all() -> None:
    assert ThreadRanks(3).run(lambda ranks: ranks.of_main(lambda: ranks.rank + 7)) == [7, 7, 7]
    assert ThreadRanks(3).run(lambda ranks: ranks.together(lambda number: ranks.rank + number, 7)) == [7, 8, 9]
    assert (ALONE.of_main(int, "4"), ALONE.together(int, "5"), ALONE.is_main) == (4, 5, True)


@pytest.mark.parametrize("kind", [UserError, DataError])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_mistake_of_one_rank_is_the_mistake_of_all(kind: type[Exception], rank: int) -> None:
    def work(ranks: Ranks) -> None:
        if ranks.rank >= rank:
            raise kind(f"rank {ranks.rank}: no such file")

    errors = ThreadRanks(4).run(lambda ranks: ranks.together(work, ranks))
    assert [(type(error), str(error)) for error in errors] == [(kind, f"rank {rank}: no such file")] * 4
    if rank == 0:
        errors = ThreadRanks(2).run(lambda ranks: ranks.of_main(work, ranks))
        assert [str(error) for error in errors] == ["rank 0: no such file"] * 2


def test_the_systems_error_behind_it_comes_along() -> None:
    """It decides with which code a command ends; pickle leaves it out."""
    for told in (ThreadRanks(2).run(lambda ranks: ranks.together(_fail, full(ranks.rank))), [full(0)]):
        with pytest.raises(DataError, match="no room for 0") as caught:
            Piped((told[0], told[0].__cause__)).together(int, "1")
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.ENOSPC


def _fail(error: Exception) -> None:
    raise error from error.__cause__


def test_other_errors_stay_with_their_rank() -> None:
    with pytest.raises(ZeroDivisionError):
        ALONE.together(lambda: 1 // 0)
