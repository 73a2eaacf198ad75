"""Blockwise cosine scans over unit embeddings: the nearest rows of each row, and the largest similarities of all pairs.

No scan stores more than one block of similarities a thread. On a CPU a product of int8 codes bounds every similarity
of a block from above, and only pairs whose bound reaches the threshold are computed; on a GPU a float32 product does
the same with a smaller bound. Results are exact: they depend neither on blocks, threads or ranks nor on the device.
"""

from __future__ import annotations

import math
import threading
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from partialfc.core.errors import InputError
from partialfc.core.threads import run_parallel
from partialfc.distributed.activity import report_progress
from partialfc.distributed.collectives import (
    all_gather_rows,
    broadcast,
    rank_of,
    row_counts,
    split_evenly,
    world_size_of,
)

_BLOCK = (512, 1024)  # rows and columns on a CPU: the int32 products of a block stay in a core's cache
_GPU_BLOCK = (4096, 8192)
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
    return terms.sum(dim=1).float() if terms.shape[1] == 0 else terms[:, 0].float()


@dataclass(frozen=True)
class _Codes:
    """Rows rounded to int8: `scales · values` is the rows but for errors of norm `residuals`.

    Attributes:
        values: (N, D) int8.
        scales, residuals: (N,) float64.
    """

    values: Tensor
    scales: Tensor
    residuals: Tensor

    @classmethod
    def of(cls, units: Tensor) -> _Codes:
        values = torch.empty(units.shape, dtype=torch.int8)
        scales, residuals = torch.empty(2, len(units), dtype=torch.float64)

        def encode(start: int) -> None:
            part = slice(start, start + _BLOCK[0])
            rows = units[part].double()
            scale = (rows.abs().amax(dim=1, keepdim=True) / 127).clamp_min(1e-30)
            rounded = (rows / scale).round_()
            values[part], scales[part] = rounded.to(torch.int8), scale[:, 0]
            residuals[part] = torch.linalg.vector_norm(rows - rounded * scale, dim=1)

        run_parallel(encode, range(0, len(units), _BLOCK[0]))
        return cls(values, scales, residuals)


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
        """Prepare `units` (N, D), of any floating dtype.

        Raises:
            InputError: a row is neither of norm 1 nor 0, or holds NaN.
        """
        units = units.detach().float().contiguous()
        norms = torch.linalg.vector_norm(units, dim=1)
        wrong = ~(((norms - 1.0).abs() < _LONGEST - 1.0) | (norms == 0.0))
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise InputError(f"Embedding {row} has norm {float(norms[row]):g}: normalise the embeddings to norm 1.")
        return cls(units, _Codes.of(units) if units.device.type == "cpu" and _int8_pays() else None)

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, rows: Tensor) -> Rows:
        """A copy of the `rows` (n,) int64."""
        codes = self.codes
        if codes is not None:
            codes = _Codes(codes.values[rows], codes.scales[rows], codes.residuals[rows])
        return Rows(self.units[rows], codes)

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block of similarities."""
        return _BLOCK if self.units.device.type == "cpu" else _GPU_BLOCK


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
        if not torch.equal(torch._int_mm(left, right).float(), floats[0] @ floats[1]):  # below 2²⁴, hence exact
            return False
    except RuntimeError:
        return False
    by_codes = min(timeit.repeat(lambda: torch._int_mm(left, right), number=1, repeat=5))
    return by_codes < min(timeit.repeat(lambda: torch.mm(*floats), number=1, repeat=5))


def _rounding(width: int) -> float:
    """An upper bound of the rounding error of a float32 product of two rows (in any order of its sum) and of `dot`.

    Higham, Accuracy and Stability of Numerical Algorithms, section 3.1: γ |x| |y| with γ = D u / (1 − D u), u = 2⁻²⁴.
    """
    return 1e-7 * (width + 10)


def _candidates(left: Rows, right: Rows, rows: slice, columns: slice, least: float | Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of a block that may be as similar as `least`, and a few others: (n,) int64 rows of each side.

    With codes q of scale s and a residual r, x·y − s_x s_y q_x·q_y = r_x·(y − r_y) + x·r_y, so by Cauchy and Schwarz
    the similarity exceeds that of the codes by at most |r_x| (|y| + |r_y|) + |x| |r_y|.

    Args:
        left, right: both sides.
        rows, columns: the block.
        least: a similarity; one a row of the block, (R,) float64, or one for all.
    """
    rounding = _rounding(left.units.shape[1])
    if isinstance(least, Tensor):
        least = least[:, None]
    if left.codes is None or right.codes is None:
        product = left.units[rows] @ right.units[columns].T
        first, second = (product >= least - rounding).nonzero(as_tuple=True)
        return first + rows.start, second + columns.start
    codes, others = left.codes, right.codes
    product = torch._int_mm(codes.values[rows], others.values[columns].T)
    scales, other_scales = codes.scales[rows, None], others.scales[columns]
    residuals, other_residuals = codes.residuals[rows, None], others.residuals[columns]
    # Most rows have no candidate, which an integer tells: no column has a larger residual or a better scale.
    missing = least - _slack(residuals, other_residuals.max()) - rounding
    quotient = missing / (scales * torch.where(missing > 0, other_scales.max(), other_scales.min()))
    hit = (product.amax(dim=1) >= quotient.floor().clamp_(-(2**31), 2**31 - 1).flatten()).nonzero().flatten()
    bound = product[hit] * (scales[hit] * other_scales) + (_slack(residuals[hit], other_residuals) + rounding)
    first, second = (bound >= (least[hit] if isinstance(least, Tensor) else least)).nonzero(as_tuple=True)
    return hit[first] + rows.start, second + columns.start


