"""Which messages reach a handler: only those that mean exactly what they say.

Rules. A field that this version does not know is refused, at any depth, since ignoring it could
ignore a condition that the caller relies on. A field of the wrong wire type would silently read as
its default, so it counts as missing. There are no floats in our messages, hence no NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from grafos_core import failure


def check_known(message: Message) -> None:
    """Refuse a message with fields that are unknown or of another type than ours."""
    unknown = UnknownFieldSet(message)
    if len(unknown):
        ours = message.DESCRIPTOR.fields_by_number
        for each in cast("Iterable[Any]", unknown):
            if each.field_number in ours:
                raise failure.of("MISSING_FIELD", f"field {ours[each.field_number].name}")
        raise failure.of("UNKNOWN_FIELDS")
    for name, is_map, is_repeated in _submessages(message.DESCRIPTOR):
        for part in _parts(message, name, is_map, is_repeated):
            check_known(part)


def _parts(message: Message, name: str, is_map: bool, is_repeated: bool) -> Any:
    if is_map:
        return getattr(message, name).values()
    if is_repeated:
        return getattr(message, name)
    return (getattr(message, name),) if message.HasField(name) else ()


@functools.cache
def _submessages(descriptor: Descriptor) -> tuple[tuple[str, bool, bool], ...]:
    """(name, is a map, is repeated) of the fields that hold messages."""
    found = []
    for each in descriptor.fields:
        inner = each.message_type
        if inner is None:
            continue
        is_map = inner.GetOptions().map_entry
        if is_map and inner.fields_by_name["value"].type != FieldDescriptor.TYPE_MESSAGE:
            continue
        found.append((each.name, is_map, each.is_repeated))
    return tuple(found)
