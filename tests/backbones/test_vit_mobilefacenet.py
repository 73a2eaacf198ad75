"""ViT and MobileFaceNet against their published description; masks, drop path and recomputed activations."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from partialfc.backbones import create_backbone
from partialfc.backbones.iresnet import IResNet
from partialfc.backbones.mobilefacenet import MobileFaceNet
from partialfc.backbones.vit import ViT, drop_branch, kept_tokens
from partialfc.core.errors import InputError

COUNTS = {
    "mbf": 2_059_520,
    "mbf_large": 6_314_880,
    "vit_t": 19_137_792,
    "vit_s": 76_023_296,
    "vit_b": 113_833_472,
    "vit_l": 255_684_352,
    "vit_h": 756_393_984,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_the_published_number(name: str) -> None:
    with torch.device("meta"):
        backbone = create_backbone(name)
    assert sum(parameter.numel() for parameter in backbone.parameters()) == COUNTS[name]


def random_images(count: int, size: int) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


def randomise(backbone: nn.Module) -> dict[str, Tensor]:
    """Give every parameter and statistic a value that a mistake about it would show; the weights."""
    generator = torch.Generator().manual_seed(0)
    for key, tensor in backbone.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 2.0, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(0.1, 0.2, generator=generator)
    return {key: tensor.clone() for key, tensor in backbone.state_dict().items()}


def batch_norm(w: dict[str, Tensor], x: Tensor, name: str, eps: float) -> Tensor:
    shape = [1, -1, 1, 1][: x.ndim]
    scale = w[f"{name}.weight"] / (w[f"{name}.running_var"] + eps).sqrt()
    return (x - w[f"{name}.running_mean"].view(shape)) * scale.view(shape) + w[f"{name}.bias"].view(shape)


def batch_statistics(w: dict[str, Tensor], x: Tensor, name: str, eps: float) -> Tensor:
    """Batch norm in training: mean and variance of the batch."""
    others = [0, 2, 3][: x.ndim - 1]
    mean, variance = x.mean(others), x.var(others, unbiased=False)
    return batch_norm({**w, f"{name}.running_mean": mean, f"{name}.running_var": variance}, x, name, eps)


def plain_vit(
    w: dict[str, Tensor],
    depth: int,
    images: Tensor,
    norm: Any = batch_norm,
    kept: Tensor | None = None,
    branches: Any = lambda number, kind: 1.0,
) -> Tensor:
    """`kept` are the places of unmasked tokens, `branches` the factors of a residual branch, one an image."""

    def layer_norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros((), dtype=x.dtype))

    side = images.shape[2] // 9
    cuts = [images[:, :, 9 * i : 9 * i + 9, 9 * j : 9 * j + 9].flatten(1) for i in range(side) for j in range(side)]
    x = torch.stack(cuts, 1) @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"] + w["pos_embed"]
    if kept is not None:
        x = torch.stack([row[places] for row, places in zip(x, kept, strict=True)])
    for n in range(depth):
        query, key, value = linear(layer_norm(x, f"blocks.{n}.norm1"), f"blocks.{n}.attn.qkv").chunk(3, dim=2)
        d, heads = x.shape[2] // 8, []
        for head in range(8):
            q, k, v = (part[:, :, head * d : head * d + d] for part in (query, key, value))
            heads.append(((q @ k.transpose(1, 2)) / d**0.5).softmax(-1) @ v)
        x = x + linear(torch.cat(heads, 2), f"blocks.{n}.attn.proj") * branches(n, "attention")
        inner = linear(layer_norm(x, f"blocks.{n}.norm2"), f"blocks.{n}.mlp.fc1").clamp(0, 6)
        x = x + linear(inner, f"blocks.{n}.mlp.fc2") * branches(n, "mlp")
    x = layer_norm(x, "norm")
    if kept is not None:
        whole = w["mask_token"].repeat(len(x), side * side, 1)
        for row, places, tokens in zip(whole, kept, x, strict=True):
            row[places] = tokens
        x = whole
    x = linear(x.flatten(1), "feature.0")
    return norm(w, linear(norm(w, x, "feature.1", 2e-5), "feature.2"), "feature.3", 2e-5)


@pytest.mark.parametrize(("width", "depth", "size"), [(16, 2, 31), (8, 3, 18)])
def test_vit_equals_a_plain_forward_pass(width: int, depth: int, size: int) -> None:
    backbone = ViT((width, depth), embedding_dim=5, image_size=size).double().eval()
    weights = randomise(backbone)
    images = random_images(3, size)
    with torch.no_grad():
        assert torch.allclose(backbone(images), plain_vit(weights, depth, images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("mask_ratio", "drop_path"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.6), (0.3, 0.6)])
def test_vit_in_training_equals_a_plain_pass(mask_ratio: float, drop_path: float) -> None:
    backbone = ViT((16, 3), embedding_dim=5, image_size=31, mask_ratio=mask_ratio, drop_path=drop_path).double()
    weights = randomise(backbone)
    images, keys = random_images(6, 31), torch.arange(6) + 40

    def branches(number: int, kind: str) -> Tensor:
        return drop_branch(torch.ones(6, 1, 1, dtype=torch.float64), drop_path * number / 2, keys, f"{number} {kind}")

    dropped = torch.cat([branches(number, kind) for number in range(3) for kind in ("attention", "mlp")])
    assert bool((dropped == 0).any()) == (drop_path > 0)
    kept = kept_tokens(9, mask_ratio, keys) if mask_ratio else None
    with torch.no_grad():
        expected = plain_vit(weights, 3, images, batch_statistics, kept, branches)
        assert torch.allclose(backbone(images, keys), expected, rtol=1e-8, atol=1e-8)


def plain_mobilefacenet(w: dict[str, Tensor], blocks: tuple[int, ...], x: Tensor, norm: Any = batch_norm) -> Tensor:
    def conv(x: Tensor, at: str, stride: int = 1, padding: int = 0, groups: int = 1, act: bool = True) -> Tensor:
        x = F.conv2d(x, w[f"{at}.layers.0.weight"], stride=stride, padding=padding, groups=groups)
        x = norm(w, x, f"{at}.layers.1", 1e-5)
        return torch.where(x > 0, x, x * w[f"{at}.layers.2.weight"].view(1, -1, 1, 1)) if act else x

    def bottleneck(x: Tensor, at: str, stride: int) -> Tensor:
        x = conv(x, f"{at}.layers.0")
        x = conv(x, f"{at}.layers.1", stride, 1, x.shape[1])
        return conv(x, f"{at}.layers.2", act=False)

    x = conv(x, "layers.0", 2, 1)
    for stage, count in enumerate(blocks):
        at = f"layers.{2 * stage + 1}"
        if stage == 0 and count == 1:
            x = conv(x, at, 1, 1, 64)
        else:
            for number in range(count):
                x = x + bottleneck(x, f"{at}.layers.{number}", 1)
        if stage < 3:
            x = bottleneck(x, f"layers.{2 * stage + 2}", 2)
    x = conv(x, "conv_sep")
    x = conv(x, "features.layers.0", groups=512, act=False).flatten(1)
    return norm(w, x @ w["features.layers.2.weight"].T, "features.layers.3", 1e-5)


@pytest.mark.parametrize(("blocks", "scale"), [((1, 4, 6, 2), 2), ((2, 1, 2, 1), 4)])
def test_mobilefacenet_equals_a_plain_forward_pass(blocks: tuple[int, int, int, int], scale: int) -> None:
    backbone = MobileFaceNet((blocks, scale), embedding_dim=6, image_size=32).double().eval()
    weights = randomise(backbone)
    images = random_images(2, 32)
    with torch.no_grad():
        assert torch.allclose(backbone(images), plain_mobilefacenet(weights, blocks, images), rtol=1e-9, atol=1e-9)


def test_mobilefacenet_in_training_equals_a_plain_pass() -> None:
    backbone = MobileFaceNet(((1, 2, 1, 1), 2), embedding_dim=6, image_size=32).double()
    weights = randomise(backbone)
    images = random_images(5, 32)
    with torch.no_grad():
        expected = plain_mobilefacenet(weights, (1, 2, 1, 1), images, batch_statistics)
        assert torch.allclose(backbone(images), expected, rtol=1e-8, atol=1e-8)
    mean = 0.9 * weights["features.layers.3.running_mean"]
    assert not torch.allclose(backbone.state_dict()["features.layers.3.running_mean"], mean / 0.9)


BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def vit_keys(depth: int) -> set[str]:
    block: tuple[str, ...]
    block = ("norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias")
    block += ("norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias")
    keys = {"mask_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
    keys |= {f"blocks.{n}.{key}" for n in range(depth) for key in block}
    keys |= {"feature.0.weight", "feature.2.weight"}
    return keys | {f"feature.{n}.{key}" for n in (1, 3) for key in BATCH_NORM}


def mobilefacenet_keys(blocks: tuple[int, int, int, int]) -> set[str]:
    def conv(at: str, activation: bool = True) -> set[str]:
        keys = {f"{at}.layers.0.weight"} | {f"{at}.layers.1.{key}" for key in BATCH_NORM}
        return keys | ({f"{at}.layers.2.weight"} if activation else set())

    def bottleneck(at: str) -> set[str]:
        return conv(f"{at}.layers.0") | conv(f"{at}.layers.1") | conv(f"{at}.layers.2", False)

    keys = conv("layers.0") | conv("conv_sep") | conv("features.layers.0", False) | {"features.layers.2.weight"}
    keys |= {f"features.layers.3.{key}" for key in BATCH_NORM}
    for stage, count in enumerate(blocks):
        at = f"layers.{2 * stage + 1}"
        if stage == 0 and count == 1:
            keys |= conv(at)
        else:
            keys |= {key for n in range(count) for key in bottleneck(f"{at}.layers.{n}")}
        keys |= bottleneck(f"layers.{2 * stage + 2}") if stage < 3 else set()
    return keys


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("vit_t", vit_keys(12)),
        ("vit_s", vit_keys(12)),
        ("vit_b", vit_keys(24)),
        ("vit_l", vit_keys(24)),
        ("vit_h", vit_keys(48)),
        ("mbf", mobilefacenet_keys((1, 4, 6, 2))),
        ("mbf_large", mobilefacenet_keys((2, 8, 12, 4))),
    ],
)
def test_keys_are_the_published_ones(name: str, keys: set[str]) -> None:
    with torch.device("meta"):
        assert set(create_backbone(name).state_dict()) == keys


def test_masked_tokens_are_dropped_and_a_function_of_the_key() -> None:
    keys = torch.arange(6)
    kept = kept_tokens(144, 0.1, keys)
    assert kept.shape == (6, 129)
    assert all(len(set(row.tolist())) == 129 for row in kept)
    assert torch.equal(kept[2:4], kept_tokens(144, 0.1, keys[2:4]))
    assert not torch.equal(kept[0], kept[1])
    backbone = ViT((8, 1), embedding_dim=4, image_size=112, mask_ratio=0.1)
    seen: list[int] = []
    backbone.blocks[0].register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[1]))
    images = torch.rand(2, 3, 112, 112)
    backbone(images, keys[:2])
    backbone.eval()(images)
    assert seen == [129, 144]


def test_drop_path_is_a_function_of_the_key() -> None:
    keys = torch.arange(4000)
    dropped = drop_branch(torch.ones(4000, 1, 1), 0.25, keys, "x").flatten()
    assert float((dropped == 0).double().mean()) == pytest.approx(0.25, abs=0.03)
    assert torch.allclose(dropped[dropped != 0], torch.tensor(1 / 0.75))
    assert torch.equal(dropped[5:9], drop_branch(torch.ones(4, 1, 1), 0.25, keys[5:9], "x").flatten())
    with pytest.raises(ValueError, match="keys"):
        ViT((8, 1), embedding_dim=4, image_size=18, drop_path=0.1)(torch.zeros(2, 3, 18, 18))


def vit(checkpointing: bool) -> nn.Module:
    return ViT((8, 3), embedding_dim=4, image_size=27, mask_ratio=0.3, drop_path=0.5, checkpointing=checkpointing)


def iresnet(checkpointing: bool) -> nn.Module:
    return IResNet((1, 2, 1, 1), embedding_dim=4, image_size=32, dropout=0.3, checkpointing=checkpointing)


@pytest.mark.parametrize(("build", "size"), [(vit, 27), (iresnet, 32)])
def test_recomputing_changes_neither_gradients_nor_statistics(build: Any, size: int) -> None:
    kept, again = build(False).double(), build(True).double()
    again.load_state_dict(kept.state_dict())
    images, keys = random_images(4, size), torch.arange(4) + 7
    for backbone in (kept, again):
        backbone(images, keys).square().mul(torch.arange(4.0)).sum().backward()
    right = dict(again.named_parameters())
    for name, parameter in kept.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, right[name].grad, rtol=1e-9, atol=1e-12), name
    state = again.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in kept.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio 1.0 is not a share"),
        ({"drop_path": -0.1}, "drop_path -0.1 is not a share"),
        ({"mask_ratio": 0.999}, "leaves none of the 144 tokens"),
        ({"image_size": 8}, "image_size 8 does not suit a ViT"),
        ({"dropout": 0.1}, "vit_t does not take the option 'dropout': its options are mask_ratio, drop_path"),
    ],
)
def test_impossible_options_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message), torch.device("meta"):
        create_backbone("vit_t", **options)
    with pytest.raises(InputError, match="image_size 40 does not suit a MobileFaceNet"):
        create_backbone("mbf", image_size=40)


def test_timm_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake(ModuleType):
        def create_model(self, name: str, *, pretrained: bool, num_classes: int) -> nn.Module:
            if name != "tiny" or pretrained:
                raise RuntimeError(f"Unknown model ({name})")
            return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))

    monkeypatch.setitem(sys.modules, "timm", Fake("timm"))
    assert create_backbone("timm:tiny", embedding_dim=3)(torch.zeros(2, 3, 4, 4), torch.arange(2)).shape == (2, 3)
    with pytest.raises(InputError, match="timm cannot make the backbone 'nothing'"):
        create_backbone("timm:nothing")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="timm:tiny needs timm"):
        create_backbone("timm:tiny")


def test_a_real_timm_network() -> None:
    """timm imports torchvision, which works only where it matches torch: elsewhere there is nothing to test."""
    try:
        import timm  # noqa: F401
    except Exception as error:
        pytest.skip(f"timm does not import here: {error}")
    backbone = create_backbone("timm:resnet18", embedding_dim=16, image_size=64)
    assert backbone(torch.zeros(2, 3, 64, 64), torch.arange(2)).shape == (2, 16)
