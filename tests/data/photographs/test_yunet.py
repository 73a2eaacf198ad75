"""YuNet by OpenCV: a graph of the same form, written here, whose one face lies where its constants say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from partialfc.core.errors import InputError
from partialfc.data.photographs.detect import open_detector

cv2 = pytest.importorskip("cv2", reason="needs OpenCV")
onnx = pytest.importorskip("onnx", reason="needs onnx")
SIDE = 640  # of the square that the graph takes
# In cells of 16 pixels from the one at column 10 and row 12: the box's centre and the logarithms of its sides, points.
BOX = [1.0, 2.0, np.log(10.0), np.log(12.0)]
POINTS = [[-2.0, 0.0], [3.0, 0.5], [1.0, 2.0], [-1.0, 5.0], [2.5, 5.5]]
COLUMN, ROW, STRIDE = 10, 12, 16


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve outputs as those of face_detection_yunet_2023mar.onnx; they do not depend on the image."""
    helper, values, nodes, outputs = onnx.helper, [], [], []
    nodes.append(helper.make_node("ReduceMean", ["input"], ["mean"], axes=[1, 2, 3], keepdims=0))
    nodes.append(helper.make_node("Mul", ["mean", "zero"], ["nothing"]))
    values.append(onnx.numpy_helper.from_array(np.zeros(1, np.float32), "zero"))
    for stride in (8, 16, 32):
        for name, width in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)):
            content = np.zeros((1, (SIDE // stride) ** 2, width), np.float32)
            if stride == STRIDE:
                face = {"cls": [0.81], "obj": [1.0], "bbox": BOX, "kps": np.ravel(POINTS).tolist()}[name]
                content[0, ROW * (SIDE // stride) + COLUMN] = face
            values.append(onnx.numpy_helper.from_array(content, f"{name}_{stride}_value"))
            nodes.append(helper.make_node("Add", [f"{name}_{stride}_value", "nothing"], [f"{name}_{stride}"]))
            outputs.append(helper.make_tensor_value_info(f"{name}_{stride}", onnx.TensorProto.FLOAT, content.shape))
    outputs.sort(key=lambda output: ("cls", "obj", "bbox", "kps").index(output.name.split("_")[0]))
    image = helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, [1, 3, SIDE, SIDE])
    graph = helper.make_graph(nodes, "yunet", [image], outputs, values)
    path = tmp_path_factory.mktemp("yunet") / "yunet.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=8), path)
    return path


def test_box_and_points_are_those_of_the_photograph(file: Path) -> None:
    detector = open_detector(f"yunet={file}", min_score=0.5)
    (face,) = detector(np.zeros((2 * SIDE, 2 * SIDE, 3), np.uint8))  # twice the size that the network sees
    points = (np.array(POINTS) + np.array([COLUMN, ROW])) * STRIDE * 2 - 0.5
    np.testing.assert_allclose(face.points, points, atol=1e-3)
    center = (np.array([COLUMN, ROW]) + BOX[:2]) * STRIDE * 2 - 0.5
    half = np.array([10.0, 12.0]) * STRIDE
    np.testing.assert_allclose(face.box, [*(center - half), *(center + half)], atol=1e-2)
    assert face.score == pytest.approx(0.9)  # the root of the product of both
    assert set(detector.facts["sha256"]) == {"yunet.onnx"}


def test_small_and_doubtful_faces_are_left_out(file: Path) -> None:
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    assert len(open_detector(f"yunet={file}", min_score=0.5, min_face=160)(image)) == 1
    assert open_detector(f"yunet={file}", min_score=0.5, min_face=161)(image) == []
    assert open_detector(f"yunet={file}", min_score=0.95)(image) == []


def test_wrong_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "noise.onnx").write_bytes(bytes(range(256)))
    for name, sentence in (("none.onnx", "There is no file"), ("noise.onnx", "is no YuNet that OpenCV")):
        with pytest.raises(InputError, match=sentence):
            open_detector(f"yunet={tmp_path / name}")
    with pytest.raises(InputError, match="yunet=FILE"):
        open_detector("yunet")
