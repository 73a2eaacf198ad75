"""MTCNN: its weights, its arithmetic, and, where the weights are installed, a real photograph."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from marked_photographs import package_file
from PIL import Image

from partialfc.core.errors import InputError
from partialfc.data.align import MIRRORED, TEMPLATE, similarity_transform, transform_points
from partialfc.data.photographs.detect import open_detector
from partialfc.data.photographs.face import Face
from partialfc.data.photographs.mtcnn import FILES, Mtcnn, _suppress, networks

Points = np.ndarray
FACTS = {"name": "mtcnn", "weights": "of the files given", "licence": "unknown", "min_face": None, "min_score": 0.9}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Random weights in the files' form."""
    torch.manual_seed(0)
    for stage, name in zip(networks(), FILES, strict=True):
        torch.save(stage.state_dict(), tmp_path / name)
    return tmp_path


def test_the_networks_have_the_published_sizes() -> None:
    """The parameters of the paper's networks, with a PReLU for each channel."""
    assert [sum(each.numel() for each in stage.parameters()) for stage in networks()] == [6632, 100178, 389040]
    proposals, refinement, output = networks()
    assert [tuple(each.shape) for each in proposals(torch.rand(1, 3, 12, 14))] == [(1, 1, 2), (1, 4, 1, 2)]
    assert [tuple(each.shape) for each in refinement(torch.rand(2, 3, 24, 24))] == [(2,), (2, 4)]
    assert [tuple(each.shape) for each in output(torch.rand(2, 3, 48, 48))] == [(2,), (2, 4), (2, 10)]


def test_weights_are_read_from_a_folder(weights: Path) -> None:
    detector = open_detector(f"mtcnn={weights}")
    assert {key: detector.facts[key] for key in FACTS} == FACTS
    assert sorted(map(len, detector.facts["sha256"].values())) == [64] * 3
    image = np.random.default_rng(0).integers(0, 255, (70, 90, 3), np.uint8)
    assert detector(image) == []
    assert detector(image[:9, :9]) == []  # smaller than the smallest face


