"""Options of a training: averaged weights, frozen layers, other weights to start from, faster ways of the same."""

from __future__ import annotations

import copy
import math
from argparse import ArgumentTypeError
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import FIXTURES, final_tensors, interrupt_at, losses, small_config, tiny_config, write_images
from torch import nn

from partialfc.backbones import create_backbone
from partialfc.checkpoint.read import Checkpoint
from partialfc.cli.values import convert
from partialfc.config.build import build_margin
from partialfc.config.options import BackboneConfig, HeadConfig, OptimizerConfig, TrainConfig
from partialfc.config.sample_rate import SampleRate, describe_rate, rate_at
from partialfc.core.device import compute_dtype
from partialfc.core.errors import InputError
from partialfc.data.sources import open_source
from partialfc.data.sources.subset import SubsetSource
from partialfc.head.margins import (
    AdaFace,
    ArcFace,
    CombinedMargin,
    CurricularFace,
    ElasticFace,
    MagFace,
    Margin,
    SubCenterArcFace,
)
from partialfc.model.files import load_model
from partialfc.training.build import check_config
from partialfc.training.loop import train
from partialfc.training.weights import freeze, set_frozen_layers_eval, update_average

MINI = BackboneConfig("mini", 16)
SGD = OptimizerConfig(lr=0.01, lr_scaling="absolute")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "set", [f"person {number}" for number in range(8)])


