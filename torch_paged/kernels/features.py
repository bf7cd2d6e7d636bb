"""Which options of attention a kernel is compiled for; their values are arguments of the launch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stored:
    """How a cache holds its numbers: true value = stored * scale."""

    dtype: str = ""  # "": query's; "e4m3", "e5m2", "int8"; "e4m3 bits": bytes that the kernel itself must decode
    scale: str = ""  # "": 1; "scalar" for all, one a "head", or one a "token" and head
    packed: bool = False  # several are widened by one instruction, which not all devices have

    @property
    def largest(self) -> float:
        """The largest finite number that can be stored."""
        return {"e4m3": 448.0, "e5m2": 57344.0, "int8": 127.0}[self.dtype]

    @property
    def smallest_normal(self) -> float:
        """The smallest float8 above which steps grow."""
        return 2.0**-6 if self.dtype == "e4m3" else 2.0**-14

    @property
    def mantissa(self) -> int:
        """Bits of a float8 behind its leading one."""
        return 3 if self.dtype == "e4m3" else 2

    @property
    def bytes(self) -> bool:
        """Whether the kernel takes the cache as bytes."""
        return self.dtype == "e4m3 bits"


@dataclass(frozen=True)
class Features:
    """Options that are present."""

    window: bool = False
    softcap: bool = False
    alibi: bool = False
    sinks: bool = False
    key: Stored = Stored()
    value: Stored = Stored()
    normalised: bool = False  # query rows are brought into float16's range

    @property
    def logits(self) -> bool:
        """Whether a logit is more than a positive multiple of a product, so that it must stand before its maximum."""
        return self.softcap or self.alibi or self.normalised or self.key.scale != ""


PLAIN_FEATURES = Features()
