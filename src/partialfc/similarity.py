"""Blockwise cosine scans over unit embeddings: the nearest rows of each row, and the largest similarities of all pairs.

No scan stores more than one block of similarities a thread. On a CPU a product of int8 codes bounds every similarity
of a block from above, and only pairs whose bound reaches the threshold are computed; on a GPU a float32 product does
the same with a smaller bound. Results are exact: they depend neither on blocks, threads or ranks nor on the device.
"""

from __future__ import annotations

import math
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from partialfc.core.errors import InputError
from partialfc.core.threads import run_parallel
from partialfc.distributed.activity import report_progress
from partialfc.distributed.collectives import Shard, all_gather_rows, broadcast, row_counts

_BLOCK = (512, 1024)  # rows and columns on a CPU: the int32 products of a block stay in a core's cache
_GPU_BLOCK = (4096, 8192)
_STRIP = 4  # blocks of as many columns above each other, whose candidates are computed together
_PAIRS_AT_ONCE = 1024  # in `pair_dots`
_SAMPLE = 4096  # rows of each side whose pairs give the first threshold of `largest_pairs`
_LONGEST = 1.001  # norm of a row


def dot(left: Tensor, right: Tensor) -> Tensor:
    """The similarity of each row of `left` (n, D) float32 to the same row of `right`: (n,) float32.

    This is their dot product in float64, rounded to float32. Its terms, which float64 holds exactly, are added in an
    order that depends on D alone, so that equal rows have equal similarities in any call, on any device.
    """
    terms = left.double() * right.double()
    width = terms.shape[1]
    while width > 1:
        half = (width + 1) // 2
        terms[:, : width - half] += terms[:, half:width]
        width = half
    return terms[:, :1].sum(dim=1).float()


@dataclass(frozen=True)
class _Codes:
    """Rows rounded to int8: `scales · values` is the rows of `order` but for errors of norm `residuals`.

    Attributes:
        order: (N,) int64, the rows by ascending scale, so that those of a block are alike.
        values: (N, D) int8.
        scales, residuals: (N,) float64.
    """

    order: Tensor
    values: Tensor
    scales: Tensor
    residuals: Tensor

    @classmethod
    def of(cls, units: Tensor) -> _Codes:
        scales, order = (units.abs().amax(dim=1).double() / 127).clamp_min_(1e-30).sort(stable=True)
        values, residuals = torch.empty(units.shape, dtype=torch.int8), torch.empty_like(scales)

        def encode(start: int) -> None:
            part = slice(start, start + _BLOCK[0])
            rows = units[order[part]].double()
            rounded = (rows / scales[part, None]).round_()
            values[part] = rounded.to(torch.int8)
            residuals[part] = torch.linalg.vector_norm(rows - rounded * scales[part, None], dim=1)

        run_parallel(encode, range(0, len(units), _BLOCK[0]))
        return cls(order, values, scales, residuals)


