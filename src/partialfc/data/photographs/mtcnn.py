"""MTCNN (Zhang et al., IEEE Signal Processing Letters 2016): three small networks, each of which looks closer.

P-Net scores every cell of 12 x 12 pixels of an image pyramid, R-Net looks again at what is left at 24 x 24 pixels, and
O-Net at 48 x 48, which also finds the five points. The weights are those of the package facenet-pytorch (MIT), which
ported the authors'; only its data files are read. They fix the layers' names, the order in which dense layers see their
input, and coordinates that count pixels from 1, with the last one inside.
"""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from partialfc.core.errors import InputError
from partialfc.data.align import MIRRORED, TEMPLATE, invert_similarity, similarity_transform, transform_points
from partialfc.data.photographs.crop import cut
from partialfc.data.photographs.face import Face, Pixels

DISTRIBUTION = "facenet-pytorch"
FILES = ("pnet.pt", "rnet.pt", "onet.pt")
_INSTALL = f"pip install --no-deps {DISTRIBUTION}==2.6.0"
_PUBLISHED = {  # SHA-256 of the files in facenet-pytorch 2.6.0
    "a2a71925e0b9996a42f63e47efc1ca19043e69558b5c523b978d611dfae49c8f",
    "bbb937de72efc9ef83b186c49f5f558467a1d7e3453a8ece0d71a886633f6a86",
    "165bfbe42940416ccfb977545cf0e976d5bf321f67083ae2aaaa5c764280118d",
}
LEAST_SCORE = 0.9  # of a face that is reported; true ones are mostly above 0.98
_CELL, _STRIDE = 12, 2  # of P-Net, in pixels
_SMALLEST = 20  # side of the smallest face, in pixels, at which the pyramid begins
_SHARE = 50  # by default the smallest face is this part of the longer side of the image
_FACTOR = 0.709  # between two levels of the pyramid, halving their area
_WINDOW = ((5.0, 14.0), 102.0)  # where O-Net looks again: corner and side of a square, in pixels of an aligned face
_UPRIGHT = (TEMPLATE - torch.tensor(_WINDOW[0]) + 0.5) * 48 / _WINDOW[1] - 0.5
_SCORES = (0.6, 0.7, 0.7)  # the least score in each network, below which boxes compete no more
_AT_ONCE = 512  # windows in one pass


class Stage(nn.Module):
    """One of the networks: convolutions with PReLU, some followed by pooling, perhaps a dense layer, and heads.

    Args:
        channels: of the image and after each convolution.
        kernels: sizes of the convolutions.
        pools: sizes of the maximum pooling after each, with stride 2; 0 for none.
        dense: inputs and outputs of the dense layer, None for convolutions to the end.
        heads: outputs of each head: two logits (no face, face), the corrections of the box, the points.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        kernels: tuple[int, ...],
        pools: tuple[int, ...],
        dense: tuple[int, int] | None,
        heads: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.pools, self.has_dense = pools, dense is not None
        for number, (inputs, outputs, kernel) in enumerate(zip(channels, channels[1:], kernels, strict=False), 1):
            self.add_module(f"conv{number}", nn.Conv2d(inputs, outputs, kernel))
            self.add_module(f"prelu{number}", nn.PReLU(outputs))
        last = len(kernels) + 1
        if dense is not None:
            self.add_module(f"dense{last}", nn.Linear(*dense))
            self.add_module(f"prelu{last}", nn.PReLU(dense[1]))
        for number, outputs in enumerate(heads, 1):
            if dense is None:
                self.add_module(f"conv{last}_{number}", nn.Conv2d(channels[-1], outputs, 1))
            else:
                self.add_module(f"dense{last + 1}_{number}", nn.Linear(dense[1], outputs))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Of images (N, 3, H, W) in [-1, 1]: the probability of a face, and what the other heads give."""
        layers = list(self.children())
        x = images.contiguous(memory_format=torch.channels_last)  # a third faster than the other, on a CPU
        for number, pool in enumerate(self.pools):
            x = layers[2 * number + 1](layers[2 * number](x))
            x = F.max_pool2d(x, pool, 2, ceil_mode=True) if pool else x
        rest = layers[2 * len(self.pools) :]
        if self.has_dense:
            x = x.permute(0, 3, 2, 1).flatten(1)  # column by column, as the authors' programs stored images
            x, rest = rest[1](rest[0](x)), rest[2:]
        scores, *others = (head(x) for head in rest)
        return [scores.softmax(1)[:, 1], *others]


