"""Ctrl-C: the first stops after the current client, the second at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from cgfedllm import events
from cgfedllm.errors import RunInterrupted

_requested = threading.Event()


@contextmanager
def stoppable(after: str = "client") -> Iterator[None]:
    """Inside this block Ctrl-C (SIGINT) and SIGTERM only ask the run to stop.

    Parameters
    ----------
    after : str
        What is finished first, as people are told.
    """
    _requested.clear()
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set signal handlers
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        if _requested.is_set():
            raise KeyboardInterrupt
        _requested.set()
        events.publish(
            events.Notice(
                f"stopping after the current {after}; press Ctrl-C again to stop at once", "warning"
            )
        )

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_interrupt() -> None:
    """Stop here if somebody asked for it.

    Raises
    ------
    RunInterrupted
        If a stop was requested.
    """
    if _requested.is_set():
        raise RunInterrupted("stopped on request; everything up to the last full round is kept")
