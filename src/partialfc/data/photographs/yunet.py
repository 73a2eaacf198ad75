"""YuNet (Wu, Peng and Yu 2023, YuNet: a tiny millisecond-level face detector) by OpenCV, with a file that the user has.

OpenCV Zoo publishes it as face_detection_yunet_2023mar.onnx (MIT). It finds faces of about 10 to 300 pixels, so that a
photograph is reduced to `LONGEST` pixels first.
"""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from partialfc.core.errors import InputError
from partialfc.data.photographs.face import Face, Pixels
from partialfc.data.sources.base import check_regular

LONGEST = 640
_MOST_OVERLAP = 0.3  # of two boxes, as in OpenCV's example


def open_yunet(path: Path, min_face: int | None, min_score: float) -> YuNet:
    """The detector in an ONNX file.

    Raises:
        InputError: OpenCV is not installed, there is no such file, or it is no YuNet.
    """
    try:
        import cv2
    except ImportError:
        raise InputError("YuNet is run by OpenCV: pip install opencv-python-headless.") from None
    check_regular([path])
    if not path.is_file():
        raise InputError(f"There is no file {path}: give yunet=FILE, such as face_detection_yunet_2023mar.onnx.")
    facts = {
        "name": "yunet",
        "weights": "of the file given",
        "licence": "unknown",
        "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()},
        "min_face": min_face,
        "min_score": min_score,
    }
    detector = YuNet(cv2, path, min_face, min_score, facts)
    try:
        detector(np.zeros((64, 64, 3), np.uint8))
    except cv2.error as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path} is no YuNet that OpenCV {cv2.__version__} runs ({reason}…).") from error
    return detector


class YuNet:
    """The detector, see `Detector`. A thread has a network of its own, since one cannot serve two images at once.

    Args:
        cv2: the module of OpenCV.
        path: the ONNX file.
        min_face: side of the smallest face to keep, in pixels of the photograph; None keeps all.
        min_score: the least score of a face.
        facts: what is known of the file.
    """

    def __init__(
        self, cv2: ModuleType, path: Path, min_face: int | None, min_score: float, facts: dict[str, Any]
    ) -> None:
        self._cv2, self._path, self._own = cv2, path, threading.local()
        self._min_face, self._min_score, self.facts = min_face or 0, min_score, facts

    def __call__(self, image: Pixels) -> list[Face]:
        """The faces in an image."""
        if not hasattr(self._own, "network"):
            self._own.network = self._cv2.FaceDetectorYN.create(
                str(self._path), "", (LONGEST, LONGEST), score_threshold=self._min_score, nms_threshold=_MOST_OVERLAP
            )
        whole = np.array(image.shape[1::-1])
        width, height = np.maximum(1, (whole * min(1.0, LONGEST / whole.max())).round().astype(int)).tolist()
        self._own.network.setInputSize((width, height))
        small = self._cv2.resize(image[..., ::-1], (width, height), interpolation=self._cv2.INTER_AREA)
        rows = self._own.network.detect(small)[1]
        if rows is None:
            return []
        rows = rows.astype(np.float64)
        rows = rows[np.argsort(-rows[:, 14], kind="stable")]
        scale = whole / (width, height)
        # Box and points lie in pixels whose corners are at integers; the points come eyes, nose, mouth, left first.
        boxes = np.concatenate([rows[:, :2] * scale, (rows[:, :2] + rows[:, 2:4]) * scale], axis=1) - 0.5
        points = rows[:, 4:14].reshape(-1, 5, 2) * scale - 0.5
        faces = [Face(box, five, float(score)) for box, five, score in zip(boxes, points, rows[:, 14], strict=True)]
        return [face for face in faces if (face.box[2:] - face.box[:2]).min() >= self._min_face]
