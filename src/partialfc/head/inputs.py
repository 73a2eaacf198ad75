"""What a head refuses before it computes anything: one sentence each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from partialfc.core.errors import InputError
from partialfc.distributed.collectives import Shard
from partialfc.head.margins.base import Margin

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WIDEST_LOGITS = 200.0  # float32's exponents reach from e^-103 to e^88


def check_sizes(num_classes: int, embedding_dim: int, sample_rate: float) -> None:
    """Raise InputError for sizes that no head has."""
    if num_classes < 1 or embedding_dim < 1:
        raise InputError(f"PartialFC needs at least 1 class and 1 dimension, not {num_classes} and {embedding_dim}.")
    if not 0 <= sample_rate <= 1:
        raise InputError(f"sample_rate is {sample_rate}; it is a part of the classes, from 0 (positives only) to 1.")


def check_loss(
    margin: Margin, scale: float, conflict_threshold: float | None, operand_dtype: torch.dtype, update: str
) -> None:
    """Raise InputError for a loss that cannot be computed."""
    if not (math.isfinite(scale) and scale > 0):
        raise InputError(f"scale is {scale}; it must be a positive number, such as 64.")
    widest = scale * (1 + margin.negatives_bound)
    if widest > _WIDEST_LOGITS:
        raise InputError(
            f"scale {scale} would overflow: with {type(margin).__name__} the logits spread over "
            f"{widest:g}, and float32's exponentials allow {_WIDEST_LOGITS:g}; lower the scale."
        )
    if conflict_threshold is not None and not -1 <= conflict_threshold <= 1:
        raise InputError(f"conflict_threshold is {conflict_threshold}; it is a cosine in [-1, 1], such as 0.4.")
    if operand_dtype not in (torch.float32, torch.bfloat16):
        raise InputError(f"operand_dtype is {operand_dtype}; it is torch.float32 or torch.bfloat16.")
    if update not in margin.updates:
        raise InputError(
            f"update is {update!r}; {type(margin).__name__} works with {', '.join(sorted(margin.updates))}."
        )


def check_not_wrapped(centers: Tensor, rows: int, width: int, is_replica: bool) -> None:
    """Raise InputError inside a parallel wrapper, whose centers are not the (rows, width) that the head made."""
    inside_ddp = getattr(DistributedDataParallel, "_active_ddp_module", None) is not None
    resharded = type(centers.data) is not Tensor or centers.shape != (rows, width)
    if inside_ddp or resharded or is_replica:
        raise InputError(
            "PartialFC stands inside a parallel wrapper, which would overwrite its shards with rank 0's: "
            "wrap the backbone alone and call the head beside it."
        )


def check_batch(embeddings: Tensor, labels: Tensor, centers: Tensor) -> None:
    """Raise InputError for shapes, dtypes and devices that do not belong together; nothing is read from a device."""
    if embeddings.ndim != 2 or embeddings.shape[1] != centers.shape[1] or embeddings.dtype not in _FLOATS:
        raise InputError(
            f"embeddings are {tuple(embeddings.shape)} of {embeddings.dtype}; the head expects floating point of 16 to "
            f"64 bits and (B, {centers.shape[1]})."
        )
    if labels.shape != embeddings.shape[:1] or labels.dtype != torch.int64:
        raise InputError(
            f"labels are {tuple(labels.shape)} of {labels.dtype}; the head expects int64 of ({len(embeddings)},)."
        )
    if not embeddings.device == labels.device == centers.device:
        raise InputError(
            f"embeddings are on {embeddings.device}, labels on {labels.device} and centers on "
            f"{centers.device}; move all to one device."
        )


def check_counts(counts: Sequence[int], images: int, shard: Shard) -> None:
    """Raise InputError for images of the ranks that do not agree with this rank's."""
    if len(counts) != shard.world_size or counts[shard.rank] != images:
        raise InputError(
            f"counts are {list(counts)}; the head expects the images of each of {shard.world_size} processes, of "
            f"which number {shard.rank} brings {images}."
        )