def test_random_weights_find_boxes_in_any_image(weights: Path) -> None:
    """Of a pyramid, beyond the edges too, whatever the score."""
    detector = open_detector(f"mtcnn={weights}", min_face=60)
    assert isinstance(detector, Mtcnn)
    for stage in (detector._proposals, detector._refinement, detector._output):
        name = next(name for name in stage.state_dict() if name.endswith("_1.bias"))
        stage.get_parameter(name).data.copy_(torch.tensor([-9.0, 9.0]))  # "face", everywhere
    faces = detector(np.random.default_rng(0).integers(0, 255, (150, 200, 3), np.uint8))
    assert faces
    assert all(face.points.shape == (5, 2) and np.isfinite(face.points).all() for face in faces)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "rnet.pt").unlink(), "There is no file .*rnet.pt: MTCNN needs pnet.pt, rnet.pt"),
        (lambda folder: (folder / "pnet.pt").write_bytes(b"PK\3\4"), "pnet.pt does not hold the weights"),
        (lambda folder: (folder / "pnet.pt").write_bytes((folder / "rnet.pt").read_bytes()), "pnet.pt does not hold"),
        (lambda folder: torch.save(np.zeros(3), folder / "onet.pt"), "onet.pt does not hold the weights"),
        (lambda folder: torch.save([1], folder / "onet.pt"), "onet.pt does not hold the weights"),
    ],
)  # fmt: skip
def test_other_files_are_refused(weights: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(weights)
    with pytest.raises(InputError, match=message):
        open_detector(f"mtcnn={weights}")


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("partialfc.data.photographs.mtcnn.DISTRIBUTION", "no-such-package")
    with pytest.raises(InputError, match=r"pip install --no-deps facenet-pytorch==2.6.0, or give mtcnn=FOLDER"):
        open_detector("mtcnn")


@pytest.mark.parametrize("of_smaller", [False, True])
def test_no_kept_box_overlaps_a_better_one(of_smaller: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.rand(60, 2, generator=generator) * 50
    boxes = torch.cat([start, start + 5 + torch.rand(60, 2, generator=generator) * 30], dim=1)
    scores = torch.rand(60, generator=generator)

    def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
        width = max(0.0, float(min(a[2], b[2]) - max(a[0], b[0])))
        height = max(0.0, float(min(a[3], b[3]) - max(a[1], b[1])))
        areas = [float((box[2] - box[0]) * (box[3] - box[1])) for box in (a, b)]
        common = width * height
        return common / (min(areas) if of_smaller else sum(areas) - common)

    expected: list[int] = []
    for index in scores.argsort(descending=True).tolist():
        if scores[index] > 0.2 and all(overlap(boxes[index], boxes[other]) <= 0.4 for other in expected):
            expected.append(index)
    assert _suppress(boxes, scores, 0.4, least=0.2, of_smaller=of_smaller).tolist() == expected
    assert 5 < len(expected) < 45


# -- with the published weights ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector() -> Mtcnn:
    package_file("facenet-pytorch", "facenet_pytorch/data/pnet.pt")
    found = open_detector("mtcnn")
    assert isinstance(found, Mtcnn)
    return found


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    whole = Image.open(package_file("scikit-image", "skimage/data/astronaut.png")).convert("RGB")
    return whole.crop((60, 0, 400, 300))


@pytest.fixture(scope="module")
def found(detector: Mtcnn, photograph: Image.Image) -> Face:
    [face] = detector(np.asarray(photograph))
    return face


def test_the_published_detector_finds_the_same(detector: Mtcnn) -> None:
    """Box and points as facenet-pytorch's own program gives them for astronaut.png (benchmarks/align.py)."""
    image = np.asarray(Image.open(package_file("scikit-image", "skimage/data/astronaut.png")).convert("RGB"))
    once = open_detector("mtcnn")
    assert isinstance(once, Mtcnn)
    once.looks = 0
    [face] = once(image)
    points = [[205.011, 101.727], [246.763, 103.714], [224.671, 128.965], [201.716, 139.246], [245.265, 141.857]]
    assert face.box == pytest.approx(np.array([180.051, 61.156, 266.747, 171.050]), abs=0.01)
    assert face.points == pytest.approx(np.array(points), abs=0.01)
    assert face.score == pytest.approx(0.9999977, abs=1e-5)
    assert detector.facts["licence"] == "MIT"


def drift(found: Face, points: Points) -> float:
    """The largest distance of points from those that were found, in pixels of the aligned face."""
    matrix = similarity_transform(torch.from_numpy(found.points)[None], TEMPLATE)
    both = torch.from_numpy(np.stack([found.points, points]))
    first, second = transform_points(matrix, both)
    return float(torch.linalg.vector_norm(first - second, dim=1).max())


@pytest.mark.parametrize("degrees", [-30, 30])
def test_points_stay_under_rotation(detector: Mtcnn, photograph: Image.Image, found: Face, degrees: int) -> None:
    center = (np.array(photograph.size) - 1) / 2
    [turned] = detector(np.asarray(photograph.rotate(degrees, Image.Resampling.BICUBIC)))
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    assert drift(found, (turned.points - center) @ np.array([[cosine, sine], [-sine, cosine]]) + center) < 1


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_points_stay_under_scaling(detector: Mtcnn, photograph: Image.Image, found: Face, factor: float) -> None:
    width, height = photograph.size
    scaled = photograph.resize((int(width * factor), int(height * factor)), Image.Resampling.BICUBIC)
    [face] = detector(np.asarray(scaled))
    assert drift(found, (face.points + 0.5) / factor - 0.5) < 1


def test_points_stay_under_mirroring(detector: Mtcnn, photograph: Image.Image, found: Face) -> None:
    [face] = detector(np.asarray(photograph.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
    face.points[:, 0] = photograph.width - 1 - face.points[:, 0]
    assert drift(found, face.points[MIRRORED]) < 1


def test_a_face_at_the_edge_keeps_its_points(detector: Mtcnn, photograph: Image.Image, found: Face) -> None:
    left = int(found.box[0] + 12)
    [face] = detector(np.asarray(photograph.crop((left, 0, *photograph.size))))
    assert drift(found, face.points + np.array([left, 0])) < 3
