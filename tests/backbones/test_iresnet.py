"""IResNet against its published description: counts, names, and a plain forward pass written from that description."""

import re
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from partialfc.backbones import create_backbone
from partialfc.backbones.iresnet import IResNet, keyed_dropout
from partialfc.core.errors import InputError

PUBLISHED = {
    "r18": ([2, 2, 2, 2], 24_025_600),
    "r34": ([3, 4, 6, 3], 34_139_328),
    "r50": ([3, 4, 14, 3], 43_590_848),
    "r100": ([3, 13, 30, 3], 65_156_160),
    "r200": ([6, 26, 60, 6], 118_833_920),
}
NORM_KEYS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def published_keys(blocks: list[int]) -> Iterator[str]:
    def norm(name: str) -> Iterator[str]:
        yield from (f"{name}.{key}" for key in NORM_KEYS)

    yield from ("conv1.weight", "prelu.weight", "fc.weight", "fc.bias", *norm("bn1"), *norm("bn2"), *norm("features"))
    for stage, count in enumerate(blocks, start=1):
        for number in range(count):
            prefix = f"layer{stage}.{number}"
            for name in ("bn1", "bn2", "bn3"):
                yield from norm(f"{prefix}.{name}")
            yield from (f"{prefix}.conv1.weight", f"{prefix}.conv2.weight", f"{prefix}.prelu.weight")
            if number == 0:
                yield f"{prefix}.downsample.0.weight"
                yield from norm(f"{prefix}.downsample.1")


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_keys_are_the_published_ones(name: str) -> None:
    blocks, count = PUBLISHED[name]
    with torch.device("meta"):
        backbone = create_backbone(name, embedding_dim=512, image_size=112)
    parameters = dict(backbone.named_parameters())
    assert sum(parameter.numel() for parameter in parameters.values()) == count
    frozen = [key for key, parameter in parameters.items() if not parameter.requires_grad]
    assert frozen == ["features.weight"]
    assert parameters["features.weight"].numel() == 512
    assert sorted(backbone.state_dict()) == sorted(published_keys(blocks))


def plain_forward(weights: dict[str, Tensor], blocks: list[int], x: Tensor, training: bool) -> Tensor:
    """The network as its description says, from a state_dict, with batch normalisation written out."""

    def norm(x: Tensor, name: str) -> Tensor:
        axes = [0, 2, 3][: x.ndim - 1]
        shape = [1, -1, 1, 1][: x.ndim]
        if training:
            mean = x.mean(axes)
            variance = x.var(axes, unbiased=False)
        else:
            mean, variance = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        scale = weights[f"{name}.weight"] / (variance + 1e-5).sqrt()
        return (x - mean.view(shape)) * scale.view(shape) + weights[f"{name}.bias"].view(shape)

    def prelu(x: Tensor, name: str) -> Tensor:
        return torch.where(x > 0, x, x * weights[f"{name}.weight"].view(1, -1, 1, 1))

    x = prelu(norm(F.conv2d(x, weights["conv1.weight"], padding=1), "bn1"), "prelu")
    for stage, count in enumerate(blocks, start=1):
        for number in range(count):
            at = f"layer{stage}.{number}"
            stride = 2 if number == 0 else 1
            y = F.conv2d(norm(x, f"{at}.bn1"), weights[f"{at}.conv1.weight"], padding=1)
            y = prelu(norm(y, f"{at}.bn2"), f"{at}.prelu")
            y = norm(F.conv2d(y, weights[f"{at}.conv2.weight"], padding=1, stride=stride), f"{at}.bn3")
            if number == 0:
                x = norm(F.conv2d(x, weights[f"{at}.downsample.0.weight"], stride=stride), f"{at}.downsample.1")
            x = x + y
    flat = norm(x, "bn2").reshape(len(x), -1)
    return norm(flat @ weights["fc.weight"].T + weights["fc.bias"], "features")


