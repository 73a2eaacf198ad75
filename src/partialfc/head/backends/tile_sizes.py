"""Sizes of the backends' tiles and scratch memory, as plain numbers: a plan needs them without numba, Triton or a GPU.

Throughout, samples is G, the size of the global batch, and width is D, the embedding dimension.
"""

from __future__ import annotations

SCRATCH_BYTES = 256 << 20  # the default limit on tiles of samples × classes
CHUNKED_CPU_SCRATCH_BYTES = 32 << 20  # fresh pages cost a CPU more than recomputing a tile (docs/performance.md)
CPU_TILE_BYTES = 3 << 20
CPU_PARTS = 16  # partial sums of the CPU backend's first pass
GPU_TILE_BYTES = 256 << 20  # all arrays of a tile; smaller ones fit in the cache, but take more launches


def chunked_tile_classes(samples: int, width: int, class_bytes: int, scratch_bytes: int) -> int:
    """Classes in a tile of the chunked backend, of which four (G, tile) and three (tile, D) arrays live at once.

    `class_bytes` is the size of an element of the compute dtype times the number of sub-centers.
    """
    return max(1, scratch_bytes // ((4 * samples + 3 * width) * class_bytes))


def cpu_tile_classes(samples: int, width: int, scratch_bytes: int) -> int:
    """Classes in a tile of the CPU backend: each thread's tile fits in its core's cache."""
    return max(1, min(CPU_TILE_BYTES, scratch_bytes // 4) // (6 * (samples + width)))


def cpu_kept_classes(samples: int, operand_bytes: int, scratch_bytes: int) -> int:
    """The most classes whose weights the CPU backend keeps for the second pass."""
    return scratch_bytes // (samples * operand_bytes)


def gpu_tile_classes(samples: int, width: int, operand_bytes: int, scratch_bytes: int) -> int:
    """Classes in a tile of the GPU backend: a multiple of 256 where at least 256 fit."""
    class_bytes = (samples + width) * operand_bytes + 4 * width
    size = min(GPU_TILE_BYTES, scratch_bytes) // class_bytes
    return size // 256 * 256 if size >= 256 else max(16, size)
