"""The samples' own classes: B × D work, in float64, in shapes that do not depend on which shard owns them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.head.margins.base import Margin

TINY = 1e-12


def normalise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows (…, D) and their former lengths (…); a row of zeros stays zero."""
    norms = torch.linalg.vector_norm(rows, dim=-1).clamp_min(TINY)
    return rows / norms[..., None], norms


def class_rows(classes: Tensor, sub_centers: int) -> Tensor:
    """(s × K,) numbers of the rows that hold the centers of (s,) classes."""
    if sub_centers == 1:
        return classes
    return (classes[:, None] * sub_centers + torch.arange(sub_centers, device=classes.device)).flatten()


@dataclass(frozen=True)
class TargetTerms:
    """The targets of the global batch as one shard sees them, in float64; zeros where another shard owns the class.

    Attributes:
        owned: (G,) bool.
        rows: (G,) int64, local row of the (nearest) center of each; the number of rows where not owned.
        unit_centers: (G, D) and center_norms: (G,), 1 where not owned.
        cosine: (G,).
    """

    owned: Tensor
    rows: Tensor
    unit_centers: Tensor
    center_norms: Tensor
    cosine: Tensor


def target_terms(
    centers: Tensor, unit_embeddings: Tensor, owned: Tensor, classes: Tensor, margin: Margin
) -> TargetTerms:
    """Cosines of the samples' own classes.

    Args:
        centers: (L × K, D), raw.
        unit_embeddings: (G, D) float64.
        owned: (G,) bool, samples of the global batch whose class this shard owns.
        classes: (G,) int64, their local class numbers; of others anything.
    """
    if not len(centers):
        zeros = torch.zeros_like(unit_embeddings)
        return TargetTerms(owned, torch.zeros_like(classes), zeros, torch.ones_like(zeros[:, 0]), zeros[:, 0])
    rows = class_rows(torch.where(owned, classes, 0), margin.sub_centers).view(-1, margin.sub_centers)
    unit_centers, norms = normalise_rows(centers[rows].double())
    cosine, nearest = (unit_centers @ unit_embeddings[:, :, None])[..., 0].max(dim=1)
    pick = torch.arange(len(rows), device=rows.device), nearest
    return TargetTerms(
        owned=owned,
        rows=torch.where(owned, rows[pick], len(centers)),
        unit_centers=torch.where(owned[:, None], unit_centers[pick], 0.0),
        center_norms=torch.where(owned, norms[pick], 1.0),
        cosine=torch.where(owned, cosine.clamp(-1.0, 1.0), 0.0),
    )


def segment_sum(rows: Tensor, values: Tensor, nowhere: int) -> tuple[Tensor, Tensor]:
    """Sums of the values that go to one row, always in the same order.

    Args:
        rows: (G,) int64, at most `nowhere`.
        values: (G, D).

    Returns:
        (G,) int64, the distinct rows in order, then `nowhere` to the end; and (G, D), their sums.
    """
    ordered, order = rows.sort(stable=True)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    segments = is_first.cumsum(0) - 1
    distinct = torch.full_like(rows, nowhere).scatter_(0, segments, ordered)
    bounds = torch.searchsorted(segments, torch.arange(len(rows) + 1, device=rows.device))
    # Unlike index_add_, which adds repeated rows on a GPU in whatever order the threads come; unsafe skips a host read.
    return distinct, torch.segment_reduce(values[order], "sum", offsets=bounds, unsafe=True)
