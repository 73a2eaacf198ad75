"""Verification on pairs: the family of LFW, CFP-FP, AgeDB-30, CALFW, CPLFW and RFW."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from partialfc.core.errors import InputError
from partialfc.data.pair_files import PairSet
from partialfc.distributed.collectives import all_gather_rows, rank_of, split_evenly, world_size_of
from partialfc.evaluation.statistics.figures import Result
from partialfc.evaluation.statistics.intervals import accuracy_figure
from partialfc.evaluation.statistics.metrics import Scores, fold_accuracy, roc
from partialfc.evaluation.verification import verification_facts, verification_figures
from partialfc.model.embed import embed_batches
from partialfc.model.files import Model

FARS = (1e-3, 1e-2, 1e-1)
_BEYOND = 5.0  # squared distance of a pair that was not compared: unit vectors are at most 4 apart


@dataclass(frozen=True)
class PairResult:
    """The result of the verification protocol.

    Args:
        accuracy, accuracy_std: mean and population standard deviation over the 10 test folds.
        thresholds: (10,) squared distances below which the folds called a pair "same".
        auc: area under the ROC.
        equal_error_rate: the rate at which false accepts and false rejects are equally frequent.
        tar_at_far: from each rate of `FARS` to the highest TAR whose FAR does not exceed it.
        scores: float64 (P,), the cosine of each pair.
        squared_distances: float64 (P,), between the unit embeddings of each pair.
        is_same: bool (P,), the truth.
        failed: bool (P,), genuine pairs that could not be compared; they count as "different" at every threshold.
        numbers: int64 (P,), the number of each pair among all: impostor pairs that could not be compared are left out.
    """

    accuracy: float
    accuracy_std: float
    thresholds: NDArray[np.float64]
    auc: float
    equal_error_rate: float
    tar_at_far: dict[float, float]
    scores: NDArray[np.float64]
    squared_distances: NDArray[np.float64]
    is_same: NDArray[np.bool_]
    failed: NDArray[np.bool_]
    numbers: NDArray[np.int64]

    @property
    def cosine_threshold(self) -> float:
        """The mean of the folds' thresholds as a cosine: a squared distance d of unit vectors is 2 - 2 cosine."""
        return 1.0 - float(self.thresholds.mean()) / 2.0

    def summary(self) -> dict[str, Any]:
        """The result without its scores, in plain values that JSON can hold."""
        return {
            "pairs": len(self.is_same),
            "accuracy": self.accuracy,
            "accuracy_std": self.accuracy_std,
            "cosine_threshold": self.cosine_threshold,
            "auc": self.auc,
            "equal_error_rate": self.equal_error_rate,
            "tar_at_far": {f"{far:g}": tar for far, tar in self.tar_at_far.items()},
        }

    def result(self) -> Result:
        """The same as named figures with intervals. Pairs of a `.bin` file name no identities: pairs are resampled."""
        genuine, impostor = self.is_same & ~self.failed, ~self.is_same
        rows = 2 * self.numbers[:, None] + np.arange(2)
        scores = Scores(
            self.scores[genuine],
            self.scores[impostor],
            int(impostor.sum()),
            failures=int(self.failed.sum()),
            genuine_rows=rows[genuine],
            impostor_rows=rows[impostor],
        )
        accuracy = {"accuracy": accuracy_figure(self.squared_distances, self.is_same)}
        facts = {"accuracy_std": self.accuracy_std, "cosine_threshold": self.cosine_threshold}
        return Result(
            "pairs", accuracy | verification_figures(scores), facts | verification_facts(scores), {"": scores}
        )


