"""Exports: what other programs read computes what the model does, and what they would misread is not written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command_line import complaint, run
from trained_models import DRAWINGS, PHOTOGRAPHS, noise, write_model

from partialfc import create_backbone, load_model
from partialfc.model.config import ModelConfig
from partialfc.model.contract import contract_of
from partialfc.model.features import read_features
from partialfc.model.files import save_model
from partialfc.use import insightface
from partialfc.use.graph import compare

onnx = pytest.importorskip("onnx", reason="needs partialfc[export]")
pytest.importorskip("onnxscript", reason="needs partialfc[export]")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "model", size=112, mean=0.4, std=0.3, color_order="bgr")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", mean=0.4, std=0.3, color_order="bgr")


@pytest.fixture(scope="module")
def graph(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graphs") / "model.onnx"
    assert run("export", model, "--to", path, "--for", "insightface", "--check", "mfr", "--json") == 0
    return path


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small model, and its graph with mirroring and weights in float16."""
    folder = tmp_path_factory.mktemp("half")
    small = write_model(folder / "model", trained_on=DRAWINGS)
    assert run("export", small, "--to", folder / "half.onnx", "--weights", "float16", "--mirror") == 0
    return small, folder / "half.onnx"


@pytest.mark.slow
def test_a_graph_computes_what_the_model_does(model: Path, graph: Path) -> None:
    ours, theirs = load_model(model), load_model(graph)
    assert contract_of(theirs) == f"{contract_of(ours)}:onnx-float32"
    assert contract_of(theirs.with_flip(False)) != contract_of(theirs)
    assert theirs.config.trained_on == ours.config.trained_on
    for count in (1, 3, 64):
        images = np.stack([noise(seed, size=112) for seed in range(count)])
        cosine = torch.nn.functional.cosine_similarity(ours.embed(images), theirs.embed(images))
        assert float(cosine.min()) >= 0.99999
    description = onnx.load(graph)
    onnx.checker.check_model(description)
    [image], [embedding] = description.graph.input, description.graph.output
    sides = [side.dim_value or side.dim_param for side in image.type.tensor_type.shape.dim]
    assert sides == ["batch", 3, 112, 112]
    assert image.type.tensor_type.elem_type == embedding.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


@pytest.mark.slow
def test_weights_in_float16_and_mirroring_in_the_graph(half: tuple[Path, Path]) -> None:
    ours, theirs = load_model(half[0]), load_model(half[1])
    assert theirs.config.saw_only_procedural
    assert not theirs.config.flip  # the graph has mirrored already
    assert contract_of(theirs) == f"{contract_of(ours)}:onnx-float16"
    images = np.stack([noise(seed) for seed in range(5)])
    found, expected = theirs.embed(images), ours.embed(images)
    cosine = torch.nn.functional.cosine_similarity(found, expected)
    assert 0.9995 <= float(cosine.min()) < 1 - 1e-9
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)  # f(x) + f(mirrored x), not twice that
    initializers = onnx.load(half[1]).graph.initializer
    kinds = {tensor.data_type for tensor in initializers if len(tensor.dims) > 1}
    assert kinds == {onnx.TensorProto.FLOAT16}


