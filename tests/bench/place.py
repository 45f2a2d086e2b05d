"""Where everybody's files lie during the measurements: one folder, on a real disk.

Rules. A file system in memory makes every sync free and every comparison wrong, so it is refused.
All parties' files lie on the same device, and that is looked at, not assumed. The folder of a run
is removed at its end.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

MEMORY_FILE_SYSTEMS: Final = {0x01021994: "tmpfs", 0x858458F6: "ramfs", 0x958458F6: "hugetlbfs"}
DISK_FILE_SYSTEMS: Final = {
    0xEF53: "ext2/3/4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x794C7630: "overlayfs",
    0x2FC12FC1: "zfs",
    0xF2F52010: "f2fs",
    0x6969: "nfs",
}
"""Source: statfs(2), f_type."""
STATFS_BYTES: Final = 512
"""Room enough for the structure on every machine."""


class WrongPlaceError(Exception):
    """The folder is no place to measure in; the text says why and what to do."""


def file_system(path: Path) -> tuple[int, str]:
    """The magic number of the file system that holds `path`, and its name."""
    room = ctypes.create_string_buffer(STATFS_BYTES)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statfs(os.fsencode(path), room) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    magic = ctypes.c_long.from_buffer(room).value & 0xFFFFFFFF
    return magic, (MEMORY_FILE_SYSTEMS | DISK_FILE_SYSTEMS).get(magic, hex(magic))


class Place:
    """The folder of one run. Made by `open_place`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.device = os.stat(folder).st_dev
        self.file_system = file_system(folder)[1]

    def make(self, name: str) -> Path:
        """A new folder for one party."""
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))

    def check_same_disk(self, path: Path) -> None:
        refuse_memory(path)
        if os.stat(path).st_dev != self.device:
            raise WrongPlaceError(
                f"{path} is not on the disk of {self.folder}; give a shorter --dir on that disk"
            )

    @contextmanager
    def for_temporary_files(self) -> Generator[None]:
        """Whoever makes temporary files in this block makes them here."""
        before, tempfile.tempdir = tempfile.tempdir, str(self.folder)
        try:
            yield
        finally:
            tempfile.tempdir = before


def refuse_memory(path: Path) -> None:
    magic, name = file_system(path)
    if magic in MEMORY_FILE_SYSTEMS:
        raise WrongPlaceError(f"{path} lies in memory ({name}): give a folder on a disk, --dir")


@contextmanager
def open_place(parent: Path) -> Generator[Place]:
    """A new folder below `parent`, gone at the end."""
    parent.mkdir(parents=True, exist_ok=True)
    refuse_memory(parent)
    with tempfile.TemporaryDirectory(prefix="r", dir=parent, ignore_cleanup_errors=True) as folder:
        yield Place(Path(folder))
