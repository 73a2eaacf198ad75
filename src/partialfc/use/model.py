"""A model with methods: `load_model(path).embed(images)` and `.verify(a, b)`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from partialfc.core.errors import InputError
from partialfc.data.photographs.face import Detector
from partialfc.evaluation.statistics.thresholds import NAME, Thresholds, read_thresholds
from partialfc.model import files
from partialfc.model.embed import embed
from partialfc.model.files import Model, find_model
from partialfc.use.pictures import Picture, crop_of
from partialfc.use.verify import Verification, verify


@dataclass
class FaceModel(Model):
    """A model, and the file or folder that it was read from."""

    path: Path = Path()

    def embed(
        self,
        images: np.ndarray | Tensor | Sequence[Picture],
        *,
        batch_size: int = 256,
        faces_in: Detector | None = None,
    ) -> Tensor:
        """Embeddings, float32 (N, D), not normalised, on the model's device.

        Args:
            images: uint8 (N, S, S, 3) RGB with S the model's `image_size`, or files and pixels of aligned crops.
            batch_size: images in one pass.
            faces_in: the detector for files and pixels that are no aligned crops.

        Raises:
            InputError: an image cannot be read, or is no aligned crop and shows no face or several.
        """
        if not isinstance(images, np.ndarray | Tensor):
            images = np.stack([crop_of(one, self.config.image_size, faces_in) for one in images])
        return embed(self, images, batch_size=batch_size)

    @property
    def thresholds_path(self) -> Path:
        """Where the thresholds stand beside the model, if they were measured."""
        return (self.path.parent if self.path.is_file() else find_model(self.path)) / NAME

    def thresholds(self, path: str | Path | None = None) -> Thresholds:
        """The thresholds in the file `path`, or else those beside the model.

        Raises:
            InputError: there are none, they are damaged, or a newer version wrote them.
        """
        if path is None and not self.thresholds_path.is_file():
            raise InputError(
                f"There is no {self.thresholds_path}: measure it, partialfc evaluate {self.path} --benchmark PAIRS "
                "--write-thresholds, or name a file with --thresholds."
            )
        return read_thresholds(self.thresholds_path if path is None else Path(path))

    def verify(
        self,
        a: Picture,
        b: Picture,
        *,
        fmr: float = 1e-3,
        thresholds: str | Path | None = None,
        faces_in: Detector | None = None,
        force: bool = False,
    ) -> Verification:
        """Whether two pictures show the same person, as `partialfc.use.verify.verify`.

        Args:
            thresholds: their file; by default the `thresholds.json` beside the model.

        Raises:
            InputError: a picture or the thresholds cannot be used, or the model cannot decide.
        """
        return verify(self, a, b, self.thresholds(thresholds), fmr=fmr, faces_in=faces_in, force=force)


def load_model(path: str | Path, device: str | torch.device = "cpu") -> FaceModel:
    """The model of a model folder, a run folder, an ONNX file or a file of weights, see `partialfc.model.files`.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    model = files.load_model(path, device)
    return FaceModel(model.backbone, model.config, model.origin, Path(path))
