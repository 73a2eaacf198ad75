"""Published configuration files, written anew: converted or refused with the line, and never executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from partialfc.config.options import flatten
from partialfc.config.published import Conversion, convert_published, read_published
from partialfc.core.errors import InputError

HEAD = "from easydict import EasyDict as edict\n\nconfig = edict()\n"
BASE = (
    HEAD
    + """
# Margin
config.margin_list = (1.0, 0.5, 0.0)
config.network = "r50"
config.resume = False
config.save_all_states = False
config.output = "ms1mv3_arcface_r50"
config.embedding_size = 512
config.sample_rate = 1
config.interclass_filtering_threshold = 0
config.fp16 = False
config.batch_size = 128
config.optimizer = "sgd"
config.lr = 0.1
config.momentum = 0.9
config.weight_decay = 5e-4
config.verbose = 2000
config.frequent = 10
config.dali = False
config.dali_aug = False
config.gradient_acc = 1
config.seed = 2048
config.num_workers = 2
config.wandb_key = "XXXX"
config.suffix_run_name = None
config.using_wandb = False
config.wandb_entity = "entity"
config.wandb_project = "project"
config.wandb_log_all = True
config.save_artifacts = False
config.wandb_resume = False
"""
)
DATA = """
config.rec = "/train_tmp/set"
config.num_classes = 93431
config.num_image = 5179510
config.num_epoch = 20
config.warmup_epoch = 0
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]
"""


def convert(folder: Path, text: str, *, base: str | None = BASE, compatible: bool = False) -> Conversion:
    if base is not None:
        (folder / "base.py").write_text(base)
    (folder / "job.py").write_text(text)
    return convert_published(read_published(folder / "job.py"), world_size=8, compatible=compatible)


ARCFACE = {"head.margin": "arcface", "head.margin_value": 0.5}
COSFACE = {"head.margin": "cosface", "head.margin_value": 0.4}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ('config.network = "r50"', {"backbone.name": "r50", **ARCFACE, "data.global_batch_size": 1024}),
        ('config.network = "r18"; config.lr = 0.02', {"backbone.name": "r18", "optimizer.lr": 0.02}),
        ('config.network = "r34"\nconfig.seed = 7', {"backbone.name": "r34", "seed": 7}),
        ('config.network = "r100"\nconfig.fp16 = True', {"backbone.name": "r100", "precision": "float16"}),
        ('config.network = "r200"\nconfig.verbose = 5000', {"backbone.name": "r200", "output.evaluate_every": 5000}),
        (
            'config.network = "mbf"\nconfig.weight_decay = 1e-4\nconfig.num_epoch = 40',
            {"backbone.name": "mbf", "optimizer.weight_decay": 1e-4, "schedule.epochs": 40.0},
        ),
        ('config.network = "mbf_large"\nconfig.num_workers = 6', {"backbone.name": "mbf_large", "data.workers": 6}),
        (
            "config.margin_list = (1.0, 0.0, 0.4)\nconfig.sample_rate = 0.2\nconfig.dali = True\nconfig.output = None",
            {**COSFACE, "head.sample_rate": 0.2, "head.unsampled": "freeze"},
        ),
        (
            "config.margin_list = (1.0, 0.0, 0.4)\nconfig.interclass_filtering_threshold = 0.4",
            {"head.conflict_threshold": 0.4, "head.conflict_as_zero_logit": False},
        ),
        ("config.margin_list = (1.0, 0.0, 0.0)", {"head.margin": "none", "head.margin_value": None}),
        (
            "config.batch_size = 256\nconfig.gradient_acc = 2\nconfig.warmup_epoch = 2",
            {"data.global_batch_size": 4096, "data.micro_batch_size": 256, "schedule.warmup_epochs": 2.0},
        ),
        (
            'config.network = "vit_t_dp005_mask0"\nconfig.optimizer = "adamw"\nconfig.lr = 0.001',
            {
                "backbone.name": "vit_t",
                "backbone.drop_path": 0.05,
                "backbone.mask_ratio": 0.0,
                "optimizer.name": "adamw",
            },
        ),
        ('config.network = "vit_s_dp005_mask_0"', {"backbone.name": "vit_s", "backbone.checkpointing": False}),
        (
            'config.network = "vit_b_dp005_mask_005"\nconfig.weight_decay = 0.1',
            {"backbone.mask_ratio": 0.1, "backbone.checkpointing": True, "optimizer.weight_decay": 0.1},
        ),
        ('config.network = "vit_l_dp005_mask_005"', {"backbone.name": "vit_l", "backbone.drop_path": 0.05}),
        (
            "config.margin_list = (1.0, 0.3, 0.2)",
            {"head.margin": "combined", "head.margin_options": ["m1=1.0", "m2=0.3", "m3=0.2"]},
        ),
        ('config.network = "vit_h"', {"backbone.name": "vit_h", "backbone.drop_path": 0.0, "backbone.mask_ratio": 0.0}),
        ("config.num_classes = 300 * 10000\nconfig.lr = 0.1 * config.batch_size / 512", {"optimizer.lr": 0.025}),
        (
            'config.loss = "cosface"\nconfig.warmup_epoch = -1',
            {"head.margin": "cosface", "schedule.warmup_epochs": 0.0},
        ),
        ("config.using_wandb = True\nconfig.frequent = 50", {"output.wandb": "online", "output.log_every": 50}),
        ('"""About."""\nconfig.embedding_size = 256', {"backbone.embedding_dim": 256, "data.path": "/train_tmp/set"}),
    ],
)
def test_twenty_files_are_converted(tmp_path: Path, lines: str, expected: dict[str, Any]) -> None:
    conversion = convert(tmp_path, f"{HEAD}{DATA}{lines}\n")
    values = flatten(conversion.config.to_dict())
    assert {key: values[key] for key in expected} == expected
    assert values["optimizer.lr_scaling"] == "absolute"
    assert conversion.benchmarks == ["lfw", "cfp_fp", "agedb_30"]


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    conversion = convert(
        tmp_path, f'{HEAD}{DATA}config.dali = True\nconfig.batchsize = 3\nconfig.optim = {{"lr": 3}}\n'
    )
    notes = "\n".join(conversion.notes)
    assert "config.dali (job.py:11) has no meaning here: images are decoded" in notes
    assert "config.num_image (job.py:7) has no meaning here: the images are counted" in notes
    assert "config.batchsize (job.py:12) is not known and was left out. Did you mean 'batch_size'?" in notes
    assert "config.optim (job.py:13) is not known" in notes


def test_the_published_behaviour_is_an_option(tmp_path: Path) -> None:
    lines = f"{HEAD}{DATA}config.sample_rate = 0.1\nconfig.interclass_filtering_threshold = 0.4\n"
    expected = {"unsampled": "lazy_dense", "margin_gradient": "straight_through", "conflict_as_zero_logit": True}
    ours, theirs = (convert(tmp_path, lines, compatible=flag) for flag in (False, True))
    for name, value in expected.items():
        assert getattr(theirs.config.head, name) == value != getattr(ours.config.head, name)
        assert f"head.{name} {str(value).lower()}" in ours.notes[0]
    assert ours.notes[0].endswith("(not set; --compat insightface sets it)")


def test_files_extend_others(tmp_path: Path) -> None:
    (tmp_path / "middle.py").write_text('from configs.base import config\nconfig.network = "r34"\nconfig.lr = 0.3\n')
    config = convert(tmp_path, f"from .middle import config\nconfig.lr = 0.2\n{DATA}").config
    assert (config.backbone.name, config.optimizer.lr, config.head.margin) == ("r34", 0.2, "arcface")
    alone = convert(tmp_path / "..", f"{HEAD}{DATA}", base=None).config
    assert (alone.backbone.name, alone.seed, alone.head.sample_rate) == ("r50", 2048, 1.0)
    with pytest.raises(InputError, match=r"line 1, `from configs.lost import config`, extends lost.py, which is not"):
        convert(tmp_path, "from configs.lost import config\n")
    (tmp_path / "circle.py").write_text("from .job import config\n")
    with pytest.raises(InputError, match="too many steps"):
        convert(tmp_path, "from .circle import config\n")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("import os", "no assignment"),
        ("from os import system as config", "no assignment"),
        ("config.lr = open('ran', 'w')", "no literal"),
        ("config.lr = __import__('os').system('touch ran')", "no literal"),
        ("config.lr = config.__class__.__mro__[1]", "no literal"),
        ("config.__class__ = 3", "attribute of config"),
        ("config = __import__('os')", "attribute of config"),
        ("other = edict()", "does not assign to config"),
        ("other.lr = 1", "attribute of config"),
        ("config['lr'] = 1", "attribute of config"),
        ("config.lr *= 2", "no assignment"),
        ("if True: config.lr = 1", "no assignment"),
        ("for config.lr in (1, 2): pass", "no assignment"),
        ("class config: lr = 1", "no assignment"),
        ("config.lr = f'{open}'", "no literal"),
        ("config.lr = [x for x in ()]", "no literal"),
        ("config.lr = (lambda: 1)()", "no literal"),
        ("config.lr = 9 ** 9 ** 9", "no literal"),
        ("config.lr = 'x' * 1000000000", "no literal and no arithmetic"),
        ("config.lr = 1e17 * 1e17", "beyond 1e.18"),
        ("config.lr = 1 / 0", "no finite value"),
        ("config.a = [config.rec]", "no arithmetic of numbers"),
        ("config.lr = " + "[" * 20 + "]" * 20, "nested too deeply"),
        ("config.lr = " + "+".join("1" * 50), "nested too deeply"),
        ("config.lr = ...", "no literal"),
    ],
)
def test_lines_that_are_no_literals_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf"job\.py is read without being run.*line 11, `.*{reason}"):
        convert(tmp_path, f"{HEAD}{DATA}{line}\n")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text",
    [
        "config.a = " + "[" * 30_000,
        "config.a = " + "-" * 60_000 + "1",
        "a" + ".a" * 30_000,
        "x = 1\0",
        "#" * 70_000,
        "a b",
    ],
)
def test_bombs_and_broken_files_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"job\.py"):
        convert(tmp_path, text)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('config.network = "r2060"', r"config.network \(job.py:11\) is 'r2060', which is no network here"),
        ("config.margin_list = (1.0, 0.3)", r"config.margin_list \(job.py:11\) is .* no list of three numbers"),
        ('config.optimizer = "lamb"', r"config.optimizer \(job.py:11\) is 'lamb', and the optimizers here"),
        ('config.lr = "fast"', r"config.lr \(job.py:11\) is 'fast', which is no float"),
        ("config.sample_rate = None", r"config.sample_rate \(job.py:11\) is None, which is no float"),
        ('config.loss = "softmax"', r"config.loss \(job.py:11\)"),
        ("config.num_epoch = 0", "converted configuration is refused: schedule.epochs is 0"),
    ],
)
def test_values_that_nothing_computes_are_refused(tmp_path: Path, line: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        convert(tmp_path, f"{HEAD}{DATA}{line}\n")
