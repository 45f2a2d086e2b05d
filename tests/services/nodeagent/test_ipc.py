"""The agent's processes hear each other, ask and answer, and notice each other's end."""

import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from grafos_core import codec, failure
from services.nodeagent import ipc
from services.nodeagent.ipc import Link, LinkClosed


@pytest.fixture
def ends() -> Iterator[tuple[Link, Link]]:
    ours, theirs = map(Link, ipc.pair())
    yield ours, theirs
    ours.close()
    theirs.close()


def serve(link: Link, handle: ipc.Handler) -> threading.Thread:
    thread = threading.Thread(target=link.serve, args=(handle,), daemon=True)
    thread.start()
    return thread


def ignore(message: dict[str, Any], fds: list[int]) -> None:
    ipc.close_all(fds)


def test_a_message_arrives_whole_with_its_descriptors(ends: tuple[Link, Link]) -> None:
    ours, theirs = ends
    reader, writer = os.pipe()
    ours.send({"op": "hold", "lease": b"\x01" * 16}, [writer])
    os.close(writer)
    received = theirs.receive(1_000)
    assert received is not None
    message, (fd,) = received
    assert message == {"op": "hold", "lease": b"\x01" * 16}
    assert not os.get_inheritable(fd), "a worker must not inherit what was handed to us"
    os.write(fd, b"through")
    assert os.read(reader, 7) == b"through"
    ipc.close_all([fd, reader])


def test_nothing_in_time_is_none_and_the_end_is_closed(ends: tuple[Link, Link]) -> None:
    ours, theirs = ends
    assert theirs.receive(0) is None
    ours.close()
    with pytest.raises(LinkClosed):
        theirs.receive(1_000)
    with pytest.raises(LinkClosed):
        theirs.send({"op": "ping"})
    with pytest.raises(LinkClosed):
        ours.send({"op": "ping"})


def test_both_ends_ask_at_once_and_each_gets_its_own_answer(ends: tuple[Link, Link]) -> None:
    def answerer(link: Link) -> ipc.Handler:
        return lambda message, _fds: link.reply(message, {"n": message["n"] * 2})

    for link in ends:
        serve(link, answerer(link))
    answers: dict[tuple[int, int], int] = {}

    def ask(end: int, link: Link, start: int) -> None:
        for n in range(start, start + 50):
            answers[end, n] = link.request({"op": "double", "n": n})[0]["n"]

    threads = [
        threading.Thread(target=ask, args=(end, link, start))
        for end, link in enumerate(ends)
        for start in (0, 100)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(answers) == 200
    assert all(answer == 2 * n for (_, n), answer in answers.items())


def test_descriptors_come_back_with_an_answer(ends: tuple[Link, Link]) -> None:
    ours, theirs = ends
    fd = os.memfd_create("answer")
    os.write(fd, b"here")
    serve(ours, ignore)
    serve(theirs, lambda message, _fds: theirs.reply(message, {"op": "ok"}, [fd]))
    answer, (copy,) = ours.request({"op": "fetch"})
    assert answer["op"] == "ok"
    assert os.pread(copy, 4, 0) == b"here"
    ipc.close_all([fd, copy])


def test_a_silent_peer_is_a_deadline_and_its_late_answer_goes_nowhere(
    ends: tuple[Link, Link],
) -> None:
    ours, theirs = ends
    serve(ours, ignore)
    with pytest.raises(failure.DeadlineExceeded):
        ours.request({"op": "bind"}, timeout_ms=20)
    late = theirs.receive(1_000)
    assert late is not None
    theirs.reply(late[0], {"op": "late"}, [0])
    serve(theirs, lambda message, _fds: theirs.reply(message, {"op": "in time"}))
    assert ours.request({"op": "bind"})[0]["op"] == "in time"


def test_a_peer_that_dies_ends_every_wait(ends: tuple[Link, Link]) -> None:
    ours, theirs = ends
    thread = serve(ours, ignore)
    threading.Timer(0.02, theirs.close).start()
    with pytest.raises(LinkClosed):
        ours.request({"op": "bind"}, timeout_ms=10_000)
    thread.join(10)
    assert not thread.is_alive()
    with pytest.raises(LinkClosed):
        ours.request({"op": "bind"}, timeout_ms=10_000)


def test_a_peer_that_does_not_read_cannot_hold_the_sender(ends: tuple[Link, Link]) -> None:
    ours, _ = ends

    def fill() -> None:
        for _ in range(1_000):
            ours.send({"op": "notice", "text": "x" * 60_000}, timeout_ms=50)

    with pytest.raises(LinkClosed, match="does not read"):
        fill()


def test_what_is_too_long_is_refused_before_it_is_sent(ends: tuple[Link, Link]) -> None:
    ours, theirs = ends
    with pytest.raises(failure.FabricError) as refused:
        ours.send({"op": "x", "data": bytes(ipc.MESSAGE_BYTES_MAX)})
    assert refused.value.code == "MESSAGE_SIZE"
    ours.send({"op": "x", "data": bytes(ipc.MESSAGE_BYTES_MAX - 100)})
    received = theirs.receive(1_000)
    assert received is not None
    assert len(received[0]["data"]) == ipc.MESSAGE_BYTES_MAX - 100


@pytest.mark.parametrize(
    "data",
    [b"\xff", codec.encode([1]), codec.encode({1: 2}), bytes(ipc.MESSAGE_BYTES_MAX + 1)],
    ids=["no encoding", "no map", "keys that are no text", "too long"],
)
def test_nonsense_closes_the_link_and_leaks_no_descriptor(data: bytes) -> None:
    raw, end = ipc.pair()
    link = Link(end)
    open_before = set(os.listdir("/proc/self/fd"))
    socket.send_fds(raw, [data], [0, 0])
    with pytest.raises(LinkClosed):
        link.receive(1_000)
    assert set(os.listdir("/proc/self/fd")) == open_before
    raw.close()
    link.close()


def test_more_descriptors_than_agreed_close_the_link_and_leak_none() -> None:
    raw, end = ipc.pair()
    link = Link(end)
    open_before = set(os.listdir("/proc/self/fd"))
    socket.send_fds(raw, [codec.encode({"op": "x"})], [0] * (ipc.FDS_MAX + 4))
    with pytest.raises(LinkClosed):
        link.receive(1_000)
    assert set(os.listdir("/proc/self/fd")) == open_before
    raw.close()
    link.close()