@dataclass(frozen=True)
class Rows:
    """Unit embeddings, prepared for scans.

    Attributes:
        units: (N, D) float32, rows of norm 1, or 0.
        codes: their int8 codes, None where float32 products are used.
    """

    units: Tensor
    codes: _Codes | None = None

    @classmethod
    def of(cls, units: Tensor) -> Rows:
        """Prepare `units` (N, D), of any floating dtype; see `check_units`."""
        units = units.detach().float().contiguous()
        check_units(units)
        wide = units.shape[1] >= 16  # narrow products gain nothing, and torch 2.13 gets those of width 1 wrong
        return cls(units, _Codes.of(units) if wide and units.device.type == "cpu" and _int8_pays() else None)

    def __len__(self) -> int:
        return len(self.units)

    @property
    def order(self) -> Tensor:
        """(N,) int64, the rows in the order in which scans visit them."""
        return torch.arange(len(self), device=self.units.device) if self.codes is None else self.codes.order

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block of similarities."""
        return _BLOCK if self.units.device.type == "cpu" else _GPU_BLOCK


def check_units(units: Tensor) -> None:
    """Raise an InputError if a row of `units` (N, D) has a norm other than 1 and 0, or holds NaN."""
    norms = torch.linalg.vector_norm(units, dim=1)
    wrong = ~(((norms - 1.0).abs() < _LONGEST - 1.0) | (norms == 0.0))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise InputError(f"Embedding {row} has norm {float(norms[row]):g}: normalise the embeddings to norm 1.")


@cache
def _int8_pays() -> bool:
    """Whether int8 products are exact and faster than float32 ones on this CPU.

    Without VNNI instructions oneDNN's int8 products may saturate; elsewhere PyTorch's may be plain loops.
    """
    codes = torch.full((_BLOCK[1], 512), 127, dtype=torch.int8)
    codes[1::2] = -127
    left, right = codes[: _BLOCK[0]], codes.T
    floats = left.float(), right.float()
    try:
        exact = torch.equal(torch._int_mm(left, right).float(), torch.mm(*floats))  # sums of integers below 2²⁴
    except RuntimeError:
        return False
    by_codes = min(timeit.repeat(lambda: torch._int_mm(left, right), number=1, repeat=5))
    return exact and by_codes < min(timeit.repeat(lambda: torch.mm(*floats), number=1, repeat=5))


def _rounding(width: int) -> float:
    """An upper bound of the rounding error of a float32 product of two rows (in any order of its sum) and of `dot`.

    Higham, Accuracy and Stability of Numerical Algorithms, section 3.1: γ |x| |y| with γ = D u / (1 − D u), u = 2⁻²⁴.
    """
    return 1e-7 * (width + 10)


def _candidates(left: Rows, right: Rows, rows: slice, columns: slice, least: float | Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of a block that may be as similar as `least`, and some others: (n,) int64 positions of each side.

    With codes q of scale s and a residual r, x·y − s_x s_y q_x·q_y = r_x·(y − r_y) + x·r_y, so by Cauchy and Schwarz
    the similarity exceeds that of the codes by at most |r_x| (|y| + |r_y|) + |x| |r_y|. The largest residual and the
    best scale of all columns make of this an integer that the product of codes has to reach, one a row.

    Args:
        left, right: both sides.
        rows, columns: the block, positions in the `order` of each side.
        least: a similarity; one a row of the block, (R,) float64, or one for all.
    """
    rounding = _rounding(left.units.shape[1])
    if left.codes is None or right.codes is None:
        product = left.units[rows] @ right.units[columns].T
        needed = least - rounding
        first, second = (product >= (needed[:, None] if isinstance(needed, Tensor) else needed)).nonzero(as_tuple=True)
    else:
        product = torch._int_mm(left.codes.values[rows], right.codes.values[columns].T)
        residuals, largest = left.codes.residuals[rows], float(right.codes.residuals[columns].max())
        needed = least - (residuals * (_LONGEST + largest) + _LONGEST * largest) - rounding
        best, worst = right.codes.scales[columns][[-1, 0]].tolist()
        needed /= left.codes.scales[rows] * torch.where(needed > 0, best, worst)
        needed = needed.floor().clamp_(-(2**31), 2**31 - 1).int()
        hit = (product.amax(dim=1) >= needed).nonzero()[:, 0]  # few rows
        first, second = (product[hit] >= needed[hit, None]).nonzero(as_tuple=True)
        first = hit[first]
    return first + rows.start, second + columns.start


