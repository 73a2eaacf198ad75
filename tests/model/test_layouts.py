"""Networks under the names of other projects, and ONNX files, give the embeddings that they give there."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import complaint, run
from torch import Tensor, nn

from partialfc.core.errors import InputError
from partialfc.model.contract import contract_of
from partialfc.model.files import load_model
from partialfc.model.layouts import from_ir_layout


class IRBlock(nn.Module):
    """A block of the `ir` networks: its shortcut takes every second pixel where the width stays."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        if width_in != width:
            convolution = nn.Conv2d(width_in, width, 1, stride, bias=False)
            self.shortcut_layer = nn.Sequential(convolution, nn.BatchNorm2d(width))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(width_in),
            nn.Conv2d(width_in, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.PReLU(width),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


class IR(nn.Module):
    def __init__(self, blocks: tuple[int, ...], embedding_dim: int, image_size: int) -> None:
        super().__init__()
        self.input_layer = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        body, width_in = [], 64
        for width, count in zip((64, 128, 256, 512), blocks, strict=True):
            for number in range(count):
                body.append(IRBlock(width_in, width, 1 if number else 2))
                width_in = width
        self.body = nn.Sequential(*body)
        last = nn.Linear(512 * (image_size // 16) ** 2, embedding_dim)
        norm = nn.BatchNorm1d(embedding_dim, affine=False)
        self.output_layer = nn.Sequential(nn.BatchNorm2d(512), nn.Dropout(0.4), nn.Flatten(), last, norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.output_layer(self.body(self.input_layer(x)))


def ir_18() -> IR:
    """With weights and batch statistics that are not those of the start."""
    torch.manual_seed(3)
    network = IR((2, 2, 2, 2), 16, 32)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
    return network.eval()


@pytest.mark.parametrize("prefix", ["model.", "net."])
def test_ir_networks_give_their_own_embeddings(tmp_path: Path, prefix: str) -> None:
    network = ir_18()
    weights = {prefix + key: value for key, value in network.state_dict().items()}
    torch.save({"state_dict": {**weights, "head.kernel": torch.zeros(16, 5)}}, tmp_path / "adaface.ckpt")
    out = tmp_path / "model"
    assert run("migrate", tmp_path / "adaface.ckpt", "--out", out, "--color-order=bgr") == 0
    model = load_model(out)
    assert (model.config.backbone, model.config.embedding_dim, model.config.image_size) == ("r18", 16, 32)
    assert model.config.color_order == "bgr"
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.backbone(images), network(images), rtol=1e-4, atol=1e-4)


def test_ir_networks_with_other_layers_are_refused(tmp_path: Path) -> None:
    weights = ir_18().state_dict()
    with pytest.raises(InputError, match=r"layer body.0.res_layer.se_block.fc1, which an IResNet has not"):
        from_ir_layout({**weights, "body.0.res_layer.se_block.fc1.weight": torch.zeros(4, 64, 1, 1)})
    torch.save({key: value for key, value in weights.items() if "res_layer.5" not in key}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"bn3.* is missing"):
        load_model(tmp_path / "a.pt")


# -- ONNX --------------------------------------------------------------------------------------------------------------


def field(number: int, value: int | bytes | str) -> bytes:
    """A field of a protocol buffer: a varint, or bytes with their length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def onnx_file(path: Path, matrix: np.ndarray, size: int, batch: int | None) -> Path:
    """An ONNX graph that multiplies flattened images with a matrix."""

    def tensor_type(name: str, shape: tuple[int | None, ...]) -> bytes:
        dims = b"".join(field(1, field(2, "n") if length is None else field(1, length)) for length in shape)
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, dims)))

    dims = b"".join(field(1, length) for length in matrix.shape)
    weight = dims + field(2, 1) + field(8, "w") + field(9, struct.pack(f"<{matrix.size}f", *matrix.flatten().tolist()))
    flatten = field(1, "x") + field(2, "flat") + field(4, "Flatten")
    product = field(1, "flat") + field(1, "w") + field(2, "y") + field(4, "MatMul")
    graph = field(1, flatten) + field(1, product) + field(2, "g") + field(5, weight)
    graph += field(11, tensor_type("x", (batch, 3, size, size))) + field(12, tensor_type("y", (batch, matrix.shape[1])))
    path.write_bytes(field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 13)))
    return path


@pytest.mark.parametrize("batch", [None, 1, 2])
def test_onnx_files_are_models(tmp_path: Path, batch: int | None) -> None:
    pytest.importorskip("onnxruntime")
    matrix = np.random.default_rng(0).normal(size=(3 * 16 * 16, 8)).astype(np.float32)
    model = load_model(onnx_file(tmp_path / "a.onnx", matrix, 16, batch))
    assert (model.config.backbone, model.config.embedding_dim, model.config.image_size) == ("onnx", 8, 16)
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(
        model.backbone(images), images.flatten(1) @ torch.from_numpy(matrix), rtol=1e-4, atol=1e-4
    )
    other = load_model(onnx_file(tmp_path / "b.onnx", matrix + 1, 16, batch))
    assert contract_of(model) != contract_of(other)
    assert model.device.type == "cpu"


def test_wrong_onnx_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "a.onnx").write_bytes(b"text")
    with pytest.raises(InputError, match=r"a\.onnx is no ONNX file that onnxruntime runs"):
        load_model(tmp_path / "a.onnx")
    assert "but not trained" in complaint(capsys, "migrate", tmp_path / "a.onnx", "--out", tmp_path / "out")


def test_a_migrated_model_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(ir_18().state_dict(), tmp_path / "backbone.pth")
    assert run("migrate", tmp_path / "backbone.pth", "--out", tmp_path / "model", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["kind"], result["backbone"], result["embedding_dim"]) == ("model", "r18", 16)
    assert result["next"].startswith("partialfc evaluate")
