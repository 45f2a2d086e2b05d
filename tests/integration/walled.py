"""Becomes another user in another network, and then another program: run as root, as a file.

    walled.py UID [FOLDER …] -- PROGRAM [ARGUMENT …]

Rules. The mounts are this process's own, so nothing that is done here is seen outside. A folder
that the new user needs and may not reach, because one above it is closed, is shown at its own place
in an empty one; whatever else lay there is hidden. All rights are given up before the program
starts; it has this process's number, and ends with whoever started it.
"""

import ctypes
import os
import sys
from pathlib import Path

MS_BIND, MS_REC = 4096, 16384
PR_SET_PDEATHSIG, SIGKILL = 1, 9
OTHERS_MAY_ENTER = 0o001

_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: Path, kind: str, flags: int, options: str = "") -> None:
    words = [word.encode() for word in (source, str(target), kind)]
    if _libc.mount(*words, ctypes.c_ulong(flags), options.encode()):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def closed_above(folder: Path) -> Path | None:
    """The first folder on the way that others may not enter."""
    way = [*reversed(folder.parents), folder][1:-1]
    return next((each for each in way if not each.stat().st_mode & OTHERS_MAY_ENTER), None)


def uncover(folders: list[Path]) -> None:
    """Make all of these reachable, each at its own place."""
    held = {each: os.open(each, os.O_PATH | os.O_DIRECTORY) for each in folders}
    for wall in {closed_above(each) for each in folders} - {None}:
        assert wall is not None
        mount("tmpfs", wall, "tmpfs", 0, "mode=0755,size=1m")
    for each, descriptor in held.items():
        if not each.exists():
            each.mkdir(parents=True)
            mount(f"/proc/self/fd/{descriptor}", each, "none", MS_BIND | MS_REC)
        os.close(descriptor)


def main(words: list[str]) -> None:
    at = words.index("--")
    uid, folders, program = int(words[0]), [Path(each) for each in words[1:at]], words[at + 1 :]
    uncover(folders)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    _libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    os.umask(0o077)
    os.execv(program[0], program)


if __name__ == "__main__":
    main(sys.argv[1:])
