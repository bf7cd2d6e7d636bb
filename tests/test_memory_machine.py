"""The memory manager under random operations, in the order that Hypothesis makes up."""

from hypothesis import settings
from memory_machine import Machine

TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)