@pytest.fixture(scope="module")
def plain(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "run"
    train(float32(images), out, quiet=True)
    return out


def float32(images: Path, **changes: Any) -> TrainConfig:
    return tiny_config(images, **{"precision": "float32", "device": "cpu", "optimizer": SGD, **changes})


def test_the_average_is_one_of_weights_and_statistics() -> None:
    network = nn.BatchNorm1d(2)
    average: Any = copy.deepcopy(network).eval().requires_grad_(False)
    with torch.no_grad():
        network.weight.fill_(3.0)
        network.running_mean.fill_(1.0)
        network.num_batches_tracked.fill_(7)
    update_average(average, network, 0.75, steps=10_000)
    assert average.weight.tolist() == [1.5, 1.5]
    assert average.running_mean.tolist() == [0.25, 0.25]
    assert average.num_batches_tracked == 7
    update_average(average, network, 0.75, steps=0)  # the first step counts nine tenths
    assert average.weight.tolist() == pytest.approx([2.85, 2.85])
    assert not average.training


def test_averaged_weights_are_evaluated_saved_and_resumed(images: Path, plain: Path, tmp_path: Path) -> None:
    config = float32(images, optimizer=replace(SGD, ema_decay=0.9))
    train(config, tmp_path / "straight", quiet=True)
    with interrupt_at(4):
        train(config, tmp_path / "resumed", quiet=True)
    train(config, tmp_path / "resumed", resume=True, quiet=True)
    straight, resumed, without = (final_tensors(out) for out in (tmp_path / "straight", tmp_path / "resumed", plain))
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
    assert all(torch.equal(value, straight[name]) for name, value in without.items())  # training itself is the same
    saved = load_model(tmp_path / "straight").backbone.state_dict()
    assert all(torch.equal(value, straight[f"backbone-ema/{name}"]) for name, value in saved.items())
    assert not torch.equal(saved["fc.weight"], straight["backbone/fc.weight"])


def test_frozen_layers_keep_weights_and_statistics(images: Path, plain: Path, tmp_path: Path) -> None:
    frozen = replace(MINI, init=str(plain), freeze=["stem", "bn", "layer1"])
    train(float32(images, backbone=frozen), tmp_path / "run", quiet=True)
    before, after = load_model(plain).backbone.state_dict(), load_model(tmp_path / "run").backbone.state_dict()
    for name, value in before.items():
        held = name.startswith(("stem.", "bn.", "layer1."))
        untrained = name == "features.weight"
        assert torch.equal(value, after[name]) == (held or untrained), name


def test_a_layer_stands_for_all_below_it_and_for_nothing_else() -> None:
    network = create_backbone("mini", embedding_dim=8, image_size=16)
    freeze(network, ["layer1", "fc.bias"])
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    below = {name for name, _ in network.named_parameters() if name.startswith("layer1.")}
    assert frozen == below | {"fc.bias", "features.weight"}
    network.train()
    set_frozen_layers_eval(network, ["layer1", "fc.bias"])
    assert not network.layer1.bn1.training
    assert network.layer2.bn1.training
    with pytest.raises(InputError, match=r"'layer'.*its layers are stem, bn, layer1"):
        freeze(network, ["layer"])
    with pytest.raises(InputError, match="leaves no layer to train"):
        freeze(network, [name for name, _ in network.named_children()])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fused_updates_and_other_memory_orders_take_the_same_step(images: Path, tmp_path: Path, optimizer: Any) -> None:
    """One step of one batch of all images: further steps, and statistics of few images, would magnify its rounding."""
    plain = float32(images, optimizer=replace(SGD, name=optimizer))
    plain = replace(plain, schedule=replace(plain.schedule, epochs=1, warmup_epochs=0))
    plain = replace(plain, data=replace(plain.data, global_batch_size=32, micro_batch_size=32))
    variants = {
        "plain": plain,
        "fused": replace(plain, optimizer=replace(plain.optimizer, fused=True)),
        "channels": replace(plain, backbone=replace(MINI, channels_last=False)),
    }
    for name, config in variants.items():
        train(config, tmp_path / name, quiet=True)
    before = create_backbone("mini", embedding_dim=16, image_size=16).state_dict()["fc.weight"]
    expected = final_tensors(tmp_path / "plain")["backbone/fc.weight"] - before
    for name in ("fused", "channels"):
        update = final_tensors(tmp_path / name)["backbone/fc.weight"] - before
        assert float((update - expected).norm()) < 2e-5 * float(expected.norm()), name
    train(variants["fused"], tmp_path / "fused", resume=True, quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["r18", "vit_t"])
def test_recomputed_activations_give_the_same_run(name: str, tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", ["a", "b", "c"], shots=4, size=32)
    curves = []
    for checkpointing in (False, True):
        config = float32(data, backbone=BackboneConfig(name, 16, checkpointing=checkpointing))
        config = replace(config, schedule=replace(config.schedule, epochs=3, warmup_epochs=0))
        train(config, tmp_path / str(checkpointing), quiet=True)
        curves.append(losses(tmp_path / str(checkpointing)))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert curves[0][0] != pytest.approx(curves[0][-1], rel=1e-3)


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_run(
    images: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[nn.Module] = []
    compile_eagerly = partial(torch.compile, backend="eager")  # no compiler is needed to test how it is joined in

    def compile_and_count(network: nn.Module) -> Any:
        compiled.append(network)
        return compile_eagerly(network)

    monkeypatch.setattr(torch, "compile", compile_and_count)
    train(float32(images, backbone=replace(MINI, compile=True)), tmp_path / "run", quiet=True)
    assert len(compiled) == 1
    expected, actual = final_tensors(plain), final_tensors(tmp_path / "run")
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        torch.testing.assert_close(value, actual[name], msg=name)


def test_identities_with_few_images_are_left_out_and_the_rest_renumbered(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", ["few", "many"], shots=3)
    write_images(folder, ["more"], shots=5)
    (folder / "few" / "0.png").unlink()
    source = SubsetSource(open_source(folder), 3)
    assert (source.num_classes, source.identities, len(source)) == (2, ["many", "more"], 8)
    assert source.labels().tolist() == [0] * 3 + [1] * 5
    assert Path(source.name(0)).parent.name == Path(source.read(0).name).parent.name == "many"
    with pytest.raises(InputError, match=r"No identity of .* has 6 images, the most is 5"):
        SubsetSource(open_source(folder), 6)
    nameless = SubsetSource(open_source(FIXTURES / "insightface"), 1)
    assert nameless.identities == [str(number) for number in range(8)]
    base = float32(folder)
    train(replace(base, data=replace(base.data, min_images=3)), tmp_path / "run", quiet=True)
    assert final_tensors(tmp_path / "run")["rows/centers"].shape == (2, 16)


def test_other_architectures_to_start_from_are_named(images: Path, plain: Path, tmp_path: Path) -> None:
    for backbone, difference in (
        (BackboneConfig("mini", 32, init=str(plain)), "embedding_dim 16, but this run has 32"),
        (BackboneConfig("r18", 16, init=str(plain)), "backbone mini, but this run has r18"),
        (BackboneConfig("mini", 16, init=str(tmp_path / "none")), "There is no "),
    ):
        with pytest.raises(InputError, match=difference):
            train(float32(images, backbone=backbone), tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"backbone": replace(MINI, freeze=["stem"])}, "backbone.freeze keeps layers as they start"),
        ({"backbone": replace(MINI, freeze=["stm"], init="run")}, "backbone.freeze names 'stm'"),
        ({"head": HeadConfig(conflict_as_zero_logit=True)}, "needs head.conflict_threshold"),
        ({"head": HeadConfig(margin_gradient="straight_through")}, "margin_gradient: the margin cosface has no option"),
        ({"head": HeadConfig(margin="none", margin_value=0.1)}, "the margin none has no option 'm'; it has none"),
        ({"head": HeadConfig(margin="adaface", margin_options=["hh=1"])}, "its options are m, h. Did you mean 'h'"),
        ({"head": HeadConfig(margin_options=["h"])}, "write options as name=value"),
        (
            {"head": HeadConfig(margin_value=0.3, margin_options=["m=0.3"])},
            "gives the margin's m a second",
        ),
        ({"head": HeadConfig(margin="subcenter", from_run="run")}, "head.from_run takes over one center a class"),
        ({"head": HeadConfig(sample_rate=[[0.5, 0.1], [0.4, 1.0]])}, "shares of head.sample_rate sum to 0.9, not to 1"),
        ({"head": HeadConfig(sample_rate=[[0.5, 0.0], [0.5, 1.0]])}, r"has \[0.5, 0.0\]; share and rate are above 0"),
        ({"head": HeadConfig(sample_rate=[[1.0, 1.1]])}, r"has \[1.0, 1.1\]"),
        ({"head": HeadConfig(sample_rate=[[1.5, 0.1], [-0.5, 1.0]])}, r"has \[1.5, 0.1\]"),
        ({"head": HeadConfig(sample_rate=[[1.0, math.nan]])}, r"has \[1.0, nan\]"),
        ({"head": HeadConfig(sample_rate=[[0.1]])}, "a list has pairs of share and rate"),
        ({"head": HeadConfig(sample_rate=[])}, "a list has pairs of share and rate"),
        ({"optimizer": OptimizerConfig(ema_decay=1.0)}, r"optimizer.ema_decay is 1.0"),
    ],
)
def test_impossible_combinations_are_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        check_config(tiny_config(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"backbone": BackboneConfig("r5O")}, "Did you mean 'r50'"),
        ({"backbone": replace(MINI, checkpointing=True)}, "does not take the option 'checkpointing'"),
        ({"head": HeadConfig(sample_rate=1.5)}, "head.sample_rate is 1.5"),
        ({"head": HeadConfig(scale=-1.0)}, "head.scale is -1.0"),
        ({"head": HeadConfig(conflict_threshold=2.0)}, "head.conflict_threshold is 2.0"),
        ({"head": HeadConfig(margin_value=-1.0)}, "head.margin cosface: CosFace's m is -1.0"),
    ],
)
def test_networks_are_refused_before_data_is_opened(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        train(tiny_config(tmp_path / "no data here", **changes), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "options", "margin"),
    [
        ("none", [], Margin()),
        ("arcface", ["m=0.3", "gradient=straight_through"], ArcFace(0.3, "straight_through")),
        ("combined", ["m1=1.35", "m2=0", "m3=0"], CombinedMargin(1.35, 0, 0)),
        ("adaface", ["h=0.5"], AdaFace(h=0.5)),
        ("magface", ["l_a=5", "u_a=1e2", "lambda_g=20"], MagFace(5, 100, lambda_g=20)),
        ("curricularface", [], CurricularFace()),
        ("elasticface", ["form=cos", "deviation=0.05"], ElasticFace("cos", deviation=0.05)),
        ("subcenter", ["sub_centers=2"], SubCenterArcFace(sub_centers=2)),
    ],
)
def test_margins_by_name_and_options(name: Any, options: list[str], margin: Margin) -> None:
    head = convert(list[str], f"[{','.join(options)}]")
    assert build_margin(HeadConfig(margin=name, margin_options=head)) == margin
    assert type(build_margin(HeadConfig(margin=name))) is type(margin)