def _slack(residuals: Tensor, others: Tensor) -> Tensor:
    return residuals * (_LONGEST + others) + _LONGEST * others


def pair_dots(left: Rows, right: Rows, first: Tensor, second: Tensor) -> Tensor:
    """`dot` of pairs given by their rows, (n,) int64 of each side, with bounded memory: (n,) float32."""
    parts = zip(first.split(_PAIRS_AT_ONCE), second.split(_PAIRS_AT_ONCE), strict=True)
    return torch.cat([dot(left.units[i], right.units[j]) for i, j in parts])


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
    """The `k` most similar rows of `gallery` to each of `queries`, which the ranks share. Two collectives.

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
        return queries.units.new_empty(len(queries), 0), queries.units.new_empty(len(queries), 0, dtype=torch.int64)
    shares = [split_evenly(len(queries), world_size_of(), rank) for rank in range(world_size_of())]
    start, stop = shares[rank_of()]
    step = queries.block[0]
    blocks = [slice(i, min(i + step, stop)) for i in range(start, stop, step)]
    with _full_precision():
        parts = run_parallel(lambda block: _nearest(queries, gallery, block, k), blocks)
    similarities = torch.cat([queries.units.new_empty(0, k), *(part[0] for part in parts)])
    rows = torch.cat([similarities.new_empty(0, k, dtype=torch.int64), *(part[1] for part in parts)])
    counts = [stop - start for start, stop in shares]
    return all_gather_rows(similarities, counts), all_gather_rows(rows, counts)


def _nearest(queries: Rows, gallery: Rows, rows: slice, k: int) -> tuple[Tensor, Tensor]:
    """`top_k` of the queries `rows`, in this thread."""
    step, count = gallery.block[1], rows.stop - rows.start
    # What the k-th best of a first part has for certain, k rows of the gallery reach.
    part = queries.units[rows] @ gallery.units[: max(k, step)].T
    least = part.topk(k, dim=1).values[:, -1].double() - _rounding(queries.units.shape[1])
    found, size = [], 0
    for j in range(0, len(gallery), step):
        first, second = _candidates(queries, gallery, rows, slice(j, min(j + step, len(gallery))), least)
        found.append((first - rows.start, second, pair_dots(queries, gallery, first, second)))
        size += len(first)
        if size > 4 * count * k:
            found = [_best_of_each(found, k)]
            first, second, similarities = found[0]
            size = len(first)
            full = torch.bincount(first, minlength=count) == k
            last = first.bincount(minlength=count).cumsum(0)[full] - 1
            least[full] = torch.maximum(least[full], similarities[last].double())
    _, second, similarities = _best_of_each(found, k)
    return similarities.view(count, k), second.view(count, k)


def _best_of_each(found: list[tuple[Tensor, Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `k` best pairs of each row of the left side, the best first; of equal ones those of smaller right rows."""
    first, second, similarities = (torch.cat(parts) for parts in zip(*found, strict=True))
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
        size = len(labels)
        same, total = (
            int((left.bincount(minlength=size) * right.bincount(minlength=size)).sum()),
            len(left) * len(right),
        )
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
    for least in pairs.first_thresholds(count, different):
        tail = _Tail(count, least, left.units.device)
        with _full_precision():
            pairs.scan(tail, progress)
        sizes = row_counts(len(tail.keys), tail.keys.device)
        keys, similarities = all_gather_rows(tail.keys, sizes), all_gather_rows(tail.similarities, sizes)
        if len(keys) >= count:
            break
    keys, similarities = _largest(keys, similarities, count)
    order = keys.argsort()
    order = order[similarities[order].argsort(descending=True, stable=True)]
    keys = keys[order]
    return similarities[order], keys // len(pairs.right), keys % len(pairs.right)


