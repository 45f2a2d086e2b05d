"""Blocks are readable under their own lease's key, in their own place, and nowhere else."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from grafos_core import failure
from services.nodeagent.devices import blocklease
from services.nodeagent.devices.block import CANARY_BLOCKS, TRANSFER_BLOCKS, BlockDevice
from services.nodeagent.devices.blocklease import (
    BlockIdentity,
    BlockKey,
    BlockLease,
    TagTable,
    create_tags,
    new_key,
    wipe,
)
from services.runtime import faults

BLOCK = 4096
DEVICE_BLOCKS, EXTENT_BLOCKS, OFFSET = 512, 128, 256
WHO = BlockIdentity("cd" * 16, "ab" * 16, 7, 1, OFFSET, EXTENT_BLOCKS)


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlockDevice]:
    device = BlockDevice(tmp_path / "blocks", DEVICE_BLOCKS * BLOCK, direct=request.param)
    yield device
    device.close()


@pytest.fixture
def faulty() -> Iterator[Callable[[str], None]]:
    yield lambda text: faults.arm(text, development=True)
    faults.arm("", development=True)


class Process:
    """What one front has of a lease; several share the device and the table."""

    now_ns = 0

    def __init__(
        self,
        device: BlockDevice,
        tags_fd: int,
        key: bytes | bytearray,
        who: BlockIdentity = WHO,
        cipher: Callable[[bytes | bytearray], blocklease.Cipher] = AESGCM,
    ) -> None:
        tags = TagTable(os.dup(tags_fd), who.extent_blocks)
        self.key = BlockKey(
            key,
            first_counter=tags.claim_counters(),
            deadline_ns=1_000,
            boottime_ns=lambda: self.now_ns,
            cipher=cipher,
        )
        self.lease = BlockLease(device, tags, who, self.key)


@pytest.fixture
def tags_fd() -> Iterator[int]:
    fd = create_tags(WHO)
    yield fd
    os.close(fd)


@pytest.fixture
def key() -> bytearray:
    return new_key()


@pytest.fixture
def front(device: BlockDevice, tags_fd: int, key: bytearray) -> Iterator[Process]:
    front = Process(device, tags_fd, key)
    yield front
    front.lease.close()


@pytest.fixture
def lease(front: Process) -> BlockLease:
    return front.lease


def code(action: Callable[[], object]) -> str:
    with pytest.raises(failure.FabricError) as refused:
        action()
    return refused.value.code


def on_disk(device: BlockDevice, block: int, count: int = 1) -> bytes:
    with device.path.open("rb") as file:
        file.seek(block * BLOCK)
        return file.read(count * BLOCK)


def overwrite(device: BlockDevice, block: int, data: bytes) -> None:
    """As a faulty disk, or a hostile one, would."""
    with device.path.open("r+b") as file:
        file.seek(block * BLOCK)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


# What a holder gets


def test_what_was_written_is_read_and_the_rest_is_zeros(lease: BlockLease) -> None:
    data = os.urandom(3 * BLOCK)
    lease.write(10 * BLOCK, data)
    assert lease.read(9 * BLOCK, 5 * BLOCK) == bytes(BLOCK) + data + bytes(BLOCK)
    assert lease.read(0, 0) == b""


def test_more_than_one_transfer_at_a_time(lease: BlockLease) -> None:
    data = os.urandom((TRANSFER_BLOCKS + 3) * BLOCK)
    lease.write(5 * BLOCK, data)
    lease.flush()
    assert lease.read(5 * BLOCK, len(data)) == data


def test_the_disk_holds_no_plain_text(lease: BlockLease, device: BlockDevice) -> None:
    lease.write(0, b"secret" * 4096)
    assert b"secret" not in on_disk(device, OFFSET, EXTENT_BLOCKS)
    assert any(on_disk(device, OFFSET))


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (EXTENT_BLOCKS * BLOCK, BLOCK),
        ((EXTENT_BLOCKS - 1) * BLOCK, 2 * BLOCK),
        (-BLOCK, BLOCK),
        (0, -BLOCK),
        (2**64 - BLOCK, BLOCK),
        (2**64 - 1, 1),
        (0, 2**63),
        (1, BLOCK),
        (0, BLOCK - 1),
        (512, 512),
    ],
)
def test_what_is_outside_or_unaligned_is_refused_and_changes_nothing(
    lease: BlockLease, device: BlockDevice, offset: int, length: int
) -> None:
    before = on_disk(device, 0, DEVICE_BLOCKS)
    assert code(lambda: lease.read(offset, length)) == "EXTENT"
    if 0 <= length < 2**30:
        assert code(lambda: lease.write(offset, bytes(length))) == "EXTENT"
    assert on_disk(device, 0, DEVICE_BLOCKS) == before


def test_the_end_of_the_extent_is_usable_and_the_neighbours_are_untouched(
    lease: BlockLease, device: BlockDevice
) -> None:
    lease.write(0, os.urandom(EXTENT_BLOCKS * BLOCK))
    assert not any(on_disk(device, OFFSET - 1))
    assert not any(on_disk(device, OFFSET + EXTENT_BLOCKS))


# What the disk cannot do unseen


def test_a_torn_write_is_seen(lease: BlockLease, device: BlockDevice) -> None:
    lease.write(0, os.urandom(4 * BLOCK))
    overwrite(device, OFFSET + 2, bytes(512))
    assert code(lambda: lease.read(0, 4 * BLOCK)) == "TORN"
    assert lease.read(0, 2 * BLOCK), "its neighbours are well"
    lease.write(2 * BLOCK, b"x" * BLOCK)
    assert lease.read(2 * BLOCK, BLOCK) == b"x" * BLOCK, "written whole it is well again"


def test_a_block_put_elsewhere_or_back_is_seen(lease: BlockLease, device: BlockDevice) -> None:
    lease.write(0, b"one" + bytes(BLOCK - 3) + b"two" + bytes(BLOCK - 3))
    old = on_disk(device, OFFSET)
    overwrite(device, OFFSET + 1, old)
    assert code(lambda: lease.read(BLOCK, BLOCK)) == "TORN"
    lease.write(0, b"new" + bytes(BLOCK - 3))
    overwrite(device, OFFSET, old)
    assert code(lambda: lease.read(0, BLOCK)) == "TORN", "an older version is not the block"


def test_a_block_that_changes_places_together_with_its_entry_is_seen(
    lease: BlockLease, device: BlockDevice, tags_fd: int
) -> None:
    lease.write(0, b"1" * BLOCK + b"2" * BLOCK)
    blocks, entries = on_disk(device, OFFSET, 2), os.pread(tags_fd, 128, 64)
    overwrite(device, OFFSET, blocks[BLOCK:] + blocks[:BLOCK])
    os.pwrite(tags_fd, entries[64:] + entries[:64], 64)
    assert code(lambda: lease.read(0, BLOCK)) == "TORN"
    assert code(lambda: lease.read(BLOCK, BLOCK)) == "TORN"


@pytest.mark.parametrize(
    "other",
    [
        replace(WHO, lease_id="ef" * 16),
        replace(WHO, incarnation="ef" * 16),
        replace(WHO, epoch=8),
        replace(WHO, key_number=2),
    ],
)
def test_the_same_key_and_bytes_under_another_name_are_refused(
    device: BlockDevice, tags_fd: int, key: bytearray, lease: BlockLease, other: BlockIdentity
) -> None:
    lease.write(0, b"x" * BLOCK)
    assert code(lambda: Process(device, tags_fd, key, other).lease.read(0, BLOCK)) == "TORN"
    assert Process(device, tags_fd, key).lease.read(0, BLOCK) == b"x" * BLOCK


def test_another_key_opens_nothing(device: BlockDevice, tags_fd: int, lease: BlockLease) -> None:
    lease.write(0, b"x" * BLOCK)
    assert code(lambda: Process(device, tags_fd, new_key()).lease.read(0, BLOCK)) == "TORN"


# The key


def test_the_key_refuses_at_its_deadline_and_a_later_one_may_be_set(
    front: Process, device: BlockDevice
) -> None:
    front.lease.write(0, b"x" * BLOCK)
    before = on_disk(device, OFFSET, EXTENT_BLOCKS)
    front.now_ns = 1_000
    assert code(lambda: front.lease.write(0, b"y" * BLOCK)) == "LEASE_EXPIRED"
    assert code(lambda: front.lease.read(0, BLOCK)) == "LEASE_EXPIRED"
    assert code(lambda: front.lease.read(5 * BLOCK, BLOCK)) == "LEASE_EXPIRED"
    assert on_disk(device, OFFSET, EXTENT_BLOCKS) == before
    front.lease.raise_deadline(2_000)
    front.lease.raise_deadline(500)
    assert front.lease.read(0, BLOCK) == b"x" * BLOCK
    assert on_disk(device, OFFSET, EXTENT_BLOCKS) == before, "a renewal changes no byte at rest"


def test_once_closed_it_is_fenced_and_not_torn(front: Process, device: BlockDevice) -> None:
    front.lease.write(0, b"x" * BLOCK)
    overwrite(device, OFFSET, bytes(BLOCK))
    front.lease.close()
    front.lease.close()
    assert code(lambda: front.lease.read(0, BLOCK)) == "FENCED"
    assert code(lambda: front.lease.write(0, bytes(BLOCK))) == "FENCED"
    assert code(lambda: front.lease.flush()) == "FENCED"
    assert code(lambda: front.lease.read(1, 1)) == "EXTENT", "a wrong range is a wrong range"
    assert code(lambda: front.key.seal(b"", b"")) == "FENCED"


def test_a_forked_child_has_no_key(lease: BlockLease) -> None:
    lease.write(0, b"x" * BLOCK)
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        try:
            lease.read(0, BLOCK)
        except failure.Disconnected as refused:
            os._exit(0 if refused.code == "FORKED_CHILD" else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_wiped_key_is_zeros() -> None:
    key = new_key()
    assert any(key)
    wipe(key)
    assert key == bytes(32)


class Recorder:
    """AES-GCM that notes every nonce it was ever given, by key."""

    seen: list[tuple[bytes, bytes]]

    def __init__(self, seen: list[tuple[bytes, bytes]], key: bytes | bytearray) -> None:
        self.seen, self.key, self.real = seen, bytes(key), AESGCM(key)

    def encrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None) -> bytes:
        self.seen.append((self.key, nonce))
        return self.real.encrypt(nonce, data, associated_data)

    def decrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None) -> bytes:
        return self.real.decrypt(nonce, data, associated_data)


def test_no_nonce_repeats_under_a_key_across_threads_and_restarted_fronts(
    device: BlockDevice, tags_fd: int, key: bytearray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the random part of every process is the same, which is the worst case."""
    monkeypatch.setattr(os, "urandom", lambda count: bytes(count))
    seen: list[tuple[bytes, bytes]] = []
    for _ in range(3):
        front = Process(device, tags_fd, key, cipher=lambda key: Recorder(seen, key))
        with ThreadPoolExecutor(4) as pool:
            for at in range(40):
                pool.submit(front.lease.write, at % 8 * BLOCK, b"x" * 3 * BLOCK)
        front.lease.close()
    assert len(seen) == 3 * 40 * 3
    assert len(set(seen)) == len(seen)


