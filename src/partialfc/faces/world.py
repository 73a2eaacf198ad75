"""A procedural world in files: a training set, and test pairs of people who are not in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from partialfc.core.errors import InputError
from partialfc.faces.render import GROUPS
from partialfc.faces.sets import FOLDS, Layout, write_pair_set, write_training_set

FIRST_HELD_OUT = 1_000_000


@dataclass(frozen=True)
class FaceWorld:
    """What is written; all of it a function of the seed.

    Args:
        identities, shots: people of the training set, and images of each.
        pairs: test pairs, half of them genuine, a multiple of 20; impostors are of one group.
        pair_identities: further people for the pairs, numbered from `FIRST_HELD_OUT`.
        image_size: side of the images in pixels.
        layout: format of the training set.

    Raises:
        InputError: the numbers make no set, or the people of the training set would reach those of the pairs.
    """

    identities: int = 1_000
    shots: int = 8
    pairs: int = 6_000
    pair_identities: int = 1_000
    image_size: int = 112
    seed: int = 0
    layout: Layout = "recordio"

    def __post_init__(self) -> None:
        if not 0 < self.identities <= FIRST_HELD_OUT:
            raise InputError(f"identities is {self.identities}; it lies between 1 and {FIRST_HELD_OUT:,}.")
        if self.shots < 1:
            raise InputError(f"shots is {self.shots}; an identity has at least 1 image.")
        if self.pairs < 1 or self.pairs % (2 * FOLDS):
            raise InputError(f"pairs is {self.pairs}; {FOLDS} balanced folds take a multiple of {2 * FOLDS}.")
        if self.pair_identities < 2 * GROUPS:
            raise InputError(f"pair_identities is {self.pair_identities}; impostors take at least {2 * GROUPS}.")
        if self.image_size < 16:
            raise InputError(f"image_size is {self.image_size}; a face takes at least 16 pixels.")

    def write(
        self, folder: Path, *, take_over: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, Any]:
        """Write `folder/train` and `folder/pairs.bin`; what was written, as JSON can hold it.

        Args:
            take_over: keep the parts that an interrupted call has finished, rather than refuse the folder.

        Raises:
            InputError: the folder exists and is not to be taken over, or the numbers make no set.
        """
        train, pairs = folder / "train", folder / "pairs.bin"
        if folder.exists() and not take_over:
            raise InputError(f"{folder} exists already: remove it, or write somewhere else.")
        folder.mkdir(parents=True, exist_ok=True)
        images, pair_images = self.identities * self.shots, 2 * self.pairs

        def report(before: int) -> Callable[[int, int], None] | None:
            return None if progress is None else lambda done, total: progress(before + done, images + pair_images)

        if not train.exists():
            write_training_set(
                train,
                identities=range(self.identities),
                shots=self.shots,
                size=self.image_size,
                seed=self.seed,
                layout=self.layout,
                progress=report(0),
            )
        if not pairs.exists():
            write_pair_set(
                pairs,
                identities=range(FIRST_HELD_OUT, FIRST_HELD_OUT + self.pair_identities),
                pairs=self.pairs,
                size=self.image_size,
                seed=self.seed,
                progress=report(images),
            )
        return {"train": str(train), "images": images, "pairs_file": str(pairs), **asdict(self)}
