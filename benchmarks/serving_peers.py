"""The demo model in Hugging Face Transformers, on the same trace: padded `generate`, and its continuous batching.

Nothing of it is imported where Transformers is not installed: `available()` says why.
"""

import inspect
import time
from typing import Any

import torch
from serving_trace import WEIGHTS, Memory, load
from transformers_llama import as_llama

from torch_paged.serving import Request


def available() -> str | None:
    """None, or why Transformers cannot be had."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


def version() -> str:
    import transformers

    return f"Transformers {transformers.__version__}"


def llama(memory: Memory) -> Any:
    model = as_llama(*load(WEIGHTS), most_tokens=memory.most_tokens)
    return model.to(memory.device, memory.dtype)


@torch.inference_mode()
def generate(model: Any, memory: Memory, requests: list[Request], seconds: float) -> list[list[int]]:
    """Padded batches, each as many requests as there are places, until the longest output of the batch is written."""
    outputs, end = [], memory.clock() + seconds
    for first in range(0, len(requests), memory.places):
        left = end - memory.clock()
        if left <= 0:
            break
        batch = requests[first : first + memory.places]
        longest = max(len(request.prompt) for request in batch)
        tokens = torch.tensor([[0] * (longest - len(request.prompt)) + request.prompt for request in batch])
        mask = torch.tensor([[0] * (longest - len(request.prompt)) + [1] * len(request.prompt) for request in batch])
        most = max(request.max_new_tokens for request in batch)
        written = model.generate(
            tokens.to(memory.device),
            attention_mask=mask.to(memory.device),
            max_new_tokens=most,
            max_time=left,
            do_sample=False,
            pad_token_id=0,
        )
        outputs += [
            row[longest : longest + request.max_new_tokens].tolist()
            for row, request in zip(written, batch, strict=True)
        ]
    return outputs


def continuous(model: Any, memory: Memory, requests: list[Request], seconds: float, page_size: int) -> list[list[int]]:
    """Transformers' own continuous batching, with as many slots in its paged cache as we have.

    What has not come to its end in time does not count.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    end = memory.clock() + seconds
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    names = inspect.signature(ContinuousBatchingConfig).parameters
    paged_by = "page_size" if "page_size" in names else "block_size"  # before Transformers 5.18 or so
    batching = ContinuousBatchingConfig(
        **{paged_by: page_size},
        num_blocks=memory.places * memory.most_tokens // page_size,
        max_batch_tokens=512,
        allow_block_sharing=False,
    )
    outputs: list[list[int]] = [[] for _ in requests]
    with (
        torch.no_grad(),  # not inference mode: older versions fill tensors in a thread that is not in it
        model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=batching
        ) as manager,
    ):
        numbers = {
            manager.add_request(request.prompt, max_new_tokens=request.max_new_tokens): number
            for number, request in enumerate(requests)
        }
        left = len(requests)
        while left and memory.clock() < end:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                outputs[numbers[result.request_id]] = result.generated_tokens
                left -= 1
            elif result is None and not manager.is_running():
                raise RuntimeError("Transformers' continuous batching has ended before its requests")
        for request in numbers:
            manager.cancel_request(request)  # or leaving would wait for the rest
    return outputs


def timed(serve: Any, memory: Memory, requests: list[Request], seconds: float, **options: Any) -> dict[str, Any]:
    """Figures of one way: no request got more than it had asked for, and all what they had, if time allowed."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # with it every step of `generate` took 51 ms on an H100
    model = llama(memory)
    serve(model, memory, requests[:2], seconds, **options)  # what is imported and set up once
    start, cpu_start = time.perf_counter(), time.process_time()
    outputs = serve(model, memory, requests, seconds, **options)
    taken, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    asked = [request.max_new_tokens for request in requests]
    assert all(len(output) <= most for output, most in zip(outputs, asked, strict=False))
    written = sum(map(len, outputs))
    assert written > 0
    return dict(
        seconds=taken,
        tokens=written,
        whole=written == sum(asked),
        tokens_per_second=written / taken,
        tokens_per_cpu_second=written / cpu_seconds,
    )
