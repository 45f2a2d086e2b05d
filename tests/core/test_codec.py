"""The codec against its law: one value has one encoding, and nothing else is read."""

from __future__ import annotations

import enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grafos_core import codec
from grafos_core.failure import FabricError, Incompatible

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(min_value=-(2**64), max_value=2**64 - 1)
    | st.binary(max_size=40)
    | st.text(max_size=20)
)
KEYS = st.integers(min_value=-(2**64), max_value=2**64 - 1) | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


def refusal_of(data: bytes) -> str:
    with pytest.raises(Incompatible) as refused:
        codec.decode(data)
    assert refused.value.code == "ENCODING"
    return refused.value.detail


def written_again(data: bytes) -> bytes | str:
    """The encoding of what `data` decodes to, or the code of the refusal."""
    try:
        return codec.encode(codec.decode(data))
    except FabricError as refused:
        return refused.code


@given(VALUES)
def test_what_was_written_is_read_back(value: Any) -> None:
    assert codec.decode(codec.encode(value)) == value


@given(st.binary(max_size=24) | st.binary(max_size=12).map(lambda tail: b"\xa2\x01" + tail))
def test_bytes_are_the_only_encoding_of_their_value_or_are_refused(data: bytes) -> None:
    assert written_again(data) in (data, "ENCODING")


@given(VALUES, st.data())
def test_a_changed_byte_is_another_value_or_a_refusal(value: Any, data: st.DataObject) -> None:
    good = codec.encode(value)
    at = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[at] ^= data.draw(st.integers(1, 255))
    assert written_again(bytes(bad)) in (bytes(bad), "ENCODING")


@pytest.mark.parametrize(
    ("value", "encoded"),
    # RFC 8949, appendix A, as far as the subset goes.
    [
        (0, "00"),
        (23, "17"),
        (24, "1818"),
        (100, "1864"),
        (1000, "1903e8"),
        (1000000, "1a000f4240"),
        (1000000000000, "1b000000e8d4a51000"),
        (18446744073709551615, "1bffffffffffffffff"),
        (-1, "20"),
        (-100, "3863"),
        (-18446744073709551616, "3bffffffffffffffff"),
        (False, "f4"),
        (True, "f5"),
        (None, "f6"),
        (b"\x01\x02\x03\x04", "4401020304"),
        ("", "60"),
        ("IETF", "6449455446"),
        ("\u00fc", "62c3bc"),
        ("\U00010151", "64f0908591"),
        ([], "80"),
        ([1, [2, 3], [4, 5]], "8301820203820405"),
        ({}, "a0"),
        ({1: 2, 3: 4}, "a201020304"),
        ({"a": 1, "b": [2, 3]}, "a26161016162820203"),
    ],
)
def test_examples_of_the_standard(value: Any, encoded: str) -> None:
    assert codec.encode(value).hex() == encoded
    assert codec.decode(bytes.fromhex(encoded)) == value


def test_keys_are_ordered_by_their_encoded_bytes_not_by_length() -> None:
    # The older "canonical CBOR" would put -1 before 24 and "z" before "aa" only by length.
    assert codec.encode({"aa": 1, "z": 2, 24: 3, -1: 4, 10: 5}).hex() == (
        "a5" + "0a05" + "181803" + "2004" + "617a02" + "62616101"
    )


@pytest.mark.parametrize(
    ("encoded", "why"),
    [
        ("", "shorter than it says"),
        ("1817", "longer than needed"),
        ("1900ff", "longer than needed"),
        ("1a0000ffff", "longer than needed"),
        ("1b00000000ffffffff", "longer than needed"),
        ("5801ff", "longer than needed"),
        ("9f01ff", "indefinite"),
        ("bf0102ff", "indefinite"),
        ("7f6161ff", "indefinite"),
        ("1c", "reserved"),
        ("a201000100", "out of order or twice"),
        ("a202000100", "out of order or twice"),
        ("a262616101617a02", "out of order or twice"),
        ("c11a00000000", "a tag"),
        ("fb7ff8000000000000", "a float"),
        ("f97e00", "a float"),
        ("f7", "a float or an unknown simple value"),
        ("f8ff", "a float or an unknown simple value"),
        ("0000", "bytes after the end"),
        ("81" * 8 + "80", "nested too deep"),
        ("9bffffffffffffffff", "shorter than it says"),
        ("5bffffffffffffffff", "shorter than it says"),
        ("bbffffffffffffffff", "shorter than it says"),
        ("4201", "shorter than it says"),
        ("19ff", "shorter than it says"),
        ("8101" + "00", "bytes after the end"),
        ("a1f500", "neither integer nor text"),
        ("a1410000", "neither integer nor text"),
        ("a18000", "nested too deep"),
        ("61ff", "not UTF-8"),
        ("63eda080", "not UTF-8"),
        ("62c080", "not UTF-8"),
    ],
)
def test_catalogue_u6_everything_else_is_refused(encoded: str, why: str) -> None:
    assert why in refusal_of(bytes.fromhex(encoded))


@pytest.mark.parametrize(
    "value",
    [1.5, float("nan"), (1, 2), {1, 2}, bytearray(b"x"), 2**64, -(2**64) - 1, "\ud800", object()],
)
def test_a_value_outside_the_subset_has_no_encoding(value: Any) -> None:
    for nested in (value, [value], {1: value}):
        with pytest.raises(Incompatible) as refused:
            codec.encode(nested)
        assert refused.value.code == "ENCODING"


@pytest.mark.parametrize("key", [True, None, b"k", 1.0, (1,)])
def test_a_key_is_an_integer_or_text(key: Any) -> None:
    with pytest.raises(Incompatible):
        codec.encode({key: 1})


def test_nesting_is_bounded_in_both_directions() -> None:
    deep: Any = 7
    for _ in range(codec.DEPTH_MAX):
        deep = [deep]
    assert codec.decode(codec.encode(deep)) == deep
    with pytest.raises(Incompatible):
        codec.encode([deep])


def test_members_of_enumerations_are_written_as_what_they_stand_for() -> None:
    class Colour(enum.StrEnum):
        RED = "red"

    class Level(enum.IntEnum):
        LOW = 3

    assert codec.encode({Colour.RED: Level.LOW}) == codec.encode({"red": 3})


def test_a_key_that_is_there_twice_under_two_names_cannot_be_written() -> None:
    # Equal keys are one key in a Python map, so no encoding with a key twice can come about.
    class Colour(enum.StrEnum):
        RED = "red"

    both: Any = {"red": 1, Colour.RED: 2}
    assert codec.decode(codec.encode(both)) == {"red": 2}
