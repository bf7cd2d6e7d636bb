"""AsyncEngine: requests of many coroutines through one Engine, whose steps run in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

from torch_paged.serving.engine import Engine
from torch_paged.serving.requests import Generation, Request
from torch_paged.serving.stream import Piece, Stream


class AsyncEngine:
    """Streams requests to the coroutines of one event loop.

        async with AsyncEngine(engine) as serving:
            async for piece in serving.stream(Request(prompt=[1, 2, 3])):
                print(piece.text)

    Steps run in a thread of their own, so that the loop stays free; requests and cancellations take effect between two
    of them. Nothing else may use the engine meanwhile. If a step raises, all requests end with that error, and later
    ones are served again. Leaving the `async with` cancels what is under way.

    Args:
        engine: to be driven.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._clients: list[_Client] = []
        self._inbox: list[Callable[[], None]] = []  # what is to be done with the engine between two steps
        self._wake = asyncio.Event()
        self._driver: asyncio.Task[None] | None = None
        self._open = False  # whether the driver goes on and takes requests

    async def __aenter__(self) -> AsyncEngine:
        if self._driver is not None:
            raise RuntimeError("an AsyncEngine cannot be entered twice at once")
        self._open = True
        self._driver = asyncio.create_task(self._drive())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._driver is not None
        self._open = False
        self._wake.set()
        try:
            await self._driver
        finally:
            self._driver = None

    async def stream(self, request: Request) -> AsyncIterator[Piece]:
        """Submit a request: its tokens as they come. Closing the iterator, or cancelling its task, cancels the request.

        Raises:
            RuntimeError: outside of `async with`.
            Exception: what went wrong with the request, after the tokens that came before.
        """
        if not self._open:
            raise RuntimeError("an AsyncEngine serves within `async with` alone")
        client = _Client()
        self._do(lambda: self._begin(client, request))
        try:
            while (item := await client.items.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            client.gone = True
            self._do(lambda: self._cancel(client))

    def _do(self, action: Callable[[], None]) -> None:
        self._inbox.append(action)
        self._wake.set()

    def _begin(self, client: _Client, request: Request) -> None:
        if client.gone:
            return
        try:
            client.begin(self._engine.submit(request))
        except Exception as error:
            client.items.put_nowait(error)
        else:
            self._clients.append(client)

    def _cancel(self, client: _Client) -> None:
        if client.generation is not None:
            self._engine.cancel(client.generation)

    async def _drive(self) -> None:
        """Steps as long as there is something to do, until `__aexit__`."""
        with ThreadPoolExecutor(1, "torch_paged") as thread:
            while self._open:
                self._wake.clear()
                self._settle()
                if self._engine.busy:
                    await self._step(thread)
                else:
                    await self._wake.wait()
            for client in self._clients:
                self._cancel(client)
            while self._engine.busy:
                await self._step(thread)
            self._settle()

    async def _step(self, thread: ThreadPoolExecutor) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(thread, self._engine.step)
        except Exception as error:
            self._engine.fail(error)

    def _settle(self) -> None:
        """Between two steps: do what coroutines have asked for, and hand on what has come."""
        inbox, self._inbox = self._inbox, []
        for action in inbox:
            action()
        for client in self._clients:
            client.deliver()
        self._clients = [client for client in self._clients if not client.ended]


class _Client:
    """One request between the engine and the coroutine that awaits its pieces.

    Attributes:
        items: the pieces, then the error, if there is one, then None.
        generation: once submitted.
        gone: whether nobody waits any more.
        ended: whether all has been handed on.
    """

    def __init__(self) -> None:
        self.items: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()
        self.generation: Generation | None = None
        self.gone = False
        self.ended = False

    def begin(self, generation: Generation) -> None:
        self.generation = generation
        self._stream = Stream(generation)

    def deliver(self) -> None:
        """Hand on what has come since the last call."""
        assert self.generation is not None
        for piece in self._stream.new():
            self.items.put_nowait(piece)
        if self.generation.finished:
            self.items.put_nowait(self.generation.error)  # or None
            self.ended = True
