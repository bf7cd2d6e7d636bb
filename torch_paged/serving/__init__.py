"""Serving: many requests through one model over one PagedKVCache.

random_numbers.py  SplitMix64: which numbers a seed leads to
requests.py        Request and Sampling, what a caller asks for; Generation and Sample, what comes of it
text.py            text from tokens as they come, stop strings
waiting.py         the queue: priority, first come first served, by default nobody waits for ever
residents.py       who has a place in the cache: letting in, parting forks, giving way
writers.py         Writers: samples that decode together
plan.py            Plan: one step
scheduler.py       Scheduler: plans within a budget of tokens, and what comes of them
stream.py          what is new of a generation
sampling.py        from logits to tokens on the device
engine.py          Engine: the loop that runs plans through the model
asynchronous.py    AsyncEngine: the same for coroutines
beams.py           beam_search over forks

The first nine know no torch.
"""

from torch_paged.serving.asynchronous import AsyncEngine
from torch_paged.serving.beams import Beam, beam_search
from torch_paged.serving.engine import Engine
from torch_paged.serving.requests import Generation, Request, Sample, Sampling, TokenLogprobs
from torch_paged.serving.scheduler import Load, Scheduler
from torch_paged.serving.stream import Piece

__all__ = [
    "AsyncEngine",
    "Beam",
    "Engine",
    "Generation",
    "Load",
    "Piece",
    "Request",
    "Sample",
    "Sampling",
    "Scheduler",
    "TokenLogprobs",
    "beam_search",
]
