"""How a command ends that does not end well: one message on standard error, and an exit code."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

FAILURE = 1
"""An engine, a job of a sweep or the machine failed; a defect of ours too, with its traceback."""
USER_ERROR = 2
GATE = 3
"""A run is whole, and a condition of `fail_if` holds."""
INTERRUPTED = 130
READER_GONE = 128 + signal.SIGPIPE


def fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