def test_every_process_has_a_random_part_of_its_own(
    device: BlockDevice, tags_fd: int, key: bytearray
) -> None:
    seen: list[tuple[bytes, bytes]] = []
    for _ in range(2):
        front = Process(device, tags_fd, key, cipher=lambda key: Recorder(seen, key))
        front.lease.write(0, bytes(BLOCK))
    assert seen[0][1][:4] != seen[1][1][:4]


def test_a_key_that_is_used_up_writes_no_more(
    front: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front.key, "_counter_end", 2)
    front.lease.write(0, b"x" * 2 * BLOCK)
    assert code(lambda: front.lease.write(0, b"y" * BLOCK)) == "DEGRADED"
    assert front.lease.read(0, 2 * BLOCK) == b"x" * 2 * BLOCK


# Fronts that die


def test_the_next_front_reads_on(
    device: BlockDevice, tags_fd: int, key: bytearray, front: Process
) -> None:
    front.lease.write(0, b"x" * BLOCK)
    front.lease.close()
    after = Process(device, tags_fd, key)
    assert after.lease.read(0, 2 * BLOCK) == b"x" * BLOCK + bytes(BLOCK)
    after.lease.write(0, b"y" * BLOCK)
    assert after.lease.read(0, BLOCK) == b"y" * BLOCK


