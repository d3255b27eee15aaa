"""HTTP connections that a slow client can't hold for long."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol


def connection_class(timeout: float) -> type[H11Protocol]:
    """The protocol of a server that aborts a connection whose client is idle for timeout seconds in a request.

    That is, one whose first bytes do not become a request, or who does not read its answer; the request is then
    cancelled like that of any client that is gone. The body of a request is awaited by the app.
    """

    class Connection(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._reading: asyncio.TimerHandle | None = self._abort_later()
            self._writing: asyncio.TimerHandle | None = None

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            is_in_request = self.cycle is not None and not self.cycle.response_complete
            if is_in_request and self._reading is not None:
                self._reading.cancel()
                self._reading = None
            elif not is_in_request and self._reading is None:
                self._reading = self._abort_later()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._writing = self._abort_later()

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._writing is not None:
                self._writing.cancel()

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._reading, self._writing):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

        def _abort_later(self) -> asyncio.TimerHandle:
            return self.loop.call_later(timeout, self.transport.abort)

    return Connection
