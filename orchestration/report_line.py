"""A worker's own connection to the DualServer, for the one call that every dual step waits for.

A call of a Ray actor costs about a millisecond on either side's threads, more than the dual step and its sync to disk
together. So the actor also listens on a port of its node, and reports travel there: a frame is four bytes of length and
JSON, whose floats come back to the last bit. Whoever connects gives the token that only Ray's calls hand out; until then
nothing is done for it. Losing the connection loses nothing: a report is sent again through Ray, and a repeated report gets
the recorded answer.
"""

import asyncio
import hmac
import json
import secrets
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from dualsweep.trainers.dual_client import Reply

MAX_FRAME = 1 << 28  # bytes; a report of a million constraints is smaller
CONNECT_S = 5.0
RETRY_S = 60.0  # between attempts to connect to a port that did not answer
# Answers may take their time; a node that is gone without a word is noticed by unanswered probes.
PROBES = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
_LENGTH = struct.Struct(">I")

# Performs a report. Returns: what is done once it is durable (None: it is already), and how to make the answer then.
Book = Callable[[str, int, int, dict[str, Any]], tuple["asyncio.Future[None] | None", Callable[[], Reply]]]


def frame(content: Any) -> bytes:
    body = json.dumps(content, separators=(",", ":")).encode()
    return _LENGTH.pack(len(body)) + body


class LineServer:
    """Listens for reports in the event loop that calls `address` first."""

    def __init__(self) -> None:
        self.token = secrets.token_hex(32)
        self._server: asyncio.Server | None = None
        self._opening = asyncio.Lock()

    async def address(self, host: str, book: Book) -> tuple[str, int, str]:
        """Host, port and token; the port is opened at the first call, on that host's interface alone."""
        async with self._opening:
            if self._server is None:
                self._server = await asyncio.get_running_loop().create_server(
                    lambda: _Caller(self.token, book), host, 0
                )
        return host, self._server.sockets[0].getsockname()[1], self.token

    def close(self) -> None:
        if self._server is not None:
            self._server.close()


class _Caller(asyncio.Protocol):
    """One worker's connection, on the server's side."""

    def __init__(self, token: str, book: Book) -> None:
        self.book, self.greeting = book, frame(token)[_LENGTH.size :]
        self.known, self.received = False, bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        while len(self.received) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self.received)
            end = _LENGTH.size + length
            if length > (MAX_FRAME if self.known else 200):  # a stranger gets no memory
                self.transport.close()
                return
            if len(self.received) < end:
                return
            body = bytes(self.received[_LENGTH.size : end])
            del self.received[:end]
            if self.known:
                self._report(body)
            elif hmac.compare_digest(body, self.greeting):
                self.known = True
            else:
                self.transport.close()
                return

    def _report(self, body: bytes) -> None:
        try:
            durable, answer = self.book(*json.loads(body))
        except Exception as error:  # the caller's to raise, whatever it is  # noqa: BLE001
            self._refuse(error)
            return
        if durable is None:
            self._answer(answer)
        else:
            durable.add_done_callback(lambda done: self._refuse(e) if (e := done.exception()) else self._answer(answer))

    def _answer(self, answer: Callable[[], Reply]) -> None:
        reply = answer()
        self.transport.write(frame([list(reply.multipliers), reply.directive, reply.dual_state]))

    def _refuse(self, error: BaseException) -> None:
        self.transport.write(frame({"error": type(error).__name__, "text": str(error)}))


class LineLost(OSError):
    """No answer came; whether the report was booked is unknown, so it has to be sent again."""


class Line:
    """A worker's side. One report at a time: `send`, then `receive`."""

    def __init__(self, find: Callable[[], tuple[str, int, str]]) -> None:
        """
        Args:
            find: asks the actor for its host, port and token.
        """
        self._find = find
        self._socket: socket.socket | None = None
        self._owed = False  # an answer that nobody has received
        self._not_before = 0.0

    def send(self, *report: Any) -> None:
        """Raises: LineLost at once while the port is known not to answer."""
        content = frame(report)
        if self._owed:  # its attempt is over; the answer must not be taken for the next one's
            self.close()
        try:
            if self._socket is None:
                self._socket = self._connected()
            self._socket.sendall(content)
            self._owed = True
        except OSError as error:
            self.close()
            raise LineLost(str(error)) from error

    def receive(self, timeout_s: float) -> Reply | tuple[str, str]:
        """The answer to the report sent last, or the name and text of what refused it. Raises: LineLost."""
        try:
            if self._socket is None:
                raise ConnectionError("not connected")
            self._socket.settimeout(timeout_s)
            (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
            content = json.loads(self._exactly(length))
            self._owed = False
        except OSError as error:
            self.close()
            raise LineLost(str(error)) from error
        if isinstance(content, dict):
            return content["error"], content["text"]
        multipliers, directive, dual_state = content
        return Reply(multipliers=tuple(multipliers), directive=directive, dual_state=dual_state)

    def _connected(self) -> socket.socket:
        if time.monotonic() < self._not_before:
            raise ConnectionError("the port did not answer a while ago")
        self._not_before = time.monotonic() + RETRY_S
        host, port, token = self._find()
        connection = socket.create_connection((host, port), timeout=CONNECT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in PROBES.items():
            if hasattr(socket, option):  # Linux names; elsewhere the system's own probes
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        connection.sendall(frame(token))
        self._not_before = 0.0
        return connection

    def _exactly(self, count: int) -> bytes:
        received = bytearray(count)
        view = memoryview(received)
        while view:
            if not (part := self._socket.recv_into(view)):
                raise ConnectionError("the DualServer closed the connection")
            view = view[part:]
        return bytes(received)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket, self._owed = None, False