@pytest.mark.parametrize("written_before", [True, False])
@pytest.mark.parametrize("arrived", [True, False])
def test_a_write_cut_off_by_a_crash_is_there_or_not_but_never_torn(
    device: BlockDevice,
    tags_fd: int,
    key: bytearray,
    faulty: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    written_before: bool,
    arrived: bool,
) -> None:
    first = Process(device, tags_fd, key)
    old = b"o" * 2 * BLOCK if written_before else bytes(2 * BLOCK)
    new = b"n" * 2 * BLOCK
    if written_before:
        first.lease.write(0, old)
    if arrived:  # killed after the disk had it, before the table said so
        real, calls = TagTable.write, iter([True, False])

        def once(table: TagTable, *written: Any) -> None:
            if not next(calls):
                raise OSError("killed here")
            real(table, *written)

        monkeypatch.setattr(TagTable, "write", once)
        with pytest.raises(OSError):
            first.lease.write(0, new)
        monkeypatch.undo()
    else:
        faulty("block.write:EIO")
        assert code(lambda: first.lease.write(0, new)) == "IO"
        faults.arm("", development=True)
    for _ in range(2):
        assert Process(device, tags_fd, key).lease.read(0, 2 * BLOCK) == (new if arrived else old)
    after = Process(device, tags_fd, key)
    after.lease.write(BLOCK, b"z" * BLOCK)
    assert after.lease.read(BLOCK, BLOCK) == b"z" * BLOCK
    assert after.lease.read(0, BLOCK) == (new if arrived else old)[:BLOCK]