def networks() -> tuple[Stage, Stage, Stage]:
    """P-Net, R-Net and O-Net, with random weights."""
    return (
        Stage((3, 10, 16, 32), (3, 3, 3), (2, 0, 0), None, (2, 4)),
        Stage((3, 28, 48, 64), (3, 3, 2), (3, 3, 0), (576, 128), (2, 4)),
        Stage((3, 32, 64, 64, 128), (3, 3, 3, 2), (3, 3, 2, 0), (1152, 256), (2, 4, 10)),
    )


def open_mtcnn(folder: Path | None, min_face: int | None, min_score: float) -> Mtcnn:
    """The detector with the weights in `folder`, or else in the installed facenet-pytorch.

    Raises:
        InputError: the package is not installed, or a file is missing, damaged or of another network.
    """
    origin = "of the files given"
    if folder is None:
        try:
            package = metadata.distribution(DISTRIBUTION)
        except metadata.PackageNotFoundError:
            raise InputError(
                f"The weights of MTCNN are not installed: {_INSTALL}, or give mtcnn=FOLDER with {', '.join(FILES)}."
            ) from None
        folder, origin = Path(str(package.locate_file("facenet_pytorch/data"))), f"{DISTRIBUTION} {package.version}"
    stages, digests = networks(), {}
    for stage, name in zip(stages, FILES, strict=True):
        digests[name] = _load(stage, folder / name)
    licence = "MIT" if set(digests.values()) <= _PUBLISHED else "unknown"
    facts = {"name": "mtcnn", "weights": origin, "licence": licence, "sha256": digests}
    return Mtcnn(stages, min_face, min_score, facts | {"min_face": min_face, "min_score": min_score})


def _load(stage: Stage, path: Path) -> str:
    """Load the weights of a network; the SHA-256 of the file."""
    if not path.is_file():
        raise InputError(
            f"There is no file {path}: MTCNN needs {', '.join(FILES)} in one folder ({_INSTALL} has them)."
        )
    try:
        stage.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises errors of any type for a damaged or a foreign file
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path} does not hold the weights of MTCNN's network of that name ({reason}…).") from error
    stage.eval().requires_grad_(False)
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Mtcnn:
    """The detector, see `Detector`.

    Args:
        stages: the three networks.
        min_face: side of the smallest face to find, in pixels; None is a fiftieth of the longer side of the image, and
            at least 20 pixels.
        min_score: the least score of a face.
        facts: what is known of the weights.

    Attributes:
        looks: how often O-Net looks for the points again; 0 leaves them as the paper has them.
    """

    looks = 2

    def __init__(
        self, stages: tuple[Stage, Stage, Stage], min_face: int | None, min_score: float, facts: dict[str, Any]
    ) -> None:
        self._proposals, self._refinement, self._output = stages
        self._min_face, self._min_score, self.facts = min_face, min_score, facts

    @torch.inference_mode()
    def __call__(self, image: Pixels) -> list[Face]:
        """The faces in an image."""
        pixels = _planes(image)
        boxes = self._propose(image)
        scores, corrections = _look(self._refinement, pixels, boxes, 24)
        kept = _suppress(boxes, scores, 0.7, least=_SCORES[1])
        boxes = _square(_corrected(boxes[kept], corrections[kept]))
        scores, corrections, points = _look(self._output, pixels, boxes, 48)
        sides = boxes[:, 2:] - boxes[:, :2] + 1
        points = boxes[:, None, :2] - 1 + points.view(-1, 2, 5).mT * sides[:, None]
        boxes = _corrected(boxes, corrections)
        kept = _suppress(boxes, scores, 0.7, least=max(_SCORES[2], self._min_score), of_smaller=True)
        settled = [self._look_again(image, five) for five in points[kept].double()]
        found = zip(boxes[kept].double() - 1, settled, scores[kept], strict=True)
        return [Face(box.numpy(), five.numpy(), float(score)) for box, five, score in found]

    def _look_again(self, image: Pixels, points: Tensor) -> Tensor:
        """Points (5, 2) found again by O-Net in the upright face that they give, and in its mirror image."""
        for _ in range(self.looks):
            matrix = similarity_transform(points[None], _UPRIGHT)
            window = cut(image, matrix, 48).permute(2, 0, 1).float()
            _, _, found = self._output(_normalised(torch.stack([window, window.flip(2)])))
            found = found.view(2, 2, 5).mT.double() * 48 - 0.5
            found[1, :, 0] = 47 - found[1, :, 0]
            upright = (found[0] + found[1, MIRRORED]) / 2
            points = transform_points(invert_similarity(matrix), upright[None])[0]
        return points

    def _propose(self, image: Pixels) -> Tensor:
        """Square boxes (N, 4) that may be faces, from the pyramid of an image uint8 (H, W, 3)."""
        smallest = self._min_face or max(_SMALLEST, max(image.shape[:2]) // _SHARE)
        reduction = max(1, smallest // _SMALLEST)
        base = Image.fromarray(image).reduce(reduction)
        planes = _planes(np.asarray(base))[None].float()
        height, width = planes.shape[2:]
        boxes, scores, corrections = [torch.empty(0, 4)], [torch.empty(0)], [torch.empty(0, 4)]
        scale = _CELL / (smallest / reduction)
        while min(height, width) * scale >= _CELL:
            level = F.interpolate(planes, (int(height * scale + 1), int(width * scale + 1)), mode="area")
            probability, correction = self._proposals(_normalised(level))
            y, x = (probability[0] >= _SCORES[0]).nonzero(as_tuple=True)
            cells = torch.stack([x, y], dim=1).float() * _STRIDE
            found = torch.cat([((cells + 1) / scale).floor(), ((cells + _CELL) / scale).floor()], dim=1)
            kept = _suppress(found, probability[0, y, x], 0.5)
            boxes.append(found[kept])
            scores.append(probability[0, y, x][kept])
            corrections.append(correction[0, :, y, x].T[kept])
            scale *= _FACTOR
        merged = torch.cat(boxes)
        kept = _suppress(merged, torch.cat(scores), 0.7)
        merged = merged[kept]
        sides = merged[:, 2:] - merged[:, :2]
        merged = merged + torch.cat(corrections)[kept] * sides.repeat(1, 2)
        return _square((merged - 0.5) * reduction + 0.5)


def _planes(image: Pixels) -> Tensor:
    return torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))