def _largest(keys: Tensor, similarities: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest similarities, of equal ones those of the smallest keys, in no certain order."""
    if len(keys) <= count:
        return keys, similarities
    least = similarities.kthvalue(len(keys) - count + 1).values
    above = similarities > least
    tied = keys[similarities == least].sort().values[: count - int(above.sum())]
    return torch.cat([keys[above], tied]), torch.cat([similarities[above], least.expand(len(tied))])


class _Tail:
    """The largest similarities of the pairs seen so far: `count` of them, and up to as many again that may be smaller.

    Attributes:
        keys: (n,) int64 that stand for pairs.
        similarities: (n,) float32.
        least: the similarity that a pair has to reach; it rises.
    """

    def __init__(self, count: int, least: float, device: torch.device) -> None:
        self.count, self.least = count, least
        self.keys = torch.empty(0, dtype=torch.int64, device=device)
        self.similarities = torch.empty(0, device=device)
        self._new: list[tuple[Tensor, Tensor]] = []
        self._size = 0

    def add(self, keys: Tensor, similarities: Tensor) -> None:
        if len(keys):
            self._new.append((keys, similarities))
            self._size += len(keys)
        if self._size > 2 * self.count + _PAIRS_AT_ONCE:
            self.compact()

    def compact(self) -> None:
        """Drop all but the `count` largest."""
        parts = [(self.keys, self.similarities), *self._new]
        keys, similarities = (torch.cat(part) for part in zip(*parts, strict=True))
        self.keys, self.similarities = _largest(keys, similarities, self.count)
        self._new, self._size = [], len(self.keys)
        if len(self.keys) == self.count and self.count:
            self.least = max(self.least, float(self.similarities.min()))


@dataclass(frozen=True)
class _Pairs:
    """The pairs that `largest_pairs` scans; the key of a pair is its left row times the number of right rows plus its
    right row."""

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
        some = torch.arange(0, len(self.left), -(-len(self.left) // _SAMPLE) or 1, device=self.left.units.device)
        others = torch.arange(0, len(self.right), -(-len(self.right) // _SAMPLE) or 1, device=some.device)
        with _full_precision():
            product = self.left.units[some] @ self.right.units[others].T
        excluded = self.left_labels[some, None] == self.right_labels[others]
        if self.unordered:
            excluded |= some[:, None] >= others
        sample = product[~excluded]
        ranks = (count, -(-2 * count * len(sample) // max(1, different)) + 16)
        rounding = _rounding(self.left.units.shape[1])
        found = [
            float(sample.kthvalue(len(sample) - rank + 1).values) - rounding if 0 < rank <= len(sample) else -math.inf
            for rank in ranks
        ]
        return broadcast(torch.tensor(sorted(found, reverse=True), dtype=torch.float64, device=some.device)).tolist()

    def scan(self, tail: _Tail, progress: Callable[[int, int], None] | None) -> None:
        """Offer this rank's share of the pairs to `tail`, in threads."""
        rows, columns = self.left.block
        blocks = [
            (i, j)
            for j in range(0, len(self.right), columns)
            for i in range(0, min(len(self.left), j + columns) if self.unordered else len(self.left), rows)
        ][rank_of() :: world_size_of()]
        lock = threading.Lock()

        def work(block: tuple[int, int]) -> None:
            keys, similarities = self._at_least(*block, tail.least)
            with lock:
                tail.add(keys, similarities)

        some = 32 * torch.get_num_threads()  # blocks between two reports
        for start in range(0, len(blocks), some):
            run_parallel(work, blocks[start : start + some])
            report_progress()
            if progress is not None:
                progress(min(start + some, len(blocks)), len(blocks))
        tail.compact()

    def _at_least(self, i: int, j: int, least: float) -> tuple[Tensor, Tensor]:
        """Keys and similarities of all pairs in the block at (i, j) that are as similar as `least`."""
        rows = slice(i, min(i + self.left.block[0], len(self.left)))
        columns = slice(j, min(j + self.left.block[1], len(self.right)))
        first, second = _candidates(self.left, self.right, rows, columns, least)
        chosen = self.left_labels[first] != self.right_labels[second]
        if self.unordered:
            chosen &= first < second
        first, second = first[chosen], second[chosen]
        similarities = pair_dots(self.left, self.right, first, second)
        chosen = similarities >= least
        return (first * len(self.right) + second)[chosen], similarities[chosen]
