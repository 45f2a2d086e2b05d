"""What makes a class the twin of another: the same words about itself, and no member missing.

A method that is written out here gets the docstring of its original. One that the original has and
the twin does not is made: it calls the original, in a thread if that may wait. So a method that is
new in `grafos` is there in `grafos.aio` at once; writing it out only tells type checkers of it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from grafos.aio import _lanes

C = TypeVar("C", bound=type)


Maker = Callable[[str, Callable[..., Any]], Callable[..., Any]]


def in_a_thread(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """A method that asks somebody."""

    @functools.wraps(original)
    async def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return await _lanes.do(lambda: getattr(self.sync, name)(*args, **kwargs))

    return call


def an_option(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a builder that gives another one."""

    @functools.wraps(original)
    def option(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._with(getattr(self.sync, name)(*args, **kwargs))

    return option


def twin_of(original: type, make: Maker = in_a_thread) -> Callable[[C], C]:
    """A class decorator; the twin keeps its original in `sync`. `make` makes what is missing."""

    def decorate(twin: C) -> C:
        for name in dir(original):
            if name.startswith("_"):
                continue
            theirs, ours = getattr(original, name), inspect.getattr_static(twin, name, None)
            if ours is None and inspect.isfunction(theirs):
                setattr(twin, name, make(name, theirs))
            elif ours is not None and name in vars(twin):
                _document(ours, theirs)
        twin.__doc__ = f"{original.__doc__}\n\nThe twin of `grafos.{original.__name__}`."
        return twin

    return decorate


def _document(ours: Any, theirs: Any) -> None:
    if isinstance(ours, classmethod | staticmethod):
        ours = ours.__func__
    if inspect.isfunction(ours) or isinstance(ours, property):
        ours.__doc__ = theirs.__doc__
