"""How a sweep is asked to end from outside: Ctrl-C, SIGTERM, and a terminal that closes (SIGHUP)."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO


@dataclass
class Halt:
    """Set by an interrupt: no trial is handed out after it. Tune pickles and copies searchers; copies share the original."""

    requested: bool = False
    at_once: bool = False  # asked for a second time: nothing is waited for

    def __deepcopy__(self, memo: dict) -> "Halt":
        return self


class LastingStream:
    """A stream for messages whose reader may go away: a closed terminal or pipe must not end a sweep."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._survive(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._survive(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _survive(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError:
            _to_nowhere(self._stream.fileno())  # what the buffer still holds goes there, also at the process's end


@contextlib.contextmanager
def interruptible(ask: Callable[[], bool], *, insist: Callable[[], None]) -> Iterator[None]:
    """Within, SIGINT, SIGTERM and SIGHUP call `ask()`, which says whether this was the first time; later ones `insist`.

    A closing terminal sends SIGHUP more than once (its kernel side and its shell), so SIGHUP never insists. Under
    `nohup`, where SIGHUP is ignored, it stays so. Does nothing outside the main thread.
    """

    def handle(signum: int, frame: Any) -> None:
        if signum == signal.SIGHUP:
            leave_terminal()
        if not ask() and signum != signal.SIGHUP:
            insist()

    numbers = [signal.SIGINT, signal.SIGTERM]
    with _handlers({number: handle for number in (*numbers, *_hangup())}):
        yield


@contextlib.contextmanager
def as_interrupt() -> Iterator[None]:
    """Within, the first SIGHUP or SIGTERM is a KeyboardInterrupt as from Ctrl-C, and later ones are ignored."""

    def handle(signum: int, frame: Any) -> None:
        if signum == signal.SIGHUP:
            leave_terminal()
        signal.signal(signum, signal.SIG_IGN)
        raise KeyboardInterrupt

    with _handlers(dict.fromkeys([signal.SIGTERM, *_hangup()], handle)):
        yield


@contextlib.contextmanager
def hangup_held_back() -> Iterator[None]:
    """Within, SIGHUP waits. Processes started here inherit that for good: when the terminal closes, Ray has to live on
    until every trial has its checkpoint."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_terminal() -> None:
    """Turn standard streams that are terminals into /dev/null: writing to a closed one is an error in every library."""
    for descriptor in (0, 1, 2):
        if os.isatty(descriptor) or _is_hung_up(descriptor):
            _to_nowhere(descriptor)


def _is_hung_up(descriptor: int) -> bool:
    """Whether it is a terminal that is gone already, which `isatty` no longer knows."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith(("/dev/pts/", "/dev/tty"))
    except OSError:
        return False


def _to_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    try:
        os.dup2(nowhere, descriptor)
    finally:
        os.close(nowhere)


def _hangup() -> list[signal.Signals]:
    return [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]


@contextlib.contextmanager
def _handlers(handlers: dict[signal.Signals, Callable[[int, Any], None]]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