def test_a_front_killed_in_mid_write_leaves_each_block_old_or_new(
    device: BlockDevice, tags_fd: int, key: bytearray
) -> None:
    first = Process(device, tags_fd, key)
    first.lease.write(0, b"\0" * 8 * BLOCK)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        mine = Process(device, tags_fd, key)
        for n in range(1, 100_000):
            mine.lease.write(0, bytes([n % 251]) * 8 * BLOCK)
            os.write(writer, b".")
        os._exit(0)
    assert len(os.read(reader, 4)) > 0
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = Process(device, tags_fd, key).lease.read(0, 8 * BLOCK)
    fills = {part[0] for part in (found[i * BLOCK : (i + 1) * BLOCK] for i in range(8))}
    assert all(len(set(found[i * BLOCK : (i + 1) * BLOCK])) == 1 for i in range(8))
    assert len(fills) <= 2
    os.close(reader)
    os.close(writer)


def test_a_table_of_another_lease_is_refused(tags_fd: int) -> None:
    assert code(lambda: TagTable(os.dup(tags_fd), EXTENT_BLOCKS + 1)) == "VERSION"


# Threads, quiesce


def test_reads_beside_writes_of_the_same_blocks_are_never_torn(lease: BlockLease) -> None:
    lease.write(0, b"\0" * 4 * BLOCK)

    def write(n: int) -> None:
        lease.write(0, bytes([n]) * 4 * BLOCK)

    with ThreadPoolExecutor(4) as pool:
        writes = [pool.submit(write, n) for n in range(30)]
        reads = [pool.submit(lease.read, 0, 4 * BLOCK) for _ in range(60)]
    for done in writes:
        done.result()
    assert all(len(set(done.result())) == 1 for done in reads)


def test_quiesce_waits_for_what_is_in_flight_and_refuses_what_comes(
    lease: BlockLease, faulty: Callable[[str], None]
) -> None:
    faulty("block.write:hang=200:1")
    slow = threading.Thread(target=lease.write, args=(0, b"x" * BLOCK))
    slow.start()
    while not lease.in_flight:
        pass
    assert lease.quiesce(0) is False
    assert code(lambda: lease.read(0, BLOCK)) == "FENCED"
    assert lease.quiesce(10_000) is True
    slow.join(10)
    assert lease.in_flight == 0


