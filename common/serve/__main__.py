"""`python -m common.serve --backend jax --model smollm2-135m --port 8000`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from common.process.exits import USER_ERROR, exit_on_sigint

NEEDED = ("fastapi", "httpx", "llguidance", "prometheus_client", "pydantic", "uvicorn")
"""Packages of the extra `serve`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to end, if what that takes is installed; the exit code."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(f"error: The server needs {', '.join(missing)}: pip install -e '.[serve]', or make serve.", file=sys.stderr)
        return USER_ERROR
    with exit_on_sigint():
        from common.serve.command import main as serve
    return serve(arguments)


if __name__ == "__main__":
    sys.exit(main())
