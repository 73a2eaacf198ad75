"""What somebody plausibly types wrong, and the sentence that it gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import INSIGHTFACE, LFW, complaint

# Command: sentence. TMP is a folder with the files that `_files` writes, DATA a data set, LFW its benchmark.
MISTAKES = {
    # commands
    "tarin DATA": "there is no command 'tarin': partialfc has demo, train, … Did you mean 'train'?",
    "eval TMP": "there is no command 'eval': partialfc has demo, train, … Did you mean 'evaluate'?",
    "data inspekt DATA": "there is no command 'inspekt': partialfc data has inspect, … Did you mean 'inspect'?",
    # options
    "train DATA --learning-rate 0.1": "there is no option --learning-rate; … Did you mean '--lr 0.1'?",
    "train DATA --batch 64": "there is no option --batch; … Did you mean '--batch-size'?",
    "train DATA --network r50": "there is no option --network; … Did you mean '--backbone r50'?",
    "train DATA --num_epoch 5": "there is no option --num_epoch; … Did you mean '--epochs 5'?",
    "train DATA --eval x=LFW": "there is no option --eval; … Did you mean '--benchmark x=LFW'?",
    "train DATA -lr 0.1": "there is no option -lr; … Did you mean '--lr 0.1'?",
    "train DATA --schedule.lr 0.1": "there is no option --schedule.lr; … Did you mean '--lr 0.1'?",
    "train DATA -o x": "there is no option -o; … Did you mean '--out x'?",
    "train DATA --help-al": "there is no option --help-al; … Did you mean '--help-all'?",
    "train DATA --resume=yes": "--resume: it takes no value, and not 'yes'.",
    "train DATA --backbone=": "There is no backbone '': choose one of … mini.",
    "train DATA --output x": "there is no option --output; … Did you mean '--out x'?",
    "train DATA --Resume": "there is no option --Resume; … Did you mean '--resume'?",
    "train DATA --margin-value 0.3": "there is no option --margin-value; … Did you mean '--head.margin-value'?",
    "train DATA --head.sample_rte 0.1": "there is no option --head.sample_rte; … Did you mean '--head.sample-rate'?",
    "train DATA --gpus 8": "there is no option --gpus: start several processes with torchrun --nproc-per-node N …",
    "train DATA OTHER": "'OTHER' is one argument too many: see partialfc train --help.",
    "train DATA --data.path OTHER": "the data are given twice: leave out DATA or --data.path.",
    "train --benchmark LFW DATA": "DATA is missing; if it is DATA, write it before --benchmark.",
    "train": "data.path is missing: give the training images, as in `partialfc train DATA`.",
    "evaluate TMP LFW": "--benchmark missing: see partialfc evaluate --help.",
    "evaluate --benchmark LFW": "There is nothing to evaluate: give a model before --benchmark, …",
    # values
    "train DATA --backbone R5O": "There is no backbone 'R5O': choose one of … Did you mean 'r50'?",
    "train DATA --backbone ViT-B": "There is no backbone 'ViT-B': choose one of … Did you mean 'vit_b'?",
    "train DATA --recipe wf12m_r100": "There is no recipe 'wf12m_r100'; … Did you mean 'wf12m-r100-pfc0.05' or …",
    "train DATA --recipe wf42m-r20": "There is no recipe 'wf42m-r20'; … Did you mean 'wf42m-r200'?",
    "recipes webface99m": "There is no recipe 'webface99m'; `partialfc recipes` lists them.",
    "train DATA --epochs many": "--epochs/--schedule.epochs: 'many' is not a number.",
    "train DATA --head.margin arc": "--head.margin: 'arc' is not one of cosface, "
    "arcface, combined, adaface, magface, curricularface, elasticface, "
    "subcenter, none.",
    "train DATA --device gpu": "--device: 'gpu' is not one of auto, cpu, cuda.",
    "train DATA --batch-size 0": "data.global_batch_size is 0; it must be at least 1.",
    "train DATA --batch-size -8": "data.global_batch_size is -8; it must be at least 1.",
    "train DATA --data.micro-batch-size 0": "data.micro_batch_size is 0; it must be at least 1.",
    "evaluate TMP --benchmark LFW --batch-size 0": "--batch-size is 0: give a positive number.",
    "evaluate TMP --benchmark ../lfw=LFW": "benchmark name '../lfw' has a slash or begins with a dot; …",
    "train DATA --benchmark ..=LFW": "benchmark name '..' has a slash or begins with a dot; …",
    "train DATA --benchmark lfw": "benchmark 'lfw' is neither a path that exists nor NAME=PATH: …",
    # files
    "train DATA --config TMP/r50.py": "--config TMP/r50.py is a Python file, which is not run: …",
    "train DATA --config TMP/latin1.yaml": "--config TMP/latin1.yaml is not UTF-8 text (byte 7): save it as UTF-8.",
    "train DATA --config TMP/utf16.yaml": "--config TMP/utf16.yaml is not UTF-8 text (byte 0): save it as UTF-8.",
    "train DATA --config TMP/checkpoint.pt": "--config TMP/checkpoint.pt is a file of weights, no configuration: …",
    "train DATA --config TMP": "--config TMP is a folder: give a YAML file; …",
    "train DATA --config TMP/run": "--config TMP/run is a folder: give TMP/run/config.yaml.",
    "train DATA --config TMP/nowhere.yaml": "--config TMP/nowhere.yaml cannot be read: No such file or directory.",
    "train DATA --config TMP/key.yaml": "TMP/key.yaml: there is no option head.sampel_rate. … 'head.sample_rate'?",
    "train DATA --config TMP/section.yaml": "TMP/section.yaml: head is a section: write its options below it, …",
    "train DATA --config TMP/number.yaml": "TMP/number.yaml: there is no option 1.",
    "train DATA --config TMP/date.yaml": "TMP/date.yaml: seed: '\"2020-01-01\"' is not a whole number.",
    "train DATA --benchmark x=TMP": "Cannot read TMP: Is a directory; give a file of verification pairs.",
    "evaluate TMP/weights --benchmark LFW": "TMP/weights is no model folder but holds weights: give … model.pt.",
    "evaluate TMP/run --benchmark LFW": "TMP/run holds no model: …",
    "train DATA --out TMP/key.yaml": "TMP/key.yaml is a file: give another folder with --out.",
    "train DATA --out TMP": "TMP is not empty and holds no run: give another folder with --out.",
    "data faces --out TMP": "TMP exists already: remove it, or write somewhere else.",
    "evaluate TMP --benchmark LFW --out TMP/key.yaml": "TMP/key.yaml is a file: give a folder with --out.",
    "demo --out TMP": "TMP is not empty and holds no demo: give another folder with --out.",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mistakes")
    (root / "r50.py").write_text("config.network = 'r50'\n")
    (root / "latin1.yaml").write_bytes("# seed é\n".encode("latin-1"))
    (root / "utf16.yaml").write_bytes("seed: 1\n".encode("utf-16"))
    (root / "key.yaml").write_text("head: {sampel_rate: 0.1}\n")
    (root / "section.yaml").write_text("head:\n")
    (root / "number.yaml").write_text("1: 2\n")
    (root / "date.yaml").write_text("seed: 2020-01-01\n")
    torch.save({"state_dict_backbone": {}}, root / "checkpoint.pt")
    for name in ("weights/model.pt", "run/config.yaml"):
        (root / name).parent.mkdir()
        (root / name).write_bytes(b"")
    return root


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_gives_its_sentence(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"DATA": str(INSIGHTFACE), "LFW": str(LFW)}
    words = [given.get(word, word.replace("=LFW", f"={LFW}").replace("TMP", str(folder))) for word in command.split()]
    sentence = complaint(capsys, *words).removeprefix("partialfc: error: ")
    for path, name in ((str(folder), "TMP"), (str(INSIGHTFACE), "DATA"), (str(LFW), "LFW")):
        sentence = sentence.replace(path, name)
    parts = [part.strip() for part in MISTAKES[command].split("…")]
    assert sentence.startswith(parts[0])
    assert sentence.endswith(parts[-1])
    assert all(part in sentence for part in parts), sentence
