"""How far the points that MTCNN finds move under rotation, scaling and mirroring, and how fast `align` is.

    python benchmarks/align.py [--photographs FOLDER] [--copies 8]

Needs facenet-pytorch's weights, and scikit-image for its astronaut.png; other photographs, each with one large face,
are given by their folder. The drift is the largest distance of a point of the changed photograph, brought back, from
that of the photograph as it is, in pixels of the aligned face. The detector of facenet-pytorch itself runs on the same
photographs, with a stand-in for the one function of torchvision that it calls. Writes docs/results/align.md.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from documents import paragraph, write_between
from partialfc.bench.machine import describe
from partialfc.data.align import MIRRORED, TEMPLATE, similarity_transform, transform_points
from partialfc.data.photographs.align import align_photographs
from partialfc.data.photographs.detect import open_detector
from partialfc.data.photographs.face import Face
from partialfc.data.photographs.mtcnn import Mtcnn

Points = NDArray[np.float64]
ANGLES, FACTORS = (-30, -20, -10, 10, 20, 30), (0.5, 0.75, 1.25, 1.5)
LONGEST = 1000  # pixels, up to which both detectors look for faces of the same size
WIDTHS = (512, 1024, 2048, 4096)


def astronaut() -> Path:
    """The photograph in the package scikit-image, which is not imported."""
    return Path(str(metadata.distribution("scikit-image").locate_file("skimage/data/astronaut.png")))


def changes(photograph: Image.Image) -> Iterator[tuple[str, Image.Image, Callable[[Points], Points]]]:
    """The photograph turned, scaled and mirrored, each with the function that brings points back."""
    size = np.array(photograph.size)
    for angle in ANGLES:
        turned = photograph.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        yield "rotation", turned, partial(turned_back, angle, (np.array(turned.size) - 1) / 2, (size - 1) / 2)
    for factor in FACTORS:
        scaled = photograph.resize(tuple((size * factor).round().astype(int).tolist()), Image.Resampling.BICUBIC)
        yield "scaling", scaled, partial(scaled_back, scaled.size / size)
    yield "mirroring", photograph.transpose(Image.Transpose.FLIP_LEFT_RIGHT), partial(mirrored_back, size[0])


def turned_back(angle: float, center: Points, middle: Points, points: Points) -> Points:
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    back: Points = (points - center) @ np.array([[cosine, sine], [-sine, cosine]]) + middle
    return back


def scaled_back(ratio: Points, points: Points) -> Points:
    return (points + 0.5) / ratio - 0.5


def mirrored_back(width: int, points: Points) -> Points:
    return np.stack([width - 1 - points[:, 0], points[:, 1]], axis=1)[MIRRORED]


def largest(detector: Mtcnn, photograph: Image.Image) -> Face | None:
    """The largest face."""
    return max(detector(np.asarray(photograph)), key=lambda face: face.area, default=None)


def drifts(detector: Mtcnn, photograph: Image.Image) -> dict[str, float]:
    """The largest drift under each kind of change, infinite where the face is lost."""
    face = largest(detector, photograph)
    assert face is not None
    matrix = similarity_transform(torch.from_numpy(face.points)[None], TEMPLATE)

    def aligned(points: Points) -> Points:
        found: Points = transform_points(matrix, torch.from_numpy(points)[None])[0].numpy()
        return found

    most: dict[str, float] = {}
    for kind, changed, back in changes(photograph):
        found = largest(detector, changed)
        drift = math.inf
        if found is not None:
            drift = float(np.linalg.norm(aligned(back(found.points)) - aligned(face.points), axis=1).max())
        most[kind] = max(most.get(kind, 0.0), drift)
    return most


def reference() -> Any:
    """facenet-pytorch's own detector; its package file, which imports what is not needed, does not run."""

    def suppress(boxes: torch.Tensor, scores: torch.Tensor, _: torch.Tensor, overlap: float) -> torch.Tensor:
        corners, order = boxes.numpy(), scores.argsort(descending=True, stable=True).numpy()
        areas = np.prod(corners[:, 2:] - corners[:, :2], axis=1)
        kept = []
        while len(order):
            best, order = int(order[0]), order[1:]
            kept.append(best)
            start = np.maximum(corners[best, :2], corners[order, :2])
            common = np.prod(np.maximum(np.minimum(corners[best, 2:], corners[order, 2:]) - start, 0), axis=1)
            order = order[common / (areas[best] + areas[order] - common) <= overlap]
        return torch.tensor(kept, dtype=torch.long)

    names = ("", ".transforms", ".transforms.functional", ".ops", ".ops.boxes")
    for name in names:
        sys.modules[f"torchvision{name}"] = ModuleType(f"torchvision{name}")
    sys.modules["torchvision.transforms"].functional = None  # type: ignore[attr-defined]
    sys.modules["torchvision.ops.boxes"].batched_nms = suppress  # type: ignore[attr-defined]
    package = ModuleType("facenet_pytorch")
    package.__path__ = [str(metadata.distribution("facenet-pytorch").locate_file("facenet_pytorch"))]
    sys.modules["facenet_pytorch"] = package
    return importlib.import_module("facenet_pytorch.models.mtcnn").MTCNN(keep_all=True)


