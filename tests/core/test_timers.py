"""Timers against a plain dictionary."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from grafos_core.timers import Timers

moves = st.tuples(
    st.sampled_from(["set", "set", "set", "cancel", "due"]),
    st.sampled_from("abcdef"),
    st.integers(0, 50),
)


@given(st.lists(moves, max_size=200))
def test_timers_fire_what_a_dictionary_would_in_order_and_once(
    script: list[tuple[str, str, int]],
) -> None:
    timers: Timers[str] = Timers()
    model: dict[str, int] = {}
    for what, key, at_ms in script:
        if what == "set":
            timers.set(key, at_ms)
            model[key] = at_ms
        elif what == "cancel":
            timers.cancel(key)
            model.pop(key, None)
        else:
            due = timers.due(at_ms)
            expected = {one for one, set_ms in model.items() if set_ms <= at_ms}
            assert set(due) == expected
            assert len(due) == len(expected)
            assert [model[one] for one in due] == sorted(model[one] for one in due)
            for one in due:
                del model[one]
        timers.check()
        assert timers.next_ms() == min(model.values(), default=None)
        assert len(timers) == len(model)


def test_keys_moved_again_and_again_are_kept_while_the_heap_is_made_anew() -> None:
    timers: Timers[str] = Timers()
    for at_ms in range(500):
        for key in "abc":
            timers.set(key, 1000 - at_ms)
        timers.check()
    assert len(timers._heap) < 100
    assert timers.due(501) == ["a", "b", "c"]


def test_keys_of_one_instant_fire_in_the_order_in_which_they_were_set() -> None:
    timers: Timers[str] = Timers()
    for key in "cab":
        timers.set(key, 5)
    timers.set("c", 5)
    assert timers.due(5) == ["a", "b", "c"]