# Failures of the disk


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("block.write:EIO", "IO"),
        ("block.write:ENOSPC", "DISK"),
        ("block.write:EDQUOT", "DISK"),
        ("block.write:EFBIG", "DISK"),
        ("block.flush:EIO", "IO"),
        ("block.read:EIO", "IO"),
    ],
)
def test_errors_of_the_disk_are_typed(
    lease: BlockLease, faulty: Callable[[str], None], fault: str, expected: str
) -> None:
    lease.write(0, b"x" * BLOCK)
    faulty(fault)

    def use() -> None:
        lease.write(0, b"y" * BLOCK)
        lease.flush()
        lease.read(0, BLOCK)

    assert code(use) == expected
    faults.arm("", development=True)
    assert lease.read(0, BLOCK) in {b"x" * BLOCK, b"y" * BLOCK}


# Erase and measure


def test_erased_means_zeros_and_the_space_stays_reserved(
    device: BlockDevice, lease: BlockLease
) -> None:
    lease.write(0, os.urandom(EXTENT_BLOCKS * BLOCK))
    overwrite(device, OFFSET - 1, b"neighbour")
    reserved = os.stat(device.path).st_blocks
    assert device.measure(OFFSET, EXTENT_BLOCKS)["clean"] is False
    assert device.measure(OFFSET, EXTENT_BLOCKS)["dirty_blocks"] == EXTENT_BLOCKS
    assert device.erase(OFFSET, EXTENT_BLOCKS) in {"zero_range", "punch_hole", "written"}
    assert device.measure(OFFSET, EXTENT_BLOCKS) == {
        "read_bytes": EXTENT_BLOCKS * BLOCK,
        "dirty_blocks": 0,
        "mode": device.mode,
        "clean": True,
    }
    assert os.stat(device.path).st_blocks >= reserved
    assert on_disk(device, OFFSET - 1)[:9] == b"neighbour"


@pytest.mark.parametrize("supported", [0x02, 0], ids=["punch", "neither"])
def test_a_file_system_that_cannot_zero_a_range_is_erased_otherwise(
    device: BlockDevice, lease: BlockLease, monkeypatch: pytest.MonkeyPatch, supported: int
) -> None:
    from services.nodeagent.devices import block

    real = block._fallocate

    def limited(fd: int, mode: int, offset: int, length: int) -> bool:
        return bool(mode & supported) and real(fd, mode, offset, length)

    monkeypatch.setattr(block, "_fallocate", limited)
    lease.write(0, os.urandom(EXTENT_BLOCKS * BLOCK))
    assert device.erase(OFFSET, EXTENT_BLOCKS) == ("punch_hole" if supported else "written")
    assert device.measure(OFFSET, EXTENT_BLOCKS)["clean"] is True


def test_one_byte_left_is_one_dirty_block(device: BlockDevice) -> None:
    overwrite(device, OFFSET + 5, bytes(4095) + b"\1")
    assert device.measure(OFFSET, EXTENT_BLOCKS)["dirty_blocks"] == 1


def test_erase_and_measure_fail_as_the_disk_fails(
    device: BlockDevice, faulty: Callable[[str], None]
) -> None:
    faulty("block.erase:EIO,block.measure:EIO")
    with pytest.raises(OSError):
        device.erase(OFFSET, 1)
    with pytest.raises(OSError):
        device.measure(OFFSET, 1)


def test_the_selftest_uses_only_the_canary(device: BlockDevice) -> None:
    overwrite(device, DEVICE_BLOCKS - 1, b"lent")
    device.selftest()
    assert on_disk(device, DEVICE_BLOCKS - 1)[:4] == b"lent"
    assert not any(on_disk(device, DEVICE_BLOCKS, CANARY_BLOCKS))
    assert code(lambda: device.erase(DEVICE_BLOCKS, 1)) == "EXTENT"
    assert code(lambda: device.read_into_buffer(DEVICE_BLOCKS, 1)) == "EXTENT"


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    BlockDevice(tmp_path / "blocks", 64 * BLOCK).close()
    assert code(lambda: BlockDevice(tmp_path / "blocks", 65 * BLOCK)) == "VERSION"
    BlockDevice(tmp_path / "blocks", 64 * BLOCK).close()


def test_the_mode_is_told(tmp_path: Path) -> None:
    device = BlockDevice(tmp_path / "blocks", 64 * BLOCK, direct=False)
    assert device.mode == "buffered"
    device.close()