def pair_dots(left: Tensor, right: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """`dot` of pairs given by rows of both sides, (n,) int64 each, in bounded memory: (n,) float32."""
    parts = zip(first.split(_PAIRS_AT_ONCE), second.split(_PAIRS_AT_ONCE), strict=True)
    return torch.cat([dot(left[i], right[j]) for i, j in parts])


@contextmanager
def _full_precision() -> Iterator[None]:
    """Keep float32 products from being computed in TF32 or bfloat16, which `_rounding` does not cover."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def top_k(queries: Rows, gallery: Rows, k: int) -> tuple[Tensor, Tensor]:
    """The `k` most similar rows of `gallery` to each of `queries`, which the ranks share. Three collectives.

    Args:
        queries: the same on all ranks.
        gallery: likewise.
        k: at least 1; all rows of a smaller gallery are returned.

    Returns:
        Their similarities as `dot` computes them, (Q, k) float32, descending, and their rows, (Q, k) int64. Of equal
        similarities the smaller row comes first.
    """
    k = min(k, len(gallery))
    if not k:
        return queries.units.new_empty(len(queries), 0), queries.order.new_empty(len(queries), 0)
    shard, step = Shard.of(len(queries)), queries.block[0]
    blocks = [slice(i, min(i + step, shard.stop)) for i in range(shard.start, shard.stop, step)]
    found = [(queries.units.new_empty(0, k), queries.order.new_empty(0, k))]
    with _full_precision():
        found += run_parallel(lambda block: _nearest(queries, gallery, block, k), blocks)
    similarities, rows = _joined(found)
    counts = row_counts(len(rows), rows.device)
    inverse = queries.order.argsort()
    return all_gather_rows(similarities, counts)[inverse], all_gather_rows(rows, counts)[inverse]


def _nearest(queries: Rows, gallery: Rows, positions: slice, k: int) -> tuple[Tensor, Tensor]:
    """`top_k` of the queries at these positions, in this thread."""
    step, order = gallery.block[1], gallery.order
    rows = queries.order[positions]
    # The k-th best of a first part, less its rounding error, is a similarity that k rows of the gallery reach.
    part = queries.units[rows] @ gallery.units[: max(k, 4 * step)].T
    least = part.topk(k, dim=1).values[:, -1].double() - _rounding(queries.units.shape[1])
    found, size = [], 0
    for j in range(0, len(gallery), step):
        first, second = _candidates(queries, gallery, positions, slice(j, min(j + step, len(gallery))), least)
        first, second = first - positions.start, order[second]
        found.append((first, second, pair_dots(queries.units, gallery.units, rows[first], second)))
        size += len(first)
        if size > 2 * len(rows) * k:
            found = [_best_of_each(found, k)]
            first, _, similarities = found[0]
            size, counts = len(first), first.bincount(minlength=len(rows))
            full = counts == k
            least[full] = least[full].maximum(similarities[counts.cumsum(0)[full] - 1].double())
    _, second, similarities = _best_of_each(found, k)
    return similarities.view(-1, k), second.view(-1, k)


def _best_of_each(found: list[tuple[Tensor, Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `k` best pairs of each row of the left side, the best first; of equal ones those of smaller right rows."""
    first, second, similarities = _joined(found)
    order = second.argsort()
    order = order[similarities[order].argsort(descending=True, stable=True)]
    order = order[first[order].argsort(stable=True)]
    counts = first.bincount()
    place = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[first[order]]
    order = order[place < k]
    return first[order], second[order], similarities[order]


def count_pairs(left_labels: Tensor, right_labels: Tensor | None = None) -> tuple[int, int]:
    """How many pairs have equal labels, and how many different ones: unordered pairs of one side without a second."""
    if right_labels is None:
        counts = left_labels.unique(return_counts=True)[1]
        same, total = int((counts * (counts - 1) // 2).sum()), len(left_labels) * (len(left_labels) - 1) // 2
    else:
        labels = torch.cat([left_labels, right_labels]).unique(return_inverse=True)[1]
        left, right = labels.split([len(left_labels), len(right_labels)])
        counts = left.bincount(minlength=len(labels)) * right.bincount(minlength=len(labels))
        same, total = int(counts.sum()), len(left) * len(right)
    return same, total - same


def largest_pairs(
    left: Rows,
    right: Rows | None,
    left_labels: Tensor,
    right_labels: Tensor | None,
    count: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest similarities over all pairs of different labels, which the ranks scan together.

    Of equal similarities, pairs of smaller left rows, then of smaller right rows, come first. Memory is bounded by a
    few times `count` and a block a thread. Four collectives, eight if the first threshold was too high.

    Args:
        left: (N, D), the same on all ranks.
        right: (M, D), likewise; None for the unordered pairs of `left`, whose left row is the smaller.
        left_labels: (N,) int64.
        right_labels: (M,) int64; None without `right`.
        count: how many; all pairs if there are fewer.
        progress: called regularly with the blocks done and their number.

    Returns:
        Similarities as `dot` computes them, (K,) float32, descending, and the rows of each pair, (K,) int64 twice.
    """
    if right is None or right_labels is None:
        pairs = _Pairs(left, left, left_labels, left_labels, unordered=True)
    else:
        pairs = _Pairs(left, right, left_labels, right_labels, unordered=False)
    different = count_pairs(left_labels, right_labels)[1]
    count = min(count, different)
    keys, similarities = left.order[:0], left.units.new_empty(0)
    for least in pairs.first_thresholds(count, different) if count else ():
        with _full_precision():
            keys, similarities = pairs.scan(count, least, progress)
        sizes = row_counts(len(keys), keys.device)
        keys, similarities = all_gather_rows(keys, sizes), all_gather_rows(similarities, sizes)
        if len(keys) >= count:
            break
    keys, similarities = _largest(count, keys, similarities)
    keys, order = keys.sort()
    similarities, order = similarities[order].sort(descending=True, stable=True)
    return similarities, keys[order] // len(pairs.right), keys[order] % len(pairs.right)


def _joined(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def _largest(count: int, keys: Tensor, similarities: Tensor) -> tuple[Tensor, Tensor]:
    """The `count` largest similarities, of equal ones those of the smallest keys, in no certain order."""
    if len(keys) <= count:
        return keys, similarities
    least = similarities.kthvalue(len(keys) - count + 1).values
    above = similarities > least
    tied = keys[similarities == least].sort().values[: count - int(above.sum())]
    return torch.cat([keys[above], tied]), torch.cat([similarities[above], least.expand(len(tied))])


@dataclass(frozen=True)
class _Pairs:
    """The pairs that `largest_pairs` scans. The key of one is its left row times the right rows, plus its right row."""

    left: Rows
    right: Rows
    left_labels: Tensor
    right_labels: Tensor
    unordered: bool

    def first_thresholds(self, count: int, different: int) -> list[float]:
        """Similarities to start with, descending, the same on all ranks. One collective.

        The first is one that about twice `count` pairs reach, judged by a sample; the last is reached by `count` pairs
        for certain.
        """
        some, others = (
            torch.arange(0, len(side), -(-len(side) // _SAMPLE), device=side.units.device)
            for side in (self.left, self.right)
        )
        with _full_precision():
            product = self.left.units[some] @ self.right.units[others].T
        excluded = self.left_labels[some, None] == self.right_labels[others]
        if self.unordered:
            excluded |= some[:, None] >= others
        sample = product[~excluded]
        found = [
            float(sample.kthvalue(len(sample) - rank + 1).values) - _rounding(self.left.units.shape[1])
            if rank <= len(sample)
            else -math.inf
            for rank in (count, 2 * count * len(sample) // different + 16)
        ]
        return broadcast(torch.tensor(sorted(found, reverse=True), dtype=torch.float64, device=some.device)).tolist()

    def scan(self, count: int, least: float, progress: Callable[[int, int], None] | None) -> tuple[Tensor, Tensor]:
        """Keys and similarities of the `count` largest of this rank's share of the pairs, or of those above `least`."""
        step = self.left.block[1]
        strips = []
        for j in range(0, len(self.right), step):
            end = min(len(self.left), j + step) if self.unordered else len(self.left)
            columns = slice(j, min(j + step, len(self.right)))
            strips += [(slice(i, min(i + _STRIP * step, end)), columns) for i in range(0, end, _STRIP * step)]
        shard = Shard.of(len(strips))
        strips = strips[shard.start : shard.stop]
        found = [(self.left.order.new_empty(0), self.left.units.new_empty(0))]
        size, some = 0, 2 * torch.get_num_threads()  # strips at a time, since their pairs may be many
        for start in range(0, len(strips), some):
            found += run_parallel(partial(self._at_least, least), strips[start : start + some])
            size += sum(len(keys) for keys, _ in found[-some:])
            if size > 2 * count + _PAIRS_AT_ONCE:
                found = [_largest(count, *_joined(found))]
                size, least = count, max(least, float(found[0][1].min()))
            report_progress()
            if progress is not None:
                progress(min(start + some, len(strips)), len(strips))
        return _largest(count, *_joined(found))

    def _at_least(self, least: float, strip: tuple[slice, slice]) -> tuple[Tensor, Tensor]:
        """Keys and similarities of all pairs in a strip of blocks that are as similar as `least`."""
        step, (rows, columns) = self.left.block[0], strip
        found = [
            _candidates(self.left, self.right, slice(i, min(i + step, rows.stop)), columns, least)
            for i in range(rows.start, rows.stop, step)
        ]
        positions = _joined(found)
        first, second = self.left.order[positions[0]], self.right.order[positions[1]]
        chosen = self.left_labels[first] != self.right_labels[second]
        if self.unordered:
            chosen &= positions[0] < positions[1]
            first, second = first.minimum(second), first.maximum(second)
        first, second = first[chosen], second[chosen]
        similarities = pair_dots(self.left.units, self.right.units, first, second)
        chosen = similarities >= least
        return (first * len(self.right) + second)[chosen], similarities[chosen]