def differences(theirs: Any, detector: Mtcnn, photograph: Image.Image) -> tuple[float, float]:
    """The largest difference of boxes and of points, in pixels, between both detectors' largest faces."""
    with torch.no_grad():
        boxes, _, points = theirs.detect(photograph, landmarks=True)
    face = largest(detector, photograph)
    assert face is not None
    same = int(np.abs(boxes - 1 - face.box).max(1).argmin())
    return float(np.abs(boxes[same] - 1 - face.box).max()), float(np.abs(points[same] - face.points).max())


def rates(photograph: Image.Image, copies: int) -> Iterator[tuple[int, float, float]]:
    """By width: photographs a second that `align` cuts, with all it writes, and the CPU seconds of one."""
    detector = open_detector("mtcnn")
    for width in WIDTHS:
        height = round(photograph.height * width / photograph.width)
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "photographs", "someone")
            source.mkdir(parents=True)
            photograph.resize((width, height)).save(source / "0.jpg", quality=90)
            for number in range(1, copies):
                (source / f"{number}.jpg").write_bytes((source / "0.jpg").read_bytes())
            wall, cpu = time.perf_counter(), time.process_time()
            align_photographs(source.parent, Path(folder, "crops"), detector)
            yield width, copies / (time.perf_counter() - wall), (time.process_time() - cpu) / copies


def table(photographs: list[Path], copies: int) -> list[str]:
    """The lines of the document."""
    again, once = open_detector("mtcnn"), open_detector("mtcnn")
    assert isinstance(again, Mtcnn)
    assert isinstance(once, Mtcnn)
    once.looks = 0
    theirs = reference()
    lines = ["| photograph | size | rotation by ±30° | scaling by 0.5 to 1.5 | mirroring | boxes, points |"]
    lines += ["|---|---|---|---|---|---|"]
    for path in photographs:
        photograph = Image.open(path).convert("RGB")
        photograph.thumbnail((LONGEST, LONGEST))
        before, after = drifts(once, photograph), drifts(again, photograph)
        cells = [f"{before[kind]:.2f} → {after[kind]:.2f}" for kind in ("rotation", "scaling", "mirroring")]
        box, points = differences(theirs, once, photograph)
        size = " × ".join(map(str, photograph.size))
        lines.append(f"| {path.name} | {size} | {' | '.join(cells)} | {box:.1e}, {points:.1e} |")
        print(lines[-1], flush=True)
    hardware = describe("cpu")
    title = (
        f"{hardware['cpu']}, {hardware['cores']} cores, torch {hardware['torch']}, load average "
        f"{os.getloadavg()[0]:.1f}; {copies} JPEG photographs of one face."
    )
    speed = ["", *paragraph(title), "", "| pixels | photographs/s | CPU seconds of one |", "|---|---|---|"]
    photograph = Image.open(photographs[0]).convert("RGB")
    for width, rate, seconds in rates(photograph, copies):
        height = round(photograph.height * width / photograph.width)
        speed.append(f"| {width:,} × {height:,} | {rate:.1f} | {seconds:.2f} |")
        print(speed[-1], flush=True)
    return [*lines, *speed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, metavar="FOLDER", help="more photographs")
    parser.add_argument("--copies", type=int, default=32)
    options = parser.parse_args()
    more = sorted(options.photographs.iterdir()) if options.photographs else []
    write_between("results/align.md", "benchmarks/align.py", table([astronaut(), *more], options.copies))


if __name__ == "__main__":
    main()
