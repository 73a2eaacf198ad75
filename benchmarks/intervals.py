"""How often the 95 % interval of TAR at FAR 1e-3 holds the true TAR, on scores of known models.

    python benchmarks/intervals.py [--draws 1000] [--processes 2]

Every draw is a new set of people and pictures. Beside the interval over identities stand that over pairs, which takes
pairs as independent, and the plain bootstrap over identities, in which an impostor pair counts the product of how often
its two identities were drawn. Writes its table into docs/results/intervals.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from documents import paragraph, write_between
from partialfc.evaluation.statistics.figures import Figure
from partialfc.evaluation.statistics.intervals import tar_figure
from partialfc.evaluation.statistics.metrics import Scores, allowed_false_accepts

Floats = NDArray[np.float64]

FAR = 1e-3
_PRODUCT_RESAMPLES = 400


@dataclass(frozen=True)
class Gaussian:
    """Scores that add an effect of each identity to the noise of the pair.

    Every identity has `shots` genuine scores, and one impostor score with every other identity. `shared` is the
    correlation of an identity's effects on both.
    """

    identities: int
    genuine_effect: float
    impostor_effect: float
    shared: float = 0.0
    shots: int = 5
    mean: float = 4.0

    def draw(self, generator: np.random.Generator) -> Scores:
        people = np.arange(self.identities)
        effects = generator.normal(size=(2, self.identities))
        own = self.shared * effects[0] + math.sqrt(1 - self.shared**2) * effects[1]
        of_genuine = np.repeat(people, self.shots)
        genuine = self.mean + self.genuine_effect * own[of_genuine] + generator.normal(size=len(of_genuine))
        left, right = np.triu_indices(self.identities, 1)
        impostor = self.impostor_effect * (effects[0][left] + effects[0][right]) + generator.normal(size=len(left))
        return with_tail(genuine, of_genuine, impostor, np.stack([left, right], axis=1), people)

    def true_tar(self) -> float:
        normal = NormalDist()
        threshold = normal.inv_cdf(1 - FAR) * math.sqrt(1 + 2 * self.impostor_effect**2)
        return normal.cdf((self.mean - threshold) / math.sqrt(1 + self.genuine_effect**2))


@dataclass(frozen=True)
class Embedded:
    """Cosines of all pairs of pictures: a center an identity, and noise whose size differs between identities."""

    identities: int
    shots: int = 3
    width: int = 48

    def _units(self, generator: np.random.Generator) -> NDArray[np.float32]:
        centers = generator.normal(size=(self.identities, 1, self.width)).astype(np.float32)
        sizes = generator.uniform(0.5, 1.3, size=(self.identities, 1, 1)).astype(np.float32)
        rows = centers + sizes * generator.normal(size=(self.identities, self.shots, self.width)).astype(np.float32)
        return (rows / np.linalg.norm(rows, axis=2, keepdims=True)).reshape(-1, self.width)

    def draw(self, generator: np.random.Generator) -> Scores:
        units = self._units(generator)
        of_image = np.repeat(np.arange(self.identities), self.shots)
        left, right = np.triu_indices(len(units), 1)
        cosines = (units @ units.T)[left, right].astype(np.float64)
        same = of_image[left] == of_image[right]
        ends = np.stack([of_image[left], of_image[right]], axis=1)[~same]
        return with_tail(cosines[same], of_image[left[same]], cosines[~same], ends, of_image)

    def true_tar(self) -> float:
        """The mean of 40 draws of five times the identities: its error is a fourteenth of that of one draw."""
        generator, found = np.random.default_rng(0), []
        for _ in range(40):
            scores = replace(self, identities=self.identities * 5).draw(generator)
            found.append(tar_figure(replace(scores, genuine_ids=None, impostor_ids=None), FAR).value or 0.0)
        return float(np.mean(found))


MODELS: dict[str, Gaussian | Embedded] = {
    "no effect of identities": Gaussian(500, 0.0, 0.0),
    "on genuine pairs": Gaussian(500, 0.8, 0.0),
    "on both": Gaussian(500, 0.6, 0.3),
    "on both, shared": Gaussian(500, 0.6, 0.3, shared=-0.7),
    "strong on impostors": Gaussian(500, 0.3, 0.7, mean=5.0),
    "2,000 identities": Gaussian(2000, 0.6, 0.3),
    "embeddings": Embedded(300),
}


def with_tail(
    genuine: Floats,
    genuine_ids: NDArray[np.int64],
    impostor: Floats,
    ends: NDArray[np.int64],
    images: NDArray[np.int64],
) -> Scores:
    """The scores with the upper tail of the impostors that a scan of all pairs would keep."""
    kept = 2 * allowed_false_accepts(FAR, len(impostor)) + 100
    tail = np.argpartition(impostor, -kept)[-kept:]
    return Scores(
        genuine, impostor[tail], len(impostor), genuine_ids, ends[tail].astype(np.int64), scanned=(images, images)
    )


def product_figure(scores: Scores, far: float) -> Figure:
    """The plain percentile bootstrap over identities."""
    people, generator = scores.identities, np.random.default_rng(1)
    assert people is not None
    assert scores.scanned is not None
    images = np.bincount(scores.scanned[0], minlength=people.count)
    order = np.argsort(-scores.impostor)
    impostor, ends = scores.impostor[order], people.impostor[order]
    everyone = images.sum() ** 2 - np.square(images).sum()
    tars = []
    for _ in range(_PRODUCT_RESAMPLES):
        weights = np.bincount(generator.integers(people.count, size=people.count), minlength=people.count)
        total = scores.impostors * ((weights @ images) ** 2 - np.square(weights * images).sum()) / everyone
        accepts = np.cumsum(weights[ends[:, 0]] * weights[ends[:, 1]])
        first_rejected = min(int(np.searchsorted(accepts, far * total, side="right")), len(impostor) - 1)
        of_genuine = weights[people.genuine]
        tars.append(of_genuine @ (scores.genuine > impostor[first_rejected]) / of_genuine.sum())
    low, high = np.percentile(tars, [2.5, 97.5])
    return Figure(None, float(low), float(high))


METHODS: dict[str, Callable[[Scores], Figure]] = {
    "identities": lambda scores: tar_figure(scores, FAR),
    "pairs": lambda scores: tar_figure(replace(scores, genuine_ids=None, impostor_ids=None), FAR),
    "product": lambda scores: product_figure(scores, FAR),
}


def ends_of(model: Gaussian | Embedded, seed: int, methods: tuple[str, ...] = tuple(METHODS)) -> Floats:
    """The lower and upper end of each method's interval on one draw: (methods, 2)."""
    scores = model.draw(np.random.default_rng([2024, seed]))
    figures = [METHODS[method](scores) for method in methods]
    return np.array([[figure.low, figure.high] for figure in figures], dtype=np.float64)


