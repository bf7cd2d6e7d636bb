"""The engine under random requests, cancellations and faults: nothing is lost, nothing leaks."""

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from serving_fakes import FakeModel, Faulty, expected, make_cache

from torch_paged import OutOfBlocks
from torch_paged.serving import Engine, Request

STOP = [0, 1]


class Fault(RuntimeError):
    """One that was planted."""


class Machine(RuleBasedStateMachine):
    """Every request must write what FakeModel writes for it alone, or the beginning of it if it was cancelled.

    Prompts come from few tokens, so that they share prefixes; a foreign sequence takes blocks now and then, so that
    steps run out of them at any point.
    """

    @initialize(
        num_blocks=st.integers(9, 24),
        max_seqs=st.integers(4, 8),
        policy=st.sampled_from(["swap", "swap", "recompute", "wait"]),
        token_budget=st.integers(3, 40),
        ahead=st.booleans(),
        patience=st.sampled_from([0, 3, 100, math.inf]),
        watermark=st.sampled_from([0.0, 0.1]),
        buckets=st.sampled_from([None, [4, 8]]),
    )
    def begin(self, num_blocks, max_seqs, buckets, **options):
        self.cache = make_cache(num_blocks=num_blocks, max_seqs=max_seqs, max_seq_len=48, buckets=buckets)
        self.faulty = Faulty(self.cache)
        self.model = FakeModel(self.cache)
        self.model_fault = None
        self.engine = Engine(self.faulty, self.run_model, **options)
        self.generations, self.cancelled = [], []
        self.excused = False  # whether a sample that runs alone may find too few blocks
        self.foreign = None
        for number in range(4):
            self.submit(
                prompt=[2, 3] * (number + 2), max_new_tokens=20, samples=1 + number % 2, priority=0, namespace="a"
            )

    def run_model(self, tokens, batch):
        when, self.model_fault = self.model_fault, None
        if when == "before":
            raise Fault
        logits = self.model(tokens, batch)
        if when == "after":
            raise Fault
        return logits

    @rule(
        prompt=st.lists(st.integers(2, 3), min_size=1, max_size=4).map(lambda tokens: tokens * 4),
        max_new_tokens=st.integers(1, 24),
        samples=st.sampled_from([1, 1, 2, 3]),
        priority=st.integers(0, 2),
        namespace=st.sampled_from(["a", "b"]),
    )
    def submit(self, **request):
        self.generations.append(self.engine.submit(Request(**request, stop_tokens=STOP)))

    @rule(index=st.integers(0, 30))
    def cancel(self, index):
        if self.generations:
            self.cancelled.append(self.generations[index % len(self.generations)])
            self.engine.cancel(self.cancelled[-1])

    @rule(steps=st.integers(1, 20))
    def step(self, steps):
        for _ in range(steps):
            self.one_step()
            self.cache.check_integrity()

    def one_step(self):
        try:
            return self.engine.step()
        except Fault:
            return True
        except ValueError as error:
            assert self.foreign is not None
            assert "more sequences do not fit" in str(error)
            return True

    @rule(when=st.sampled_from(["before", "after"]))
    def model_will_raise(self, when):
        self.model_fault = when

    @rule()
    def prepare_will_find_no_blocks(self):
        """Whoever runs alone then cannot be helped."""
        self.faulty.faults["prepare"] = OutOfBlocks(3, 1, 0)
        self.excused = True

    @rule(
        name_and_fault=st.sampled_from(
            [
                ("swap_out", Fault()),
                ("swap_in", Fault()),
                ("swap_in", OutOfBlocks(3, 1, 0)),
                ("fork", ValueError("rows")),
            ]
        )
    )
    def will_fail(self, name_and_fault):
        name, fault = name_and_fault
        self.faulty.faults[name] = fault

    @rule(tokens=st.integers(1, 48))
    def somebody_else_takes_blocks(self, tokens):
        if self.foreign is None and self.cache.num_free_blocks * 4 >= tokens:
            try:
                self.foreign = self.cache.add()
            except ValueError:  # no row is left
                return
            self.cache.commit(self.cache.prepare([self.foreign], tokens))
            self.excused = True

    @rule()
    def somebody_else_gives_blocks_back(self):
        if self.foreign is not None:
            self.cache.free(self.foreign)
            self.foreign = None

    @invariant()
    def nothing_contradicts_itself(self):
        if hasattr(self, "cache"):
            self.cache.check_integrity()

    def teardown(self):
        if not hasattr(self, "cache"):
            return
        self.somebody_else_gives_blocks_back()
        for _ in range(5000):
            if not self.one_step():
                break
        assert self.engine.load[:3] == (0, 0, 0)
        assert not self.engine.busy
        self.cache.check_integrity()
        assert self.cache.num_free_blocks == self.cache.num_blocks
        for generation in self.generations:
            for sample in generation.samples:
                self.check(generation, sample)

    def check(self, generation, sample):
        request = generation.request
        whole = expected(request.prompt, request.max_new_tokens, stop=STOP)
        assert sample.written == whole[: len(sample.written)]
        if sample.finish_reason in ("stop", "length"):
            assert sample.written == whole
            assert sample.finish_reason == ("stop" if whole[-1] in STOP else "length")
        elif sample.finish_reason == "error":
            never_fits = isinstance(sample.error, ValueError) and not sample.written
            assert never_fits or (self.excused and "does not fit into the cache alone" in str(sample.error))
        else:
            assert sample.finish_reason == "cancelled"
            assert generation in self.cancelled


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_serving_machine = pytest.mark.filterwarnings("ignore")(Machine.TestCase)
