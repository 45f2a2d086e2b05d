"""Which keys a node believes: when "unknown" is certain, and how often it asks."""

from __future__ import annotations

from typing import Any

import pytest

from grafos_core import jws
from grafos_core.failure import Denied, Disconnected, FabricError, Revoked
from grafos_core.token import audience_of
from services.nodeagent.trust import ASK_MS, STRANGERS_MAX, TrustedKeys
from tests.services.nodeagent.fabric import ADMISSION, OPERATOR, TRUST_DOMAIN, Signer

NOW_MS = 1_800_000_000_000
AUDIENCE = audience_of("n1", "ab" * 16)


class Node:
    """Keys, and how often they were asked for."""

    def __init__(self) -> None:
        self.keys = TrustedKeys(TRUST_DOMAIN, AUDIENCE)
        self.asked = 0
        self.now_ms = NOW_MS
        self.keys.ask_for_list = self._ask

    def _ask(self) -> None:
        self.asked += 1

    def list_comes(self, *signers: Signer, revoked: tuple[str, ...] = ()) -> None:
        self.keys.replace([signer.published() for signer in signers], self.now_ms, revoked)

    def code(self, text: str) -> str:
        with pytest.raises(FabricError) as refusal:
            self.keys.accept(text, "k" * 43, self.now_ms)
        kinds = {"RETRY_LATER": Disconnected, "REVOKED": Revoked}
        assert isinstance(refusal.value, kinds.get(refusal.value.code, Denied))
        return refusal.value.code


@pytest.fixture
def node() -> Node:
    return Node()


@pytest.fixture
def admission() -> Signer:
    return Signer("lease", str(ADMISSION))


def signed(by: Signer) -> str:
    """Of a known key it is refused for its claims, and so tells that the key is known."""
    claims: dict[str, Any] = {"iss": "somebody"}
    return jws.mint(jws.LEASE, by.key_id, claims, by.key.sign)


def test_before_the_first_list_no_key_is_unknown(node: Node, admission: Signer) -> None:
    assert [node.code(signed(admission)) for _ in range(3)] == ["RETRY_LATER"] * 3
    node.list_comes(admission)
    assert node.code(signed(admission)) == "TOKEN_CLAIM"


def test_a_key_is_unknown_when_the_next_list_does_not_have_it(
    node: Node, admission: Signer
) -> None:
    node.list_comes(admission)
    stranger = Signer("lease", str(ADMISSION))
    assert node.code(signed(stranger)) == "RETRY_LATER"
    node.list_comes(admission)
    assert node.code(signed(stranger)) == "TOKEN_KEY_UNKNOWN"
    node.list_comes(admission, stranger)
    assert node.code(signed(stranger)) == "TOKEN_CLAIM"
    node.list_comes(admission)
    assert node.code(signed(stranger)) == "TOKEN_KEY_UNKNOWN", "one that was taken away is"


def test_what_a_revoked_key_has_signed_is_refused_as_revoked_from_the_next_list_on(
    node: Node, admission: Signer
) -> None:
    other = Signer("lease", str(ADMISSION))
    node.list_comes(admission)
    node.list_comes(other, revoked=(admission.key_id,))
    assert (node.code(signed(admission)), node.asked) == ("REVOKED", 0)
    assert node.code(signed(other)) == "TOKEN_CLAIM"


def test_a_key_with_another_owner_is_as_unknown(node: Node) -> None:
    operator = Signer("lease", str(OPERATOR))
    node.list_comes(operator)
    assert node.code(signed(operator)) == "RETRY_LATER"
    node.list_comes(operator)
    assert node.code(signed(operator)) == "TOKEN_KEY_UNKNOWN"


def test_lists_are_asked_for_at_most_once_a_second_whoever_comes(
    node: Node, admission: Signer
) -> None:
    node.list_comes(admission)
    strangers = [Signer("lease", "x") for _ in range(5)]
    for _ in range(3):
        for each in strangers:
            node.code(signed(each))
    assert node.asked == 1
    node.now_ms += ASK_MS - 1
    node.code(signed(strangers[0]))
    assert node.asked == 1
    node.now_ms += 1
    node.code(signed(strangers[0]))
    assert node.asked == 2, "the list that was asked for has not come"
    node.list_comes(admission)
    node.now_ms += ASK_MS
    node.code(signed(strangers[0]))
    assert node.asked == 2, "and now that it has, the answer is certain"


def test_a_crowd_of_strangers_is_forgotten_again(node: Node, admission: Signer) -> None:
    node.list_comes(admission)
    first = Signer("lease", "x")
    node.code(signed(first))
    node.list_comes(admission)
    for number in range(STRANGERS_MAX):
        first_segment = jws.header(jws.LEASE, f"{number:016x}").decode()
        node.code(f"{first_segment}.e30.{'A' * 86}")
    assert node.code(signed(first)) == "RETRY_LATER"
    node.list_comes(admission)
    assert node.code(signed(first)) == "TOKEN_KEY_UNKNOWN"


@pytest.mark.parametrize("text", ["", "..", "é.é.é", "x" * 5_000, "{}.{}.{}"])
def test_what_is_no_token_of_ours_is_refused_at_once(node: Node, text: str) -> None:
    assert node.code(text).startswith("TOKEN_")
    assert node.asked == 0