def _normalised(pixels: Tensor) -> Tensor:
    return (pixels - 127.5) / 128


def _look(stage: Stage, image: Tensor, boxes: Tensor, side: int) -> list[Tensor]:
    """What a network says of the windows (N, 4) of an image uint8 (3, H, W), each resized to `side`; black outside."""
    height, width = image.shape[1:]
    windows = [torch.empty(0, 3, side, side)]
    for left, top, right, bottom in boxes.trunc().int().tolist():
        window = image[:, max(top - 1, 0) : max(bottom, 0), max(left - 1, 0) : max(right, 0)].float()
        border = (max(1 - left, 0), max(right - width, 0), max(1 - top, 0), max(bottom - height, 0))
        window = F.pad(window, border) if any(border) else window
        windows.append(F.interpolate(window[None], (side, side), mode="area"))
    parts = [stage(_normalised(part)) for part in torch.cat(windows).split(_AT_ONCE)]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _corrected(boxes: Tensor, corrections: Tensor) -> Tensor:
    """Boxes (N, 4) whose edges move by `corrections` (N, 4), in shares of width and height."""
    sides = boxes[:, 2:] - boxes[:, :2] + 1
    return boxes + corrections * sides.repeat(1, 2)


def _square(boxes: Tensor) -> Tensor:
    """Squares of the longer side around the centres of boxes (N, 4)."""
    sides = boxes[:, 2:] - boxes[:, :2]
    half = sides.amax(1, keepdim=True) / 2
    start = boxes[:, :2] + sides / 2 - half
    return torch.cat([start, start + 2 * half], dim=1)


def _suppress(boxes: Tensor, scores: Tensor, overlap: float, *, least: float = 0.0, of_smaller: bool = False) -> Tensor:
    """The indices of boxes (N, 4) with a score above `least` that no better one overlaps, the best first.

    Args:
        overlap: the share of the union, or of the smaller box, that two boxes may have in common.
    """
    corners, areas = boxes.numpy(), np.prod(boxes[:, 2:].numpy() - boxes[:, :2].numpy(), axis=1)
    order = torch.argsort(scores, descending=True, stable=True).numpy()
    order = order[scores.numpy()[order] > least]
    kept: list[int] = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(int(best))
        start = np.maximum(corners[best, :2], corners[order, :2])
        stop = np.minimum(corners[best, 2:], corners[order, 2:])
        common = np.prod(np.maximum(stop - start, 0), axis=1)
        whole = np.minimum(areas[best], areas[order]) if of_smaller else areas[best] + areas[order] - common
        order = order[common <= overlap * whole]
    return torch.tensor(kept, dtype=torch.long)
