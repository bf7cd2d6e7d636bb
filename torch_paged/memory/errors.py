"""The errors of the host side that are not a caller's bad argument."""


class OutOfBlocks(RuntimeError):
    """A step needs more blocks than are free. Nothing was changed.

    Free or truncate sequences, or wait for open steps, and prepare again.

    Attributes:
        needed: blocks that the step would have taken.
        free: blocks that could have been handed out.
        waiting: blocks without an owner that open steps may still read; they become free when those end.
        group: of layers, whose blocks they are: its number in `PagedKVCache.groups`.
    """

    def __init__(self, needed: int, free: int, waiting: int, group: int = 0) -> None:
        super().__init__(needed, free, waiting, group)
        self.needed = needed
        self.free = free
        self.waiting = waiting
        self.group = group

    def __str__(self) -> str:
        where = f" of groups[{self.group}]" if self.group else ""
        later = f"; {self.waiting} more become free as open steps end" if self.waiting else ""
        return f"the step needs {self.needed} blocks{where}, {self.free} are free{later}"


class OutOfSwapSpace(RuntimeError):
    """Sequences to be swapped out need more host memory than `swap_space` allows. Nothing was changed.

    Attributes:
        needed: bytes that they would have taken.
        free: bytes that are left.
    """

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(needed, free)
        self.needed = needed
        self.free = free

    def __str__(self) -> str:
        return f"the sequences need {self.needed} bytes of swap space, {self.free} are free"


class IntegrityError(RuntimeError):
    """`check_integrity()` found a broken invariant: a bug in this library, or memory written from outside."""
