"""AsyncEngine: many coroutines, cancelled tasks, errors, and the end."""

import asyncio
import threading

import pytest
from serving_fakes import FakeModel, expected, make_cache

from torch_paged.serving import AsyncEngine, Engine, Request

PROMPTS = [[5, 17, 3], [11] * 9, list(range(1, 31)), [8]]


def make_engine(model=None, **options):
    cache = make_cache(**options)
    return Engine(cache, model or FakeModel(cache), token_budget=16), cache


async def collect(serving, prompt, count=12):
    return [piece.token async for piece in serving.stream(Request(prompt=prompt, max_new_tokens=count))]


def test_many_coroutines(place):
    engine, cache = make_engine(num_blocks=14, device=place)

    async def main():
        async with AsyncEngine(engine) as serving:
            first = await asyncio.gather(*(collect(serving, prompt) for prompt in PROMPTS))
            await asyncio.sleep(0.01)  # idle: the next request wakes it
            return first, await collect(serving, [9])

    first, last = asyncio.run(main())
    assert first == [expected(prompt, 12) for prompt in PROMPTS]
    assert last == expected([9], 12)
    assert cache.num_free_blocks == cache.num_blocks


@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_a_cancelled_task_frees_its_blocks(pieces):
    """Before the request is submitted, and after some pieces; the others go on, and the engine is idle in the end."""
    engine, cache = make_engine()
    seen = []

    async def watch(serving):
        async for piece in serving.stream(Request(prompt=[1, 2, 3], max_new_tokens=50)):
            seen.append(piece.token)

    async def main():
        async with AsyncEngine(engine) as serving:
            task = asyncio.create_task(watch(serving))
            other = asyncio.create_task(collect(serving, [8]))
            await asyncio.sleep(0)
            while len(seen) < pieces:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            result = await other
            while engine.busy:
                await asyncio.sleep(0.001)
            assert cache.num_free_blocks == cache.num_blocks
            return result

    assert asyncio.run(main()) == expected([8], 12)
    assert pieces <= len(seen) < 50
    cache.check_integrity()


def test_a_request_that_cannot_be_served_raises_where_it_is_awaited():
    engine, _ = make_engine()

    async def main():
        async with AsyncEngine(engine) as serving:
            with pytest.raises(ValueError, match="take 98 places, max_seq_len is 64"):
                await collect(serving, [1] * 49, 50)
            with pytest.raises(ValueError, match="stop_strings need an Engine with decode="):
                async for _ in serving.stream(Request(prompt=[1], stop_strings=["x"])):
                    pass
            return await collect(serving, [8])

    assert asyncio.run(main()) == expected([8], 12)


def test_a_step_that_raises_ends_its_requests_and_no_others():
    engine, cache = make_engine()
    model, calls = engine._model, iter(range(1000))

    def failing(tokens, batch):
        if next(calls) == 5:
            raise ArithmeticError("a fault")
        return model(tokens, batch)

    engine._model = failing

    async def main():
        async with AsyncEngine(engine) as serving:
            results = await asyncio.gather(*(collect(serving, p) for p in PROMPTS), return_exceptions=True)
            return results, await collect(serving, [8])

    results, last = asyncio.run(main())
    assert [type(result) for result in results] == [ArithmeticError] * len(PROMPTS)
    assert last == expected([8], 12)
    assert cache.num_free_blocks == cache.num_blocks
    cache.check_integrity()