def evaluate_pairs(
    embeddings: Tensor | ArrayLike, is_same: ArrayLike, failed: NDArray[np.bool_] | None = None
) -> PairResult:
    """The protocol on embeddings (2P, D), not normalised; pair i is the rows 2i and 2i + 1, its truth `is_same` (P,).

    Pairs that `failed` (P,) had an image that could not be used: genuine ones count as different, and impostor ones do
    not count, so that a failure never raises an accuracy or lowers a FAR.

    Raises:
        InputError: embeddings that are not finite, not two for each answer, fewer pairs than the 10 folds, or pairs of
            one kind only.
    """
    rows = np.asarray(embeddings.detach().cpu() if isinstance(embeddings, Tensor) else embeddings, dtype=np.float64)
    same = np.asarray(is_same, dtype=bool)
    if rows.ndim != 2 or same.ndim != 1 or len(rows) != 2 * len(same):
        raise InputError(f"{len(rows)} embeddings do not make {same.size} pairs: give two embeddings for each pair.")
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise InputError(
            f"{np.count_nonzero(~finite)} of {len(rows)} embeddings hold NaN or infinity, first that of image "
            f"{int(np.argmin(finite))}: the model diverged, use one saved earlier."
        )
    if same.all() or not same.any():
        raise InputError(f"All {len(same)} pairs are of one kind: give pairs of the same person and of two persons.")
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    units = rows / np.where(norms > 0, norms, 1.0)
    failed = np.zeros(len(same), bool) if failed is None else failed
    numbers = np.flatnonzero(same | ~failed)
    left, right, same, failed = units[0::2][numbers], units[1::2][numbers], same[numbers], failed[numbers]
    distances = np.where(failed, _BEYOND, np.sum((left - right) ** 2, axis=1))
    accuracies, thresholds = fold_accuracy(distances, same)
    scores = np.where(failed, -1.0, np.sum(left * right, axis=1))
    curve = roc(scores[same], scores[~same])
    return PairResult(
        accuracy=float(accuracies.mean()),
        accuracy_std=float(accuracies.std()),
        thresholds=thresholds,
        auc=curve.auc,
        equal_error_rate=curve.equal_error_rate,
        tar_at_far={far: curve.tar_at(far) for far in FARS},
        scores=scores,
        squared_distances=distances,
        is_same=same,
        failed=failed,
        numbers=numbers,
    )


def evaluate_pair_set(model: Model, pairs: PairSet, *, batch_size: int = 256) -> PairResult:
    """The protocol on images, which all ranks embed together; every rank returns the same result.

    The images are cut into the same batches at any world size, and a rank takes whole batches: the result does not
    depend on the world size, as long as the ranks compute alike (same device, same number of threads). One collective.

    Raises:
        InputError: images of another size than the model's, and what `evaluate_pairs` refuses.
    """
    batches = embed_share(model, pairs.images, batch_size=batch_size)
    return evaluate_pairs(gather_shares(list(batches), len(pairs.images), batch_size), pairs.is_same)


def embed_share(
    model: Model, images: NDArray[np.uint8] | Tensor, *, batch_size: int = 256
) -> Generator[Tensor, None, None]:
    """This rank's share of the embeddings of `images`, (B, D) a batch, for `gather_shares`.

    Every rank yields equally often, with empty batches at the end of a shorter share: between two batches, the ranks
    may communicate. See `embed_batches` for the mode of the backbone.
    """
    shares = _shares(len(images), batch_size)
    start, stop = shares[rank_of()]
    yield from embed_batches(model, images[start:stop], batch_size=batch_size)
    counts = [len(range(*share, batch_size)) for share in shares]
    for _ in range(max(1, *counts) - counts[rank_of()]):
        yield torch.empty(0, model.config.embedding_dim, device=model.device)


def gather_shares(batches: list[Tensor], images: int, batch_size: int = 256) -> Tensor:
    """All embeddings (images, D) on every rank, from what `embed_share` yielded there. One collective."""
    counts = [stop - start for start, stop in _shares(images, batch_size)]
    return all_gather_rows(torch.cat(batches), counts)


def _shares(images: int, batch_size: int) -> list[tuple[int, int]]:
    """Start and stop of each rank's share of the images, in whole batches."""
    batches, world_size = -(-images // batch_size), world_size_of()
    cuts = [split_evenly(batches, world_size, rank) for rank in range(world_size)]
    return [(min(start * batch_size, images), min(stop * batch_size, images)) for start, stop in cuts]
