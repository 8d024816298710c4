"""A folder of this process alone, in the temporary directory of the system.

Whoever is killed leaves its own behind, which the next process that makes one removes. It tells by a lock, which ends with the
process that holds it, whatever becomes of that.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

MAKING, MADE = "tandem-new-", "tandem-front-"
"""How the names of folders begin, before they are locked and from then on."""


@dataclass(frozen=True)
class PrivateFolder:
    """There until `remove`."""

    path: Path
    _lock: int
    """A descriptor of the folder that holds the lock. No process that is started has it."""

    @classmethod
    def make(cls) -> Self:
        """Remove what dead processes have left, and make one."""
        for left in Path(tempfile.gettempdir()).glob(f"{MADE}*"):
            with suppress(OSError):  # it is another user's, or gone by now
                remove_unless_locked(left)
        made = Path(tempfile.mkdtemp(prefix=MAKING))
        lock = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = made.rename(made.with_name(made.name.replace(MAKING, MADE, 1)))  # it is never seen by that name without the lock
        return cls(path, lock)

    def remove(self) -> None:
        """With all that is in it. Idempotent. The lock ends with the process."""
        shutil.rmtree(self.path, ignore_errors=True)


def remove_unless_locked(path: Path) -> None:
    """Raises `OSError` where it is locked, no folder, or not ours."""
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_uid == os.geteuid():
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(lock)
