"""What tests read off an engine's events."""

from __future__ import annotations

from collections.abc import Sequence

from common.interface import ServingEngine
from common.request import TokenEvent


def tokens(events: Sequence[TokenEvent]) -> list[int]:
    """Without the end, where that brings none."""
    return [event.token_id for event in events if event.token_id is not None]


def drain(engine: ServingEngine) -> list[TokenEvent]:
    """All that comes until nothing is left to do."""
    events = []
    while engine.has_work:
        events += engine.step()
    return events