@pytest.mark.slow
def test_the_features_of_an_export_are_those_of_its_model(
    half: tuple[Path, Path], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from partialfc.data.images import encode_png

    for seed in range(2):
        (tmp_path / f"{seed}.png").write_bytes(encode_png(noise(seed)))
    out = tmp_path / "features.npy"
    assert run("embed", half[1], tmp_path, "--out", out, "--workers", 0) == 0
    assert len(read_features(out, contract_of(load_model(half[0]))).embeddings) == 2
    # The thresholds of the model are those of its export, and of no other model's.
    verify = ("verify", half[1], tmp_path / "0.png", tmp_path / "0.png", "--force", "--thresholds")
    assert run(*verify, half[0] / "thresholds.json") == 0
    capsys.readouterr()
    assert "another model" in complaint(capsys, *verify, model / "thresholds.json")


def test_the_comparison_fails_where_the_graph_differs() -> None:
    images = torch.randn(8, 3, 4, 4)
    flatten = torch.nn.Flatten()
    assert compare(flatten, flatten, images, 0.99999, "It").cosine == pytest.approx(1)
    with pytest.raises(RuntimeError, match=r"It does not compute what the model does: cosine 0\.9"):
        compare(flatten, lambda part: flatten(part) + 0.3, images, 0.99999, "It")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="cosine nan"):
        compare(flatten, lambda part: flatten(part) * torch.nan, images, 0.99999, "It")  # type: ignore[arg-type]


def test_a_failed_check_leaves_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("partialfc.use.export.LEAST_COSINE", {"float32": 1.1})
    assert run("export", tiny, "--to", tmp_path / "hub", "--for", "hub") == 1
    assert "does not compute what the model does" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# -- insightface -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_immich_and_deepface_get_what_they_demand(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = tmp_path / "wide"
    save_model(wide, create_backbone("mini", embedding_dim=512), ModelConfig("mini", 512, trained_on=PHOTOGRAPHS))
    for target, to, place in (
        ("immich", tmp_path / "immich", tmp_path / "immich" / "recognition" / "model.onnx"),
        ("deepface", tmp_path / "webface_r50.onnx", tmp_path / "webface_r50.onnx"),
    ):
        assert target in complaint(capsys, "export", model, "--to", to, "--for", target)  # of 8 numbers
        assert run("export", wide, "--to", to, "--for", target) == 0
        network = load_model(place)
        assert (network.config.image_size, network.config.embedding_dim) == (112, 512)
        notes = " ".join(capsys.readouterr().out.split())
        assert "takes the place of" in notes or "does not carry over" in notes


def normalising(graph: Path, path: Path, names: tuple[str, str], *, divide: bool = False) -> Path:
    """The graph behind nodes that normalise pixels themselves."""
    content = onnx.load(graph)
    node = onnx.helper.make_node
    constants = {"mean": 127.5, "factor": 127.5 if divide else 1 / 127.5}
    content.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.float32(value), name) for name, value in constants.items()
    )
    nodes = [node("Sub", ["pixels", "mean"], ["centred"], name=names[0])]
    nodes += [node("Div" if divide else "Mul", ["centred", "factor"], ["images"], name=names[1])]
    content.graph.input[0].name = "pixels"
    for place, one in enumerate(nodes):
        content.graph.node.insert(place, one)
    onnx.save(content, path)
    return path


