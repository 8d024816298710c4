"""The secret that the processes of one launch share.

`TANDEM_LAUNCH_SECRET` holds it, and the launcher passes that to every process. A launch on the loopback interface may leave it
out: its processes then read a file that only their user can read.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from common.config import expect
from common.errors import BackendError
from common.weights.zoo import cache_directory

SECRET = "TANDEM_LAUNCH_SECRET"
"""The name of the environment variable."""
MIN_LENGTH = 16
"""Characters. A network that sees a proof can test short secrets offline."""


def launch_secret(environment: Mapping[str, str], host: str) -> str:
    """Return the secret of a launch whose first process listens at `host`. Raises `ConfigError` if there is none."""
    given = environment.get(SECRET)
    if given:
        expect(len(given) >= MIN_LENGTH, f"{SECRET} must have at least {MIN_LENGTH} characters, got {len(given)}.")
        return given
    expect(
        is_loopback(host),
        f"MASTER_ADDR={host} is not a loopback address, so this launch needs a secret. Set {SECRET} to the same random text "
        f"for all processes, for example with `export {SECRET}=$(openssl rand -hex 32)` before torchrun or srun.",
    )
    return user_secret(cache_directory())


def is_loopback(host: str) -> bool:
    """Return whether every address of a host is on the loopback interface. False for a host that cannot be resolved."""
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


def user_secret(folder: Path) -> str:
    """Return the secret of this user, which a file in `folder` holds. The first call creates the file. Raises `ConfigError` for
    a file that others could have read or written, `BackendError` if it cannot be read or created."""
    path = folder / f"launch-secret-{os.getuid()}"
    try:
        if not path.exists():
            _create(path)
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), encoding="ascii") as file:
            status = os.fstat(file.fileno())
            private = stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
            expect(private, f"{path} must be a file that only its owner can read and write. Delete it, or set {SECRET}.")
            secret = file.read(1024)
    except OSError as error:
        raise BackendError(f"The secret of this user cannot be read or created ({error}). Set {SECRET}.") from error
    expect(len(secret) >= MIN_LENGTH, f"{path} must hold at least {MIN_LENGTH} characters. Delete it, or set {SECRET}.")
    return secret


def _create(path: Path) -> None:
    """Create the file whole, unless another process has created it."""
    handle, draft = tempfile.mkstemp(dir=path.parent)  # mode 0600
    try:
        with open(handle, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        os.unlink(draft)
