"""Visits every state a small world can get into, nearest first, and stops at the first bad one.

Because the search is breadth first, the way it reports to a broken law is a shortest one.
A step that breaks a law says so itself (the deed is bad); a state is judged when it is first
seen (the situation is bad).  Nothing here knows what a lease is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

Action = tuple[str, tuple[int, ...]]
"""What was done, by the verb that the code uses, and to which epoch (or with which number)."""

S = TypeVar("S")
Step = tuple[Action, S, str]
"""An action, the state after it, and the law that the action itself broke, or ""."""

STATES_MAX = 2_000_000
"""Protects the machine: a world larger than this is a mistake in its bounds, not a bigger proof."""


class World(Protocol[S]):
    """A model that can be searched."""

    def first_states(self) -> list[S]: ...

    def steps(self, state: S) -> Iterator[Step[S]]: ...

    def broken_laws(self, state: S) -> Iterator[str]: ...


@dataclass(frozen=True, slots=True)
class Verdict(Generic[S]):
    """What a search found: every law whole in every state, or a shortest way to a broken one."""

    states_count: int
    broken: str
    start: S | None
    """The first state of the trace; None where no law is broken."""
    trace: tuple[Action, ...]
    verbs: frozenset[str]
    """Every verb that took part in the search: one that is missing was never possible."""

    @property
    def safe(self) -> bool:
        return not self.broken


def search(world: World[S], ignored: frozenset[str] = frozenset()) -> Verdict[S]:
    """Visit every reachable state of `world`, or stop at the nearest broken law not ignored."""
    came_from: dict[S, tuple[Action, S] | None] = dict.fromkeys(world.first_states())
    verbs: set[str] = set()
    frontier = list(came_from)
    while frontier:
        reached: list[S] = []
        for state in frontier:
            for action, successor, broken in world.steps(state):
                verbs.add(action[0])
                new = successor not in came_from
                if broken in ignored:
                    broken = ""
                if new and not broken:
                    laws = world.broken_laws(successor)
                    broken = next((law for law in laws if law not in ignored), "")
                if broken:
                    start, trace = way_to(state, came_from)
                    whole = (*trace, action)
                    return Verdict(len(came_from), broken, start, whole, frozenset(verbs))
                if new:
                    came_from[successor] = (action, state)
                    reached.append(successor)
        if len(came_from) > STATES_MAX:
            raise OverflowError(f"more than {STATES_MAX} states: make the world smaller")
        frontier = reached
    return Verdict(len(came_from), "", None, (), frozenset(verbs))


def follow(
    world: World[S], start: S, actions: Iterable[Action], ignored: frozenset[str] = frozenset()
) -> tuple[S, str]:
    """Walk one way through `world`: the state at its end, and the first law broken on it.

    Raises:
        ValueError: the world does not allow the next action; a log that is followed like this
            shows something that the model says cannot happen.
    """
    state, first = start, ""
    for index, wanted in enumerate(actions):
        possible = {action: (after, law) for action, after, law in world.steps(state)}
        if wanted not in possible:
            raise ValueError(f"step {index}, {wanted}, is not one of {sorted(possible)}")
        state, law = possible[wanted]
        broken = (law, *world.broken_laws(state))
        first = first or next((law for law in broken if law and law not in ignored), "")
    return state, first


def way_to(state: S, came_from: dict[S, tuple[Action, S] | None]) -> tuple[S, list[Action]]:
    """Return the first state from which `state` was reached, and the actions in between."""
    actions: list[Action] = []
    while (step := came_from[state]) is not None:
        action, state = step
        actions.append(action)
    return state, actions[::-1]
