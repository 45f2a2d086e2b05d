"""The fence for what programs build themselves: an older epoch is turned away."""

from __future__ import annotations

import pytest

import grafos
from grafos.fence import Fenced, FenceEpoch, FenceGuard, StaleEpochError


def test_a_message_of_the_epoch_in_force_is_let_in() -> None:
    guard = FenceGuard(FenceEpoch.zero())
    message = Fenced(42, FenceEpoch.zero())
    guard.check(message.epoch())
    assert message.value == 42


def test_after_an_advance_it_is_turned_away() -> None:
    guard = FenceGuard(FenceEpoch.zero())
    message = Fenced(42, FenceEpoch.zero())
    guard.advance()
    with pytest.raises(StaleEpochError) as stale:
        guard.check(message.epoch())
    assert stale.value.code == "EPOCH_STALE"
    assert isinstance(stale.value, grafos.Fenced)
    assert stale.value.failure is grafos.Failure.Fenced


def test_an_epoch_seen_once_is_the_least_from_then_on() -> None:
    guard = FenceGuard()
    guard.observe(FenceEpoch(5))
    guard.check(FenceEpoch(6))
    guard.check(FenceEpoch(5))
    with pytest.raises(StaleEpochError):
        guard.check(FenceEpoch(4))
    with pytest.raises(StaleEpochError):
        guard.observe(FenceEpoch(4))
    assert guard.epoch == FenceEpoch(5)


def test_the_value_with_an_epoch_is_not_the_failure_of_that_name() -> None:
    assert not issubclass(Fenced, BaseException)
