"""The example server over real connections: completions, streams, errors, and clients that go away."""

import importlib
import json
import sys
import threading
import time
from pathlib import Path

import pytest
from serving_fakes import FakeModel, expected, make_cache

from torch_paged.serving import Engine

pytest.importorskip("safetensors")
pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
server = importlib.import_module("server")


class Slow(FakeModel):
    """So slow that a client can go away meanwhile."""

    delay = 0.0

    def __call__(self, tokens, batch):
        time.sleep(self.delay)
        return super().__call__(tokens, batch)


@pytest.fixture
def served():
    """A server in a thread, a client of it, its cache and its model."""
    cache = make_cache(num_blocks=64, max_seq_len=128)
    model = Slow(cache)
    engine = Engine(cache, model, decode=server.decode)
    config = uvicorn.Config(server.make_app(engine), port=0, log_level="warning")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
        yield client, cache, model
    running.should_exit = True
    thread.join()
    cache.check_integrity()
    assert cache.num_free_blocks == cache.num_blocks


def text(prompt, count):
    return server.decode(expected(list(prompt.encode()), count, stop=[0])).rstrip("\0")


def test_a_completion(served):
    client, _, _ = served
    body = dict(prompt="abc", max_tokens=12, temperature=0, n=2, logprobs=1)
    answer = client.post("/v1/completions", json=body).json()
    assert [entry["text"] for entry in answer["choices"]] == [text("abc", 12)] * 2
    assert [entry["index"] for entry in answer["choices"]] == [0, 1]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 24, "total_tokens": 27}
    logprobs = answer["choices"][1]["logprobs"]
    assert "".join(logprobs["tokens"]) == text("abc", 12)
    assert logprobs["top_logprobs"][0] == {logprobs["tokens"][0]: logprobs["token_logprobs"][0]}
    assert client.get("/v1/models").json()["data"][0]["id"] == answer["model"]
    assert client.get("/load").json()["running"] == 0


def test_a_stream(served):
    client, _, _ = served
    body = dict(prompt="abcd", max_tokens=20, temperature=0, stream=True, stop=text("abcd", 20)[8:10])
    with client.stream("POST", "/v1/completions", json=body) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert "".join(entry["text"] for entry in choices) == text("abcd", 8)
    assert [entry["finish_reason"] for entry in choices] == [None] * 9 + ["stop"]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"max_tokens": 3}, "a JSON object with a string as its prompt"),
        ({"prompt": "x", "best_of": 3}, "not supported: best_of"),
        ({"prompt": "x", "temperature": -1}, "temperature must be at least 0"),
        ({"prompt": "xy", "max_tokens": 128}, "take 129 places, max_seq_len is 128"),
        ({"prompt": "x", "max_tokens": 500}, "take 500 places, max_seq_len is 128"),
        ({"prompt": "x", "max_tokens": "many"}, "max_new_tokens must be an integer, got 'many'"),
        ({"prompt": "x", "max_tokens": 2.5}, "max_new_tokens must be an integer, got 2.5"),
        ({"prompt": "x", "user": {}}, "namespace must be hashable, got {}"),
        ({"prompt": "x", "logprobs": 1.5}, "logprobs must be an integer, got 1.5"),
        ({"prompt": "x", "n": 10**12}, "n must be at most 16, got 1000000000000"),
        ({"prompt": "x", "n": "2"}, "samples must be an integer, got '2'"),
        ({"prompt": "x", "stop": 5}, "stop_strings must be a list of strings, got 5"),
        ({"prompt": "x", "stop": [5]}, "stop_strings must be strings, got"),
        ({"prompt": "x", "stream": "false"}, "stream must be true or false, got 'false'"),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_is_refused(served, body, why, stream):
    client, _, _ = served
    answer = client.post("/v1/completions", json={"stream": stream} | body)
    assert answer.status_code == 400
    assert why in answer.json()["error"]["message"]


def test_what_is_nested_too_deep_is_refused(served):
    client, _, _ = served
    answer = client.post("/v1/completions", content=b"[" * 100_000)
    assert answer.status_code == 400


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_goes_away_frees_its_blocks(served, stream):
    client, cache, model = served
    model.delay = 0.05  # 100 tokens would take five seconds
    body = dict(prompt="abc", max_tokens=100, temperature=0, stream=stream)
    if stream:
        with client.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines())
            assert cache.num_free_blocks < cache.num_blocks
    else:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=body, timeout=0.5)
    begun = len(model.steps)
    wait_until(lambda: client.get("/load").json()["running"] == 0)
    wait_until(lambda: cache.num_free_blocks == cache.num_blocks)
    assert len(model.steps) - begun < 20
