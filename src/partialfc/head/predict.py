"""What a head says of embeddings: their logits over all classes, or the nearest classes."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from partialfc.core.errors import InputError
from partialfc.distributed.collectives import Shard, all_gather_rows, split_evenly
from partialfc.head import inputs
from partialfc.head.backends.tile_sizes import CHUNKED_CPU_SCRATCH_BYTES, chunked_tile_classes
from partialfc.head.center_state import CenterState
from partialfc.head.loss import LossConfig, normalise_centers, normalise_rows


class Prediction(nn.Module):
    """The part of `PartialFC` that compares embeddings with all centers, and changes nothing."""

    centers: nn.Parameter
    center_state: CenterState
    shard: Shard
    loss_config: LossConfig

    @_disable_dynamo
    @torch.no_grad()
    def logits(self, embeddings: Tensor) -> Tensor:
        """scale × cosine with every class: no margin, no sampling, no gradient.

        Every rank calls it, with embeddings of its own. 2 + world size collectives.

        Args:
            embeddings: (B, D) floating point, not normalised; B may differ between ranks.

        Returns:
            (B, C) float64 for float64 embeddings, float32 otherwise.

        Raises:
            InputError: wrong shape, dtype or device, NaN or infinity in the embeddings of any rank, or a center that is
                zero or not finite.
        """
        unit, counts = self._gather_unit(embeddings)
        own = torch.cat([unit.new_empty(len(unit), 0), *(cosines for _, cosines in self._cosines(unit))], dim=1)
        parts = [self._gather_classes(part, self.shard.total) for part in own.split(counts)]
        logits = parts[self.shard.rank]
        _check_finite(logits, torch.arange(self.shard.total, device=logits.device).expand_as(logits))
        return logits * self.loss_config.scale

    @_disable_dynamo
    @torch.no_grad()
    def predict(self, embeddings: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """The k nearest classes of each embedding, the nearest first; of equal cosines the smaller class number.

        Each rank scans its classes block by block, within the head's scratch memory. Every rank calls it, with
        embeddings of its own and the same k. Four collectives.

        Args:
            embeddings: as for `logits`.
            k: how many, at least 1; all classes if there are fewer.

        Returns:
            (B, min(k, C)) int64 class numbers and their cosines, of the dtype of `logits`.

        Raises:
            InputError: as for `logits`, or k is less than 1.
        """
        if not (isinstance(k, Integral) and k >= 1):
            raise InputError(f"k is {k!r}; predict finds a whole number of classes for each embedding, at least 1.")
        unit, counts = self._gather_unit(embeddings)
        values, classes = unit.new_empty(len(unit), 0), torch.empty(len(unit), 0, dtype=torch.int64, device=unit.device)
        for first, cosines in self._cosines(unit):
            block_values, block_classes = _largest(cosines, k)
            classes = torch.cat([classes, block_classes + first], dim=1)
            values, classes = _sorted(torch.cat([values, block_values], dim=1), classes, k)
        # Ranks own ascending classes, so that a stable order keeps the smaller one of equal cosines first.
        values, classes = _sorted(self._gather_classes(values, k), self._gather_classes(classes, k), k)
        _check_finite(values, classes)
        rank = self.shard.rank
        return classes.split(counts)[rank], values.split(counts)[rank]

    def _gather_unit(self, embeddings: Tensor) -> tuple[Tensor, list[int]]:
        """(G, D) unit embeddings of all ranks in the compute dtype, and the number of each rank's. Two collectives."""
        inputs.check_shard(self.shard)
        labels = torch.zeros(len(embeddings), dtype=torch.int64, device=self.centers.device)
        counts = inputs.batch_counts(embeddings, labels, None, self.centers, self.center_state, self.shard)
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        gathered = all_gather_rows(embeddings.to(dtype).contiguous(), counts, self.shard.group)
        inputs.check_values(gathered, labels[:0], self.shard.total, self.center_state.step)
        return normalise_rows(gathered.double())[0].to(dtype), counts

    def _cosines(self, unit: Tensor) -> Iterator[tuple[int, Tensor]]:
        """For each block of this rank's classes the first, and the cosines (G, n), in which infinity stands for NaN."""
        self.center_state.flush(self.centers)
        k, limit = self.loss_config.margin.sub_centers, self.loss_config.scratch_bytes
        if unit.device.type == "cpu":
            limit = min(limit, CHUNKED_CPU_SCRATCH_BYTES)
        size = chunked_tile_classes(len(unit), unit.shape[1], k * unit.element_size(), limit)
        for first in range(0, len(self.shard), size):
            centers = normalise_centers(self.centers[first * k : (first + size) * k].to(unit.dtype))[0]
            with torch.autocast(unit.device.type, enabled=False):
                cosines = (unit @ centers.T).unflatten(1, (-1, k)).amax(dim=2)
            yield self.shard.start + first, cosines.clamp_(-1, 1).nan_to_num_(nan=torch.inf)

    def _gather_classes(self, values: Tensor, most: int) -> Tensor:
        """Put columns of all ranks beside each other, min(most, its classes) of each rank. One collective."""
        shard = self.shard
        bounds = [split_evenly(shard.total, shard.world_size, rank) for rank in range(shard.world_size)]
        counts = [min(most, stop - start) for start, stop in bounds]
        return all_gather_rows(values.T.contiguous(), counts, shard.group).T


def _largest(cosines: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in the order of their positions, and these; of equal values the first ones.

    `topk` picks any of equal values, and a stable sort of all takes several times as long.
    """
    k = min(k, cosines.shape[1])
    smallest = cosines.topk(k, dim=1).values[:, -1:]
    larger, equal = cosines > smallest, cosines == smallest
    equal &= equal.cumsum(dim=1) <= k - larger.sum(dim=1, keepdim=True)
    positions = (larger | equal).nonzero()[:, 1].reshape(len(cosines), k)
    return cosines.gather(1, positions), positions


def _sorted(values: Tensor, classes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k of each row by descending value; equal values keep their order."""
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :k], classes.gather(1, order)[:, :k]


def _check_finite(cosines: Tensor, classes: Tensor) -> None:
    """Raise InputError if one of the cosines (B, n) with these classes comes from a center without a direction."""
    bad = classes[cosines.isinf()]
    if len(bad):
        raise InputError(
            f"The center of class {int(bad[0])} is zero or not finite: load the head from an earlier step."
        )
