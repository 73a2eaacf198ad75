"""From photographs to decisions, and the same decisions by the program of others: every step as a user takes it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from command_line import run
from marked_photographs import package_file
from PIL import Image

from partialfc.faces.sets import write_pair_set, write_training_set
from partialfc.model.features import read_features

model_zoo = pytest.importorskip("insightface.model_zoo", reason="needs insightface 2.1 and what it imports")
SIZE, FMR = 112, 0.01


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on procedural faces, with thresholds measured on others."""
    folder = tmp_path_factory.mktemp("chain")
    write_training_set(folder / "train", identities=range(40), shots=6, size=SIZE)
    write_pair_set(folder / "pairs.bin", identities=range(1000, 1040), pairs=400, size=SIZE)
    options = ["--recipe=demo", "--epochs=4", "--batch-size=24", "--data.micro-batch-size=24", "--workers=0"]
    assert run("train", folder / "train", *options, "--out", folder / "run", "--device=cpu") == 0
    pairs = ["--benchmark", f"pairs={folder / 'pairs.bin'}"]
    assert run("evaluate", folder / "run", *pairs, "--write-thresholds") == 0
    return folder / "run"


@pytest.mark.slow
def test_photographs_are_aligned_embedded_verified_and_exported_and_insightface_decides_alike(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    astronaut = Image.open(package_file("scikit-image", "skimage/data/astronaut.png")).convert("RGB")
    astronaut.save(photographs / "astronaut.png")
    astronaut.rotate(20, Image.Resampling.BICUBIC).resize((400, 400)).save(photographs / "turned.jpg", quality=80)
    friends = package_file("insightface", "insightface/data/images/t1.jpg")
    (photographs / "friends.jpg").write_bytes(friends.read_bytes())
    crops = tmp_path / "crops"
    assert run("align", photographs, "--detector=mtcnn", "--faces=all", "--out", crops) == 0
    files = sorted(crops.glob("*.jpg"))
    assert len(files) == 8  # two of the astronaut, and six friends

    assert run("embed", model, crops, "--out", tmp_path / "features.parquet", "--workers=0") == 0
    features = read_features(tmp_path / "features.parquet")
    assert len(features.embeddings) == len(files)
    assert run("export", model, "--to", tmp_path / "model.onnx", "--for", "insightface", "--mirror") == 0
    client = model_zoo.get_model(str(tmp_path / "model.onnx"))
    theirs = np.concatenate(
        [client.get_feat([np.asarray(Image.open(file).convert("RGB"))[..., ::-1]]) for file in files]
    )
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    decisions = []
    for one, other in itertools.combinations(range(len(files)), 2):
        capsys.readouterr()
        status = run("verify", model, files[one], files[other], f"--fmr={FMR}", "--force", "--json")
        answer = json.loads(capsys.readouterr().out)
        assert status == (0 if answer["same"] else 1)
        cosine = float(theirs[one] @ theirs[other])
        assert cosine == pytest.approx(answer["score"], abs=1e-3)
        assert (cosine >= answer["threshold"]["cosine"]) == answer["same"]
        decisions.append(answer["same"])
    assert len(set(decisions)) == 2  # both occur