def test_a_schedule_of_the_sample_rate_is_a_function_of_the_step() -> None:
    rate = convert(SampleRate, "[[0.75,0.1],[0.25,1]]")
    assert rate == [[0.75, 0.1], [0.25, 1.0]]
    assert convert(SampleRate, "0.2") == 0.2
    assert [rate_at(rate, step, 8) for step in range(9)] == [0.1] * 6 + [1.0] * 3
    assert rate_at(0.3, 5, 8) == 0.3
    assert describe_rate(rate) == "0.1 for 75 % of the steps, then 1"
    for text in ("[0.5,1]", "[[a,b]]", "[", "half", "[[[1],2]]"):
        with pytest.raises(ArgumentTypeError, match="is not a number, or a list such as"):
            convert(SampleRate, text)


@pytest.mark.parametrize(
    "head",
    [
        HeadConfig(margin="adaface", sampler="sweep", sample_rate=[[0.5, 0.5], [0.5, 1.0]], scale=16.0),
        HeadConfig(margin="curricularface", sampler="runs", sample_rate=0.5, scale=16.0, update="deferred"),
        HeadConfig(margin="elasticface", sample_rate=[[0.2, 0.3], [0.3, 1.0], [0.5, 0.3]], scale=16.0),
    ],
    ids=lambda head: head.margin,
)
def test_running_figures_samplers_and_rates_go_on_after_a_resume(
    head: HeadConfig, images: Path, tmp_path: Path
) -> None:
    """Interrupted before the rate changes, and after."""
    config = float32(images, head=head)
    config = replace(config, output=replace(config.output, checkpoint_every=1, log_every=1))
    train(config, tmp_path / "straight", quiet=True)
    sampled = losses(tmp_path / "straight", "sampled_classes")
    # More labels than a rate asks for are used all the same.
    assert min(sampled) < 8
    assert (max(sampled) == 8) == isinstance(head.sample_rate, list)
    steps = len(sampled)
    for step in (steps // 2 - 1, steps // 2 + 1):
        with interrupt_at(step):
            train(config, tmp_path / "resumed", resume=True, quiet=True)
    train(config, tmp_path / "resumed", resume=True, quiet=True)
    straight, resumed = final_tensors(tmp_path / "straight"), final_tensors(tmp_path / "resumed")
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
    states = [newest_state(tmp_path / name)["head"]["margin_state"] for name in ("straight", "resumed")]
    assert states[0] == states[1]
    assert bool(states[0]) == (head.margin != "elasticface")


def newest_state(root: Path) -> dict[str, Any]:
    (*_, newest) = sorted((root / "checkpoints").glob("step-*"))
    return Checkpoint(newest).state


def test_min_images_and_num_classes_contradict_each_other(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with pytest.raises(InputError, match=r"data.min_images renumbers the classes"):
        replace(config, data=replace(config.data, min_images=2, num_classes=5)).check()


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("optimizer.max_grad_norm", {"optimizer": replace(SGD, max_grad_norm=math.inf)}),
        ("head.margin_value", {"head": HeadConfig(margin_value=math.nan)}),
    ],
)
def test_what_a_checkpoint_could_not_hold_is_refused_at_the_start(key: str, change: dict[str, Any]) -> None:
    """YAML has .inf and .nan; the first checkpoint would fail for them."""
    with pytest.raises(InputError, match=rf"^{key} is (inf|nan); it must be a finite number\.$"):
        small_config(**change).check()


def test_batches_too_small_for_the_statistics_are_refused(images: Path, tmp_path: Path) -> None:
    base = float32(images)
    for data in (
        replace(base.data, global_batch_size=1),
        replace(base.data, global_batch_size=5, micro_steps=3),
    ):
        config = replace(base, data=data)
        with pytest.raises(InputError, match=r"leaves one of them 1 images at a time, but BatchNorm needs 2: take a"):
            train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    config = replace(base, data=replace(base.data, micro_steps=11))
    with pytest.raises(InputError, match=r"data\.micro_steps is 11, more than the 10 images"):
        train(config, tmp_path / "run", quiet=True)


def test_bf16_is_not_chosen_where_a_gpu_only_emulates_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert compute_dtype("auto", torch.device("cuda")) == torch.float32
