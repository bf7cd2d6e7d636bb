r"""A small OpenAI-compatible server of the demo model: `python examples/server.py`, then for instance

    curl localhost:8000/v1/completions -H "Content-Type: application/json" \
        -d '{"prompt": "def main(", "max_tokens": 40, "temperature": 0.5, "stream": true}'

Needs `pip install -e ".[server]"`. A client that disconnects ends its request, and its blocks are free at once.
"""

import argparse
import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from demo import build, decode
from model import END_OF_TEXT
from terminal import positive
from torch_paged.serving import AsyncEngine, Engine, Piece, Request, Sampling

MODEL = "torch-paged-demo"
CLIENT_CLOSED_REQUEST = 499
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed", "logprobs")
MOST_SAMPLES = 16
KNOWN = {*SAMPLING, "model", "prompt", "max_tokens", "n", "stop", "stream", "priority", "user"}


def parse(body: Any) -> Request:
    """The request of a JSON body. Raises ValueError, TypeError."""
    if not isinstance(body, dict) or not isinstance(body.get("prompt"), str):
        raise ValueError("the body must be a JSON object with a string as its prompt")
    if unknown := body.keys() - KNOWN:
        raise ValueError(f"not supported: {', '.join(sorted(unknown))}")
    given = {name: value for name, value in body.items() if value is not None}
    if not isinstance(given.get("stream", False), bool):
        raise ValueError(f"stream must be true or false, got {given['stream']!r}")
    stop = given.get("stop", [])
    asked = Request(
        prompt=list(given["prompt"].encode()),
        max_new_tokens=given.get("max_tokens", 16),
        samples=given.get("n", 1),
        stop_tokens=[END_OF_TEXT],
        stop_strings=[stop] if isinstance(stop, str) else stop,
        priority=given.get("priority", 0),
        namespace=given.get("user"),  # users do not find each other's prompts
        sampling=Sampling(**{"temperature": 1.0} | {name: given[name] for name in SAMPLING if name in given}),
    )
    if asked.samples > MOST_SAMPLES:
        raise ValueError(f"n must be at most {MOST_SAMPLES}, got {asked.samples}")
    return asked


def chunk(ident: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    head = {"id": ident, "object": "text_completion", "created": int(time.time()), "model": MODEL}
    return {**head, "choices": choices, **more}


def choice(index: int, pieces: list[Piece]) -> dict[str, Any]:
    """What some pieces of one sample say, as an element of `choices`."""
    logprobs = [(piece.token, piece.logprobs) for piece in pieces if piece.logprobs]
    return {
        "index": index,
        "text": "".join(piece.text for piece in pieces),
        "finish_reason": pieces[-1].finish_reason,
        "logprobs": {
            "tokens": [decode([token]) for token, _ in logprobs],
            "token_logprobs": [entry.logprob for _, entry in logprobs],
            "top_logprobs": [{decode([token]): value for token, value in entry.top} for _, entry in logprobs],
        }
        if logprobs
        else None,
    }


async def unless_gone(request: HttpRequest, awaitable: Awaitable[Any]) -> Any:
    """What is awaited; None if the client disconnects first."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, gone = asyncio.ensure_future(awaitable), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def events(stream: AsyncIterator[Piece], first: Piece) -> AsyncIterator[str]:
    """Server-sent events. When Starlette cancels this, the stream is closed, and so the request cancelled."""
    ident = f"cmpl-{uuid.uuid4().hex}"
    async with aclosing(stream):
        yield f"data: {json.dumps(chunk(ident, [choice(first.sample, [first])]))}\n\n"
        async for piece in stream:
            yield f"data: {json.dumps(chunk(ident, [choice(piece.sample, [piece])]))}\n\n"
    yield "data: [DONE]\n\n"


async def collect(stream: AsyncIterator[Piece], asked: Request) -> dict[str, Any]:
    pieces: list[list[Piece]] = [[] for _ in range(asked.samples)]
    async with aclosing(stream):
        async for piece in stream:
            pieces[piece.sample].append(piece)
    written = sum(piece.token is not None for sample in pieces for piece in sample)
    usage = {"prompt_tokens": len(asked.prompt), "completion_tokens": written}
    usage["total_tokens"] = sum(usage.values())
    return chunk(f"cmpl-{uuid.uuid4().hex}", [choice(i, sample) for i, sample in enumerate(pieces)], usage=usage)


async def completions(request: HttpRequest) -> Response:
    try:
        body = await request.json()
        asked = parse(body)
        stream = request.app.state.serving.stream(asked)
        if not body.get("stream"):
            result = await unless_gone(request, collect(stream, asked))
            return Response(status_code=CLIENT_CLOSED_REQUEST) if result is None else JSONResponse(result)
        first = await unless_gone(request, anext(stream))  # what cannot be served fails here, before the head is sent
    except (ValueError, TypeError, RecursionError) as error:
        return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)
    if first is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return StreamingResponse(events(stream, first), media_type="text/event-stream")


async def models(_: HttpRequest) -> Response:
    return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "torch_paged"}]})


async def load(request: HttpRequest) -> Response:
    """Not OpenAI's: how many samples run, wait and are swapped out."""
    return JSONResponse(request.app.state.engine.load._asdict())


def make_app(engine: Engine) -> Starlette:
    @contextlib.asynccontextmanager
    async def serve(app: Starlette) -> AsyncIterator[None]:
        async with AsyncEngine(engine) as app.state.serving:
            yield

    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", models),
        Route("/load", load),
    ]
    app = Starlette(routes=routes, lifespan=serve)
    app.state.engine = engine
    return app


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", default=8000, type=int)
    parser.add_argument("--blocks", default=512, type=positive, help="of 16 tokens")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    cache, model = build(args.blocks, max_seqs=64, device=args.device)
    uvicorn.run(make_app(Engine(cache, model, decode=decode)), host=args.host, port=args.port)


if __name__ == "__main__":
    main()
