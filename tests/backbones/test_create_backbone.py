"""create_backbone: names, options, and first weights that are a function of the seed."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from partialfc.backbones import create_backbone
from partialfc.backbones.iresnet import BLOCKS
from partialfc.core.errors import InputError


@pytest.mark.parametrize("name", ["r18", "mini"])
@pytest.mark.parametrize(("size", "dim"), [(32, 5), (48, 16)])
def test_shapes(name: str, size: int, dim: int) -> None:
    backbone = create_backbone(name, embedding_dim=dim, image_size=size)
    assert backbone.training
    embeddings = backbone(torch.zeros(2, 3, size, size))
    assert embeddings.shape == (2, dim)
    assert embeddings.dtype == torch.float32


def test_weights_are_a_function_of_the_seed() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = create_backbone("mini", embedding_dim=8, image_size=16, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    second = create_backbone("mini", embedding_dim=8, image_size=16, seed=5).state_dict()
    other = create_backbone("mini", embedding_dim=8, image_size=16, seed=6).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


@pytest.mark.parametrize(("name", "nearest"), [("r60", "r50|r100|r200"), ("minni", "mini"), ("iresnet100", "r100")])
def test_unknown_name_lists_the_choices_and_offers_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(InputError, match=f"no backbone '{name}': choose one of r18.*mini.* Did you mean '({nearest})'"):
        create_backbone(name)


def test_a_name_like_none_gets_no_suggestion() -> None:
    with pytest.raises(InputError, match=r"choose one of [^?]*\.$"):
        create_backbone("zzzz")


def test_unknown_option_names_the_options() -> None:
    with pytest.raises(InputError, match="r18 does not take the option 'drop': its options are dropout"):
        create_backbone("r18", drop=0.1)
    with pytest.raises(InputError, match="mini does not take the option 'dropout': it has no options of its own"):
        create_backbone("mini", dropout=0.1)
    with pytest.raises(InputError, match="r18 does not take the option 'blocks'"):
        create_backbone("r18", blocks=(1, 1, 1, 1))


def test_embedding_dim_must_be_positive() -> None:
    with pytest.raises(InputError, match="embedding_dim 0"):
        create_backbone("mini", embedding_dim=0)


@pytest.mark.parametrize("size", [0, 40, -32])
def test_mini_names_the_sizes_it_takes(size: int) -> None:
    with pytest.raises(InputError, match=f"image_size {size} .* multiple of 16"):
        create_backbone("mini", image_size=size)


def test_mini_learns_and_leaves_autocast() -> None:
    """One batch learnt by heart: the loss of a linear probe on the embeddings falls to almost nothing."""
    backbone = create_backbone("mini", embedding_dim=8, image_size=32)
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(16, 3, 32, 32, generator=generator), torch.arange(16) % 4
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    losses = []
    for _ in range(15):
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = backbone(images)
        assert embeddings.dtype == torch.float32
        loss = torch.nn.functional.cross_entropy(embeddings[:, :4], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 5


def test_every_residual_network_has_a_frozen_scale_and_no_other_frozen_parameter() -> None:
    for name in ("mini", *BLOCKS):
        with torch.device("meta"):
            backbone = create_backbone(name, image_size=32)
        frozen = [key for key, parameter in backbone.named_parameters() if not parameter.requires_grad]
        assert frozen == ["features.weight"], name


def test_mini_costs_little() -> None:
    """The demo's time rests on this: about 28 million multiply-adds and 1.1 million parameters at its size."""
    with torch.device("meta"):
        backbone = create_backbone("mini", embedding_dim=128, image_size=64).eval()
        with FlopCounterMode(display=False) as counter:
            backbone(torch.empty(1, 3, 64, 64))
    assert 20e6 < counter.get_total_flops() / 2 < 32e6
    assert sum(parameter.numel() for parameter in backbone.parameters()) < 1.2e6
