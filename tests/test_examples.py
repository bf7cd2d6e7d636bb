"""The demo: its model over pages and over contiguous memory, its training and its command line."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torch_paged import PagedKVCache

pytest.importorskip("safetensors")
EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
modules = map(importlib.import_module, ("batching", "contiguous", "corpus", "generate", "model"))
batching, contiguous, corpus, generate, llama = modules

TINY = llama.Config(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=48, context=64)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = llama.Decoder(TINY, [torch.nn.Module() for _ in range(TINY.num_layers)])
    return model.state_dict()


def decoder(weights: dict[str, torch.Tensor], kv_layers: list[torch.nn.Module]):
    model = llama.Decoder(TINY, kv_layers)
    model.load_state_dict(weights)
    return model


def paged(weights: dict[str, torch.Tensor]) -> tuple[PagedKVCache, torch.nn.Module]:
    cache = PagedKVCache(
        TINY.num_layers,
        TINY.num_kv_heads,
        TINY.head_dim,
        block_size=4,
        num_blocks=64,
        max_seqs=8,
        max_seq_len=TINY.context,
        dtype=torch.float32,
        device="cpu",
    )
    return cache, decoder(weights, list(cache.layers))


def contiguous_logits(weights: dict[str, torch.Tensor], text: bytes) -> torch.Tensor:
    """Of every position, `[len(text), vocab_size]`."""
    kv_layers = [contiguous.ContiguousKV(TINY, torch.device("cpu")) for _ in range(TINY.num_layers)]
    batch = contiguous.ContiguousBatch(torch.arange(len(text)))
    return decoder(weights, kv_layers)(torch.tensor(list(text)), batch)


@torch.no_grad()
def test_a_ragged_batch_of_chunks_and_decodes_equals_contiguous_attention(weights):
    texts = [b"def first():\n    return 1", b"x = 2\ny = 3\n", b"import os\nprint(os.getcwd())\n"]
    cache, model = paged(weights)
    seqs = [cache.add() for _ in texts]
    read = [0] * len(texts)
    for counts in ([5, 3, 11], [1, 6, 2], [7, 1, 1], [1, 1, 1]):
        batch = cache.prepare(seqs, counts)
        chunks = [text[start : start + count] for text, start, count in zip(texts, read, counts, strict=True)]
        tokens = torch.tensor(list(b"".join(chunks).ljust(len(batch.positions), b"\0")))
        logits = model(tokens, batch)[: len(texts)]
        cache.commit(batch)
        read = [start + count for start, count in zip(read, counts, strict=True)]
        expected = [contiguous_logits(weights, text[:end])[-1] for text, end in zip(texts, read, strict=True)]
        torch.testing.assert_close(logits, torch.stack(expected))


@torch.no_grad()
def test_training_attention_equals_the_contiguous_cache(weights):
    texts = [b"def first():", b"import stat\n"]
    length = len(texts[0])
    model = decoder(weights, [contiguous.CausalAttention(length) for _ in range(TINY.num_layers)])
    logits = model(
        torch.tensor(list(b"".join(texts))),
        contiguous.ContiguousBatch(torch.arange(length).repeat(len(texts))),
    )
    torch.testing.assert_close(logits, torch.cat([contiguous_logits(weights, text) for text in texts]))


def test_every_request_writes_and_leaves_the_cache_empty(weights, monkeypatch):
    monkeypatch.setattr(batching, "TOKEN_BUDGET", 7)  # chunks that end within blocks and prompts
    cache, model = paged(weights)
    prompts = [b"class Stack:\n", b"def f(x):\n    return", b"#"]
    requests = [batching.Request(str(prompt), prompt, cache.add()) for prompt in prompts]
    forked = batching.Request("forked", b"for i in range(", cache.add(), samples=3, temperature=0.8)
    generation = batching.Generation(cache, model, seed=0, compiled=False)
    seen = {request for _, active in generation.run([*requests, forked], limit=6) for request in active}
    assert sum(request.name == "forked" for request in seen) == 3
    assert all(request.done(6) for request in seen)
    assert generation.fullest.blocks_shared >= 3
    assert cache.stats().blocks_used == 0
    cache.check_integrity()
    for request in requests:
        expected = contiguous.greedy(TINY, weights, request.prompt, 6, torch.device("cpu"))
        assert request.written == expected


def test_the_check_names_the_first_differing_token(weights):
    request = batching.Request("file.py", b"import ", seq=0)
    request.written = contiguous.greedy(TINY, weights, request.prompt, 5, torch.device("cpu"))
    args = generate.parse_args(["--new-tokens", "5"])
    generate.check([request], TINY, weights, args)
    wrong = bytes([request.written[3] ^ 1])
    request.written = request.written[:3] + wrong + request.written[4:]
    with pytest.raises(SystemExit, match=r"file\.py, token 3"):
        generate.check([request], TINY, weights, args)


def test_held_out_files_are_not_trained_on(tmp_path):
    for name in ("abc.py", "heapq.py", "test/test_abc.py", "site-packages/other.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# {name}\n")
    text = corpus.training_text(tmp_path)
    assert text == b"\0# abc.py\n\0# abc.py\n\0# test/test_abc.py\n\0"
    assert corpus.validation_text(tmp_path) == b"\0# heapq.py\n\0"


def run(script: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_training_writes_a_file_that_loads(tmp_path):
    for name in ("abc.py", "heapq.py"):
        (tmp_path / name).write_bytes((corpus.STDLIB / name).read_bytes())
    out = tmp_path / "weights.safetensors"
    sizes = "--dim 32 --num-layers 2 --ffn-dim 48 --context 32 --num-heads 4 --num-kv-heads 2 --head-dim 16"
    options = f"--steps 2 --batch-size 2 --no-compile --device cpu --out {out} --stdlib {tmp_path}"
    assert "bits a byte on the held-out files" in run("train.py", *sizes.split(), *options.split())
    config, weights = llama.load(out)
    llama.Decoder(config, [torch.nn.Module() for _ in range(config.num_layers)]).load_state_dict(weights)
    assert config.dim == 32


def test_demo_eager():
    output = run("generate.py", "--check", "--no-compile", "--new-tokens", "12")
    assert "check passed" in output
    assert "blocks shared" in output


def test_parallel_sampling():
    output = run("parallel_sampling.py", "--samples", "3")
    assert output.count("--- sample") == 3
    tokens, slots = re.search(r"(\d+) tokens of 3 samples in (\d+) slots", output).groups()
    assert int(tokens) > 1.5 * int(slots)
    assert run("parallel_sampling.py", "--samples", "3") == output  # the same seed


def test_beam_search():
    output = run("beam_search.py", "--beams", "3", "--new-tokens", "12")
    scores = [float(line.split()[0]) for line in output.splitlines() if re.match(r"\s*-\d", line)]
    assert len(scores) == 1 + 3
    assert scores[1] >= scores[0]
    assert scores[1:] == sorted(scores[1:], reverse=True)


@pytest.mark.parametrize("policy", ["wait", "recompute", "swap"])
def test_serve_under_pressure(policy):
    output = run("serve_under_pressure.py", "--policy", policy, "--requests", "12", "--blocks", "24")
    last = output.splitlines()[-2].split()
    assert last[1:4] == ["0", "0", "0"]
    assert (int(last[4]) > 0) == (policy != "wait")
    assert last[5] == "12"


def test_the_table_is_live_in_a_terminal(monkeypatch, capsys):
    under_pressure = importlib.import_module("serve_under_pressure")
    monkeypatch.setattr(
        sys, "argv", ["serve_under_pressure.py", "--requests", "6", "--blocks", "12", "--policy", "swap"]
    )
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    under_pressure.main()
    rows = [line.split() for line in capsys.readouterr().out.split("\n")[1].split("\r")]
    assert len(rows) > 30
    assert [int(row[0]) for row in rows[:-1]] == [*range(1, len(rows))]
    running, waiting, swapped = (max(int(row[column]) for row in rows) for column in (1, 2, 3))
    assert running >= 2
    assert waiting >= 1
    assert swapped >= 1


def test_shared_prefix():
    output = run("shared_prefix.py")
    assert "check passed" in output
    found, looked_up = map(int, re.search(r"found +(\d+) of (\d+)", output).groups())
    assert found / looked_up > 0.7


@pytest.mark.slow
def test_demo_compiled():
    output = run("generate.py", "--check", "--new-tokens", "16")
    assert "check passed" in output
    assert "decode, compiled" in output