@pytest.mark.slow
def test_a_graph_that_would_be_normalised_twice_is_refused(
    graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden = normalising(graph, tmp_path / "hidden.onnx", ("node_1", "node_2"))
    divided = normalising(graph, tmp_path / "divided.onnx", ("Sub_0", "Div_1"), divide=True)
    named = normalising(graph, tmp_path / "named.onnx", ("Sub_0", "Mul_1"))
    found = [insightface.normalises(path) for path in (graph, hidden, divided, named)]
    assert found == [False, True, True, True]
    for path in (hidden, divided):
        capsys.readouterr()
        arguments = ("export", path, "--for", "insightface", "--to")
        for name in ("out.onnx", "recognizer.onnx"):  # the latter is the name in a package
            assert "would do so again" in complaint(capsys, *arguments, tmp_path / name)
        assert run(*arguments, tmp_path / f"{path.stem}-package") == 0
        manifest = json.loads((tmp_path / f"{path.stem}-package" / "manifest.json").read_text())
        assert manifest["tasks"]["recognition"]["preprocessing"] == "embedded"
    assert run("export", named, "--for", "insightface", "--to", tmp_path / "plain.onnx") == 0
    # The other way round: names that say so, in a graph that does not.
    capsys.readouterr()
    content = onnx.load(graph)
    content.graph.node[0].name, content.graph.node[1].name = "Sub_conv", "Mul_conv"
    onnx.save(content, tmp_path / "misnamed.onnx")
    out = tmp_path / "out.onnx"
    said = complaint(capsys, "export", tmp_path / "misnamed.onnx", "--for", "insightface", "--to", out)
    assert "insightface would not normalise" in said
    assert not out.exists()


@pytest.mark.slow
def test_the_server_gets_its_manifest_and_a_detector(
    graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("export", graph, "--for", "insightface-server", "--to", tmp_path / "server", "--name", "My faces")
    assert "needs the detector" in complaint(capsys, *arguments)
    assert "is no .onnx file" in complaint(capsys, *arguments, "--detector", tmp_path / "none.onnx")
    assert run(*arguments, "--detector", graph) == 0
    manifest = json.loads((tmp_path / "server" / "manifest.json").read_text())
    assert manifest == {
        "manifest_version": 1,
        "model_id": "My-faces",
        "model_version": contract_of(load_model(graph))[:12],
        "display_name": "My faces",
        "files": {"detector": "detector.onnx", "recognizer": "recognizer.onnx"},
        "recognition": {
            "input_size": [112, 112],
            "embedding_dimension": 8,
            "preprocessing": "insightface-arcface-1",
        },
        "license": "MODEL.LICENSE",
    }
    assert {path.name for path in (tmp_path / "server").iterdir()} >= set(manifest["files"].values())


@pytest.mark.slow
def test_the_client_of_insightface_computes_the_same(model: Path, graph: Path, tmp_path: Path) -> None:
    model_zoo = pytest.importorskip("insightface.model_zoo", reason="needs insightface 2.1")
    package = tmp_path / "package"
    assert run("export", graph, "--for", "insightface", "--to", package) == 0
    images = np.stack([noise(seed, size=112) for seed in range(100)])
    expected = load_model(model).with_flip(False)
    clients = {
        "plain": model_zoo.get_model(str(graph)),
        "package": model_zoo.get_model(str(package), model_task="recognition"),
    }
    embeddings = torch.cat([torch.nn.functional.normalize(expected.embed(images))])
    for name, client in clients.items():
        found = torch.from_numpy(client.get_feat([np.ascontiguousarray(one[..., ::-1]) for one in images]))  # BGR
        cosine = (torch.nn.functional.normalize(found) * embeddings).sum(1)
        assert float(cosine.min()) >= 0.9999, name


# -- weights and the hub -----------------------------------------------------------------------------------------------

RESULTS: dict[str, Any] = {
    "kind": "ijb-1:1",
    "figures": {
        "tar@far=1e-6": {"value": 0.912345678, "low": 0.90, "high": 0.92},
        "tar@far=1e-5": {"value": 0.95, "low": 1e-05, "high": 0.96},
        "african/fnmr@fmr=1e-3": {"value": 0.02, "low": 0.01, "high": 0.03},
        "accuracy": {"value": 0.9983, "low": 0.9976, "high": 0.9989},
        "tar@far=1e-7": {"value": None, "low": None, "high": None, "reason": "cannot resolve"},
    },
}


def test_a_hub_folder_survives_the_hub(tiny: Path, tmp_path: Path) -> None:
    contract = contract_of(load_model(tiny))
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"schema_version": 1, "contract": contract, "benchmarks": {"ijbc": RESULTS}}))
    folder = tmp_path / "my-model"
    assert run("export", tiny, "--for", "hub", "--to", folder, "--results", results) == 0
    config = json.loads((folder / "config.json").read_text())
    expected = {"template", "color_order", "mean", "std", "image_size", "flip", "contract", "trained_on"}
    assert expected <= config.keys()
    assert config["contract"] == contract == contract_of(load_model(folder))
    assert load_model(folder).verify(noise(0), noise(0)).is_same
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "ms1mv3 (93,431 identities" in text
    measured = {name: figure for name, figure in RESULTS["figures"].items() if figure["value"] is not None}
    metrics = yaml.safe_load(text.split("---\n")[1])["model-index"][0]["results"][0]["metrics"]
    assert {metric["type"]: metric["value"] for metric in metrics} == {
        name: figure["value"] for name, figure in measured.items()
    }
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")
    card = hub.ModelCard.load(folder / "README.md")
    card.save(folder / "README.md")  # through the library and back
    again = {result.metric_type: result for result in hub.ModelCard.load(folder / "README.md").data.eval_results}
    assert again.keys() == measured.keys()
    for name, figure in measured.items():
        rate = {"tar@far=1e-6": {"far": 1e-6}, "tar@far=1e-5": {"far": 1e-5}, "african/fnmr@fmr=1e-3": {"fmr": 1e-3}}
        assert again[name].metric_value == figure["value"]
        assert again[name].metric_args == {**rate.get(name, {}), "low": figure["low"], "high": figure["high"]}
        assert again[name].dataset_name == "ijbc"