def coverage(ends: Floats, truth: float) -> Floats:
    """The share of the draws (draws, methods, 2) whose interval holds the truth, for each method."""
    return ((ends[..., 0] <= truth) & (truth <= ends[..., 1])).mean(axis=0)


def row(name: str, draws: int, pool: ProcessPoolExecutor) -> str:
    model = MODELS[name]
    truth = model.true_tar()
    ends = np.stack(list(pool.map(ends_of, [model] * draws, range(draws), chunksize=10)))
    covered, widths = coverage(ends, truth), (ends[..., 1] - ends[..., 0]).mean(axis=0)
    accepts = allowed_false_accepts(FAR, model.draw(np.random.default_rng(0)).impostors)
    cells = [f"{share:.1%} ({width:.3f})" for share, width in zip(covered, widths, strict=True)]
    return f"| {name} | {accepts} | {truth:.3f} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    lines = [
        "| effects of identities | false accepts | true TAR | identities | pairs | plain product |",
        "|---|---|---|---|---|---|",
    ]
    with ProcessPoolExecutor(arguments.processes) as pool:
        for name in MODELS:
            lines.append(row(name, arguments.draws, pool))
            print(lines[-1], flush=True)
    about = f"{arguments.draws:,} draws of each model; in parentheses the mean width of the interval."
    write_between("results/intervals.md", "benchmarks/intervals.py", [*paragraph(about), "", *lines])


if __name__ == "__main__":
    main()