def randomise(backbone: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter and statistic a value that a mistake about it would show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in backbone.state_dict().items():
            if key.endswith("running_var"):
                tensor.uniform_(0.5, 2.0, generator=generator)
            elif tensor.ndim == 1 and tensor.is_floating_point():
                tensor.normal_(0.5, 0.5, generator=generator)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("blocks", "size", "dim"), [((1, 2, 1, 1), 48, 7), ((2, 2, 2, 2), 32, 16), ((1, 1, 2, 1), 16, 3)]
)
def test_output_equals_a_plain_forward_pass(
    blocks: tuple[int, int, int, int], size: int, dim: int, training: bool
) -> None:
    backbone = IResNet(blocks, embedding_dim=dim, image_size=size).double().train(training)
    randomise(backbone)
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    weights = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    with torch.no_grad():
        embeddings = backbone(images)
        expected = plain_forward(weights, list(blocks), images, training)
    assert embeddings.shape == (3, dim)
    assert torch.allclose(embeddings, expected, rtol=1e-9, atol=1e-9)


def test_first_weights_follow_the_description() -> None:
    backbone = create_backbone("r18", embedding_dim=8, image_size=16)
    for name, module in backbone.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            weight = module.weight.detach()
            assert float(weight.std()) == pytest.approx(0.1, rel=0.05), name
            assert abs(float(weight.mean())) < 0.01, name
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            assert module.eps == 1e-5
            assert bool((module.weight == 1).all()), name
            assert bool((module.bias == 0).all()), name


def test_last_layers_leave_autocast() -> None:
    backbone = IResNet((1, 1, 1, 1), embedding_dim=4, image_size=16)
    seen: dict[str, torch.dtype] = {}
    for name in ("layer4.0.conv2", "fc", "features"):
        module = backbone.get_submodule(name)
        module.register_forward_hook(lambda _m, _x, y, name=name: seen.__setitem__(name, y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = backbone(torch.zeros(2, 3, 16, 16))
    assert seen == {"layer4.0.conv2": torch.bfloat16, "fc": torch.float32, "features": torch.float32}
    assert embeddings.dtype == torch.float32


@pytest.mark.parametrize("size", [0, 8, 100, 120, -16])
def test_image_size_must_be_a_multiple_of_16(size: int) -> None:
    with pytest.raises(InputError, match=f"image_size {re.escape(str(size))} .* multiple of 16"):
        create_backbone("r18", image_size=size)


@pytest.mark.parametrize("dropout", [1.0, -0.1, float("nan")])
def test_dropout_must_be_a_share(dropout: float) -> None:
    with pytest.raises(InputError, match="dropout"):
        create_backbone("r18", image_size=16, dropout=dropout)


def test_dropout_acts_in_training_only_and_needs_keys() -> None:
    backbone = IResNet((1, 1, 1, 1), embedding_dim=4, image_size=16, dropout=0.5)
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    keys = torch.arange(4)
    with torch.no_grad():
        assert not torch.equal(backbone(images, keys), backbone(images, keys + 4))
        assert torch.equal(backbone(images, keys), backbone(images, keys))
        with pytest.raises(ValueError, match="keys"):
            backbone(images)
        backbone.eval()
        assert torch.equal(backbone(images), backbone(images, keys))


@given(rate=st.floats(0.05, 0.9), seed=st.integers(-(2**63), 2**63 - 9), share=st.integers(1, 7))
@settings(max_examples=15, deadline=None)
def test_keyed_dropout_is_a_function_of_the_key_alone(rate: float, seed: int, share: int) -> None:
    keys = torch.arange(8) + seed
    x = torch.ones(8, 2000)
    dropped = keyed_dropout(x, rate, keys)
    assert torch.equal(torch.cat([keyed_dropout(x[:share], rate, keys[:share]), dropped[share:]]), dropped)
    kept = dropped != 0
    assert float(kept.double().mean()) == pytest.approx(1 - rate, abs=0.02)
    assert torch.allclose(dropped[kept], torch.tensor(1 / (1 - rate)))
    assert not torch.equal(kept[0], kept[1])