def test_leaving_cancels_what_is_under_way():
    engine, cache = make_engine()

    async def main():
        async with AsyncEngine(engine) as serving:
            stream = serving.stream(Request(prompt=[1, 2, 3], max_new_tokens=50))
            assert (await anext(stream)).token == expected([1, 2, 3], 1)[0]
        rest = [piece async for piece in stream]
        assert rest[-1].finish_reason == "cancelled"
        with pytest.raises(RuntimeError, match="serves within `async with` alone"):
            await collect(serving, [1])

    asyncio.run(main())
    assert cache.num_free_blocks == cache.num_blocks


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_what_was_asked_for_just_before_the_end_is_cancelled_too(busy):
    """Its task has run as far as it could, and the next step was not yet to come."""
    engine, cache = make_engine()

    async def main():
        async with AsyncEngine(engine) as serving:
            if busy:
                early = serving.stream(Request(prompt=[1, 2, 3], max_new_tokens=50))
                await anext(early)
            late = serving.stream(Request(prompt=[4], max_new_tokens=50, samples=2))
            first = asyncio.create_task(anext(late))
            await asyncio.sleep(0)
        return [await asyncio.wait_for(first, 10), *[piece async for piece in late]]

    pieces = asyncio.run(main())
    assert {piece.sample for piece in pieces if piece.finish_reason == "cancelled"} == {0, 1}
    assert not engine.busy
    assert cache.num_free_blocks == cache.num_blocks


def test_a_cancelled_end_leaves_nobody_waiting():
    """The task that leaves is cancelled while it waits for the last step."""
    engine, cache = make_engine()
    model, entered, left = engine._model, threading.Event(), threading.Event()

    def slow(tokens, batch):
        entered.set()
        left.wait(10)
        return model(tokens, batch)

    engine._model = slow

    async def main():
        serving = await AsyncEngine(engine).__aenter__()
        waiting = asyncio.create_task(collect(serving, [8]))
        await asyncio.to_thread(entered.wait, 10)
        leaving = asyncio.create_task(serving.__aexit__(None, None, None))
        await asyncio.sleep(0)
        leaving.cancel()
        left.set()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        return await asyncio.wait_for(waiting, 10)

    written = [token for token in asyncio.run(main()) if token is not None]
    assert written == expected([8], 12)[: len(written)]
    assert len(written) < 12
    while engine.step():
        pass
    assert cache.num_free_blocks == cache.num_blocks
    cache.check_integrity()


class Lost(BaseException):
    """What no caller of a step should catch."""


@pytest.mark.parametrize(("method", "error"), [("step", Lost("a fault")), ("fail", ArithmeticError("a fault"))])
def test_an_engine_that_breaks_down_leaves_nobody_waiting(monkeypatch, method, error):
    """A step raises what is no Exception; or the engine cannot end its requests after one, as when a GPU is lost."""
    engine, _ = make_engine()

    def fault(*_):
        raise error

    monkeypatch.setattr(engine, "_model", None)  # every step raises
    monkeypatch.setattr(engine, method, fault)

    async def main():
        serving = await AsyncEngine(engine).__aenter__()
        waiting = (asyncio.wait_for(collect(serving, prompt), 10) for prompt in PROMPTS)
        results = await asyncio.gather(*waiting, return_exceptions=True)
        with pytest.raises(RuntimeError, match="the engine has broken down") as late:
            await asyncio.wait_for(collect(serving, [8]), 10)
        with pytest.raises(type(error)):
            await serving.__aexit__(None, None, None)
        assert not engine.busy, "nobody's requests are left in it"
        return results, late.value.__cause__

    assert asyncio.run(main()) == ([error] * len(PROMPTS), error)


def test_it_serves_within_one_async_with():
    engine, cache = make_engine()

    async def main():
        async with AsyncEngine(engine) as serving:
            with pytest.raises(RuntimeError, match="cannot be entered twice at once"):
                async with serving:
                    pass
            first = await collect(serving, [9])
        with pytest.raises(RuntimeError, match="serves within `async with` alone"):
            await collect(serving, [9])
        await serving.__aenter__()
        leaving = asyncio.create_task(serving.__aexit__(None, None, None))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="cannot be entered twice at once"):
            await serving.__aenter__()  # the step under way is not over
        await leaving
        async with serving:
            return first, await collect(serving, [9])

    assert asyncio.run(main()) == (expected([9], 12), expected([9], 12))
    assert cache.num_free_blocks == cache.num_blocks
