"""SplitMix64 (Steele, Lea, Flood, 2014): its constants, and its finaliser on the host. No torch in here."""

from __future__ import annotations

GAMMA = 0x9E3779B97F4A7C15  # from one number of the stream's counter to the next
FACTORS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of the finaliser

_MASK = (1 << 64) - 1


def mix(value: int) -> int:
    """A 64-bit number in which every bit depends on all of `value`'s: the finaliser."""
    value &= _MASK
    value = (value ^ (value >> 30)) * FACTORS[0] & _MASK
    value = (value ^ (value >> 27)) * FACTORS[1] & _MASK
    return value ^ (value >> 31)


def signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    return value - (1 << 64) if value >> 63 else value
