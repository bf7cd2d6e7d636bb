"""AsyncEngine: requests of many coroutines through one Engine, whose steps run in a thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
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
    ones are served again. Leaving the `async with` cancels what is under way or was asked for. If the engine breaks
    down, by an error that is no Exception or that keeps it from ending its requests, all of them raise that error, as
    the `async with` does in the end, and no more are served.

    Args:
        engine: to be driven.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._clients: list[_Client] = []
        self._wake = asyncio.Event()
        self._driver: asyncio.Task[None] | None = None
        self._open = False  # whether the driver goes on and takes requests
        self._breakdown: BaseException | None = None  # what has ended the driver

    async def __aenter__(self) -> AsyncEngine:
        if self._driver is not None:
            raise RuntimeError("an AsyncEngine cannot be entered twice at once")
        self._open, self._breakdown = True, None
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
            RuntimeError: outside of `async with`, or after the engine broke down.
            Exception: what went wrong with the request, after the tokens that came before.
        """
        if not self._open:
            if self._breakdown is not None:
                raise RuntimeError("the engine has broken down, and serves nobody any more") from self._breakdown
            raise RuntimeError("an AsyncEngine serves within `async with` alone")
        client = _Client(request)
        self._clients.append(client)
        self._wake.set()
        try:
            while (item := await client.items.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            client.cancelled = True
            self._wake.set()

    async def _drive(self) -> None:
        """Serves until `__aexit__`. However that ends, nobody is left waiting."""
        try:
            await self._serve()
        except BaseException as error:
            self._open, self._breakdown = False, error
            for client in self._clients:
                client.abandon(self._engine, error)
            self._clients = []
            raise

    async def _serve(self) -> None:
        """Steps as long as there is something to do, until `__aexit__`."""
        try:
            with ThreadPoolExecutor(1, "torch_paged") as thread:
                while self._open:
                    self._wake.clear()
                    self._settle()
                    if self._engine.busy:
                        await self._step(thread)
                    else:
                        await self._wake.wait()
                self._cancel_all()
                while self._engine.busy:
                    await self._step(thread)
        except asyncio.CancelledError:  # the task that leaves is, or the loop ends; so has the thread's last step
            self._cancel_all()
            raise

    async def _step(self, thread: ThreadPoolExecutor) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(thread, self._engine.step)
        except Exception as error:
            self._engine.fail(error)

    def _settle(self) -> None:
        """Between two steps: do what coroutines have asked for, and hand on what has come."""
        for client in self._clients:
            client.settle(self._engine)
        self._clients = [client for client in self._clients if not client.ended]

    def _cancel_all(self) -> None:
        for client in self._clients:
            client.cancelled = True
        self._settle()


class _Client:
    """One request between the engine and the coroutine that awaits its pieces.

    Attributes:
        items: the pieces, then the error, if there is one, then None.
        cancelled: whether it is to be, as nobody waits any more or no step will follow.
        ended: whether all has been handed on.
    """

    def __init__(self, request: Request) -> None:
        self.items: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()
        self.cancelled = False
        self.ended = False
        self._request = request
        self._generation: Generation | None = None  # once submitted

    def settle(self, engine: Engine) -> None:
        """Submit or cancel the request, if that is due, and hand on what has come since the last call."""
        if self._generation is None:
            try:
                self._generation = engine.submit(self._request)
            except Exception as error:
                self.end(error)
                return
            self._stream = Stream(self._generation)
        if self.cancelled:
            engine.cancel(self._generation)
        for piece in self._stream.new():
            self.items.put_nowait(piece)
        if self._generation.finished:
            self.end(self._generation.error)

    def abandon(self, engine: Engine, error: BaseException) -> None:
        """End with what the engine broke down of, and leave it no request, if it can still let go of one."""
        if self._generation is not None:
            with contextlib.suppress(Exception):
                engine.cancel(self._generation)
        self.end(error)

    def end(self, error: BaseException | None) -> None:
        """Nothing follows but the error, if there is one."""
        self.items.put_nowait(error)
        self.ended = True
