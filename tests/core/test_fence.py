"""The fence epochs that users build on."""

from __future__ import annotations

import pickle

import pytest

from grafos_core.failure import Failure, Fenced, InvariantViolation
from grafos_core.fence import FencedMessage, FenceEpoch, FenceGuard, StaleEpochError
from grafos_core.lease import EPOCH_MAX


def test_a_message_passes_until_the_guard_advances() -> None:
    guard = FenceGuard(FenceEpoch.zero())
    message = FencedMessage(42, FenceEpoch.zero())
    guard.check(message.epoch())
    guard.advance()
    with pytest.raises(StaleEpochError) as refused:
        guard.check(message.epoch())
    assert refused.value.code == "EPOCH_STALE"
    assert refused.value.failure is Failure.Fenced
    assert isinstance(refused.value, Fenced)
    assert message.value == 42


def test_epochs_are_ordered_and_only_rise() -> None:
    zero = FenceEpoch.zero()
    assert zero < zero.next() < zero.next().bump()
    assert max(FenceEpoch(3), FenceEpoch(5), FenceEpoch(4)) == FenceEpoch(5)
    assert int(FenceEpoch(7)) == 7


def test_a_newer_epoch_passes_and_once_observed_fences_the_older() -> None:
    guard = FenceGuard(FenceEpoch(2))
    guard.check(FenceEpoch(5))
    guard.check(FenceEpoch(3))
    guard.observe(FenceEpoch(5))
    assert guard.epoch == FenceEpoch(5)
    for stale in (FenceEpoch(4), FenceEpoch(2)):
        with pytest.raises(StaleEpochError):
            guard.observe(stale)
    assert guard.epoch == FenceEpoch(5)


def test_an_epoch_is_a_number_of_64_bits() -> None:
    with pytest.raises(InvariantViolation):
        FenceEpoch(-1)
    with pytest.raises(InvariantViolation):
        FenceEpoch(EPOCH_MAX).next()


def test_messages_compare_by_value_and_epoch_and_survive_a_pickle() -> None:
    message = FencedMessage("x", FenceEpoch(1))
    assert message == FencedMessage("x", FenceEpoch(1))
    assert message != FencedMessage("x", FenceEpoch(2))
    assert message != "x"
    assert len({message, FencedMessage("x", FenceEpoch(1))}) == 1
    assert pickle.loads(pickle.dumps(message)) == message
    assert repr(message) == "Fenced('x', FenceEpoch(value=1))"


def test_the_failure_stays_typed_across_a_pickle() -> None:
    with pytest.raises(StaleEpochError) as refused:
        FenceGuard(FenceEpoch(2)).check(FenceEpoch(1))
    again = pickle.loads(pickle.dumps(refused.value))
    assert isinstance(again, Fenced)
    assert (again.code, again.epoch) == ("EPOCH_STALE", 1)
