"""Random numbers that are a pure function of a key and a counter.

A generator's state depends on earlier draws; these numbers do not. Sampled classes, sample order, augmentation and
initial centers are drawn from them, so that they are the same on every rank, at any world size, on any device and
after a resume. The mixer is the finaliser of SplitMix64 (Steele et al., OOPSLA 2014, "Fast
splittable pseudorandom number generators"), in wrapping int64 arithmetic because torch has no uint64 kernels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK_64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _signed(value: int) -> int:
    """The int64 that has the same 64 bits as `value`."""
    value &= _MASK_64
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's own keeps the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """A bijection of int64 that sends neighbouring inputs to unrelated outputs."""
    x = x + _signed(_GOLDEN)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def derive_key(*parts: int | str) -> int:
    """One int64 key from a seed, a purpose and anything else that distinguishes a stream.

    `derive_key(seed, "negatives", step)` and `derive_key(seed, "flip", step)` are independent.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def bits(key: int | Tensor, counters: Tensor) -> Tensor:
    """64 random bits for each counter: int64, the shape of `counters` (int64); the key is an int64 or a () tensor."""
    return mix(mix(counters) ^ key)


def keys_at(keys: Sequence[int], counter: Tensor) -> Tensor:
    """(n,) int64, n keys for one step or sample: `counter` is () int64 on any device. No host read."""
    return mix(torch.stack([mix(counter) ^ key for key in keys]))


def uniform(key: int | Tensor, counters: Tensor) -> Tensor:
    """Uniform in [0, 1) with 53 bits: float64, the shape of `counters` (int64)."""
    return _shift_right(bits(key, counters), 11).to(torch.float64) * 2.0**-53


def normal(key: int | Tensor, counters: Tensor) -> Tensor:
    """Standard normal by Box-Muller: float64, the shape of `counters` (int64)."""
    radius = torch.sqrt(-2.0 * torch.log1p(-uniform(key, counters * 2)))
    return radius * torch.cos(2.0 * math.pi * uniform(key, counters * 2 + 1))


def normal_rows(key: int, start: int, stop: int, width: int, device: torch.device | None = None) -> Tensor:
    """Standard normals for rows [start, stop) of an infinite table: (stop − start, width) float32.

    Both Box-Muller numbers of one draw are used and float32 suffices, because tables of centers are large.
    """
    pairs = (width + 1) // 2
    counters = torch.arange(start * pairs, stop * pairs, dtype=torch.int64, device=device)
    drawn = bits(key, counters)
    # (0, 1], so that the logarithm is finite.
    radius = (_shift_right(drawn, 40) + 1).float().mul_(2.0**-24).log_().mul_(-2.0).sqrt_()
    angle = (drawn & 0xFFFFFF).float().mul_(2.0 * math.pi * 2.0**-24)
    both = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return both.view(stop - start, 2 * pairs)[:, :width]


def permute(positions: Tensor, size: int, key: int) -> Tensor:
    """The images of `positions` (int64) under a keyed permutation of range(size): a shuffle that needs no memory.

    Four mixing rounds permute the power of two above `size`; an image of `size` or more is permuted again (cycle
    walking, Black and Rogaway 2002), which takes less than two tries on average.

    Raises:
        ValueError: a position lies outside [0, size).
    """
    if positions.numel() and (int(positions.min()) < 0 or int(positions.max()) >= size):
        raise ValueError(f"positions must lie in [0, {size})")
    width = max(1, (size - 1).bit_length())
    keys = [derive_key(key, "round", number) for number in range(4)]
    image = permute_bits(positions, width, keys)
    outside = image >= size
    while bool(outside.any()):
        image = torch.where(outside, permute_bits(image, width, keys), image)
        outside = image >= size
    return image


def permute_bits(values: Tensor, width: int, keys: list[int] | list[Tensor]) -> Tensor:
    """A keyed permutation of range(2 ** width), applied to `values` (int64).

    Each step is a bijection of `width` bits: multiply by an odd number, add, fold the high half onto the low.

    Args:
        values: integers in [0, 2 ** width).
        width: the number of bits, at least 1.
        keys: one int64 per round, or one tensor per round that broadcasts with `values`.
    """
    mask = (1 << width) - 1
    for key in keys:
        high = (key >> 32) & mask if isinstance(key, int) else _shift_right(key, 32) & mask
        values = (values * ((key & mask) | 1) + high) & mask
        values = values ^ (values >> ((width + 1) // 2))
    return values


def permute_bits_back(values: Tensor, width: int, keys: list[int] | list[Tensor]) -> Tensor:
    """The inverse of `permute_bits` with the same arguments."""
    mask = (1 << width) - 1
    for key in keys[::-1]:
        high = (key >> 32) & mask if isinstance(key, int) else _shift_right(key, 32) & mask
        values = values ^ (values >> ((width + 1) // 2))  # undoes itself, since the shift is at least half the width
        factor = (key & mask) | 1
        inverse, right_bits = factor, 3
        while right_bits < width:  # a Newton step doubles them
            inverse, right_bits = inverse * (2 - factor * inverse) & mask, 2 * right_bits
        values = ((values - high) * inverse) & mask
    return values