def test_one_file_of_weights_keeps_its_configuration(tiny: Path, tmp_path: Path) -> None:
    assert run("export", tiny, "--for", "safetensors", "--to", tmp_path / "a.safetensors") == 0
    assert load_model(tmp_path / "a.safetensors").config == load_model(tiny).config
    assert contract_of(load_model(tmp_path / "a.safetensors")) == contract_of(load_model(tiny))


@pytest.mark.slow
def test_a_card_of_drawings_says_so(half: tuple[Path, Path], tmp_path: Path) -> None:
    assert run("export", half[0], "--for", "hub", "--to", tmp_path / "hub") == 0
    assert "It decides nothing" in (tmp_path / "hub" / "README.md").read_text()


@pytest.mark.slow
def test_what_is_refused(
    model: Path, graph: Path, half: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corrupt = tmp_path / "corrupt.onnx"
    corrupt.write_bytes(graph.read_bytes()[:1000])
    foreign = tmp_path / "results.json"
    foreign.write_text(json.dumps({"contract": "0" * 64, "benchmarks": {}}))
    (tmp_path / "several.json").write_text(json.dumps({"models": {}}))
    stale = tmp_path / "stale"
    shutil.copytree(model, stale)
    shutil.copy(half[0] / "thresholds.json", stale)
    new = tmp_path / "new"
    for arguments, sentence in {
        (model, "--to", graph): "exists already",
        (model, "--to", tmp_path / "no" / "a.onnx"): "There is no folder",
        (corrupt, "--to", new): "no ONNX file that onnxruntime runs",
        (model, "--to", new): "give a name that ends in .onnx",
        (model, "--to", new, "--for", "safetensors"): "give a name that ends in .safetensors",
        (graph, "--to", new): "is an ONNX file already",
        (graph, "--to", new, "--for", "insightface", "--mirror"): "is copied as it is",
        (half[1], "--to", new, "--for", "insightface"): "takes images of 16 pixels",
        (half[0], "--to", tmp_path / "b.onnx", "--check", "mfr"): "has 16 and 8: choose another model",
        (model, "--to", new, "--check", "mfr", "--weights", "float16"): "MFR is in float32",
        (model, "--to", new, "--check", "mfr", "--for", "hub"): "a submission is one .onnx file",
        (model, "--to", new, "--for", "hub", "--mirror"): "--mirror does not go with --for hub",
        (model, "--to", new, "--for", "hub", "--results", foreign): "results of another model",
        (model, "--to", new, "--for", "hub", "--results", tmp_path / "several.json"): "no results of one model",
        (stale, "--to", new, "--for", "hub"): "was measured with another model",
    }.items():
        assert sentence in complaint(capsys, "export", *arguments), arguments
    assert not new.exists()
