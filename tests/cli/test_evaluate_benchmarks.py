"""`partialfc evaluate` on every kind of benchmark, on models and on stored features, and what it refuses."""

from __future__ import annotations

import csv
import json
import lzma
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import LFW, complaint, run

from partialfc.backbones import create_backbone
from partialfc.data.images import encode_jpeg
from partialfc.data.pair_files import read_pairs
from partialfc.model.config import ModelConfig
from partialfc.model.contract import contract_of
from partialfc.model.features import write_features
from partialfc.model.files import load_model, save_model

PEOPLE = {"ann": 3, "bob": 2, "cem": 4, "dora": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    backbone = create_backbone("mini", embedding_dim=16, image_size=112)
    save_model(folder, backbone, ModelConfig("mini", 16))
    return folder


def write_people(folder: Path, people: dict[str, int], size: int = 112) -> Path:
    generator = np.random.default_rng(sum(map(len, people)))
    for name, count in people.items():
        (folder / name).mkdir(parents=True)
        base = generator.integers(0, 255, (4, 4, 3))
        for number in range(count):
            noisy = np.clip(base + generator.normal(0, 20, base.shape), 0, 255).astype(np.uint8)
            image = noisy.repeat(size // 4, axis=0).repeat(size // 4, axis=1)
            (folder / name / f"{number}.jpg").write_bytes(encode_jpeg(image))
    return folder


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert run("evaluate", *arguments, "--json", "--workers", 0) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def write_csv(path: Path, rows: Sequence[Sequence[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_a_verification_file_has_all_figures(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    result = evaluated(capsys, model, "--benchmark", LFW)["benchmarks"]["lfw"]
    assert result["kind"] == "pairs"
    assert {"accuracy", "tar@far=1e-4", "tar@far=0.1", "eer", "auc", "cllr", "min-cllr"} <= result["figures"].keys()
    accuracy = result["figures"]["accuracy"]
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert result["figures"]["tar@far=1e-4"]["value"] is None
    assert "cannot resolve" in result["figures"]["tar@far=1e-4"]["reason"]


def test_all_pairs_of_people_and_of_a_list_agree(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    people = write_people(tmp_path / "people", PEOPLE)
    rows = [[f"people/{name}/{number}.jpg", name, "", 0] for name, count in PEOPLE.items() for number in range(count)]
    listed = write_csv(tmp_path / "list.csv", [["path", "identity", "group", "mask"], *rows])
    found = evaluated(capsys, model, "--benchmark", f"own={people}", f"mfr={listed}", "--out", tmp_path / "out")
    own, mfr = found["benchmarks"]["own"], found["benchmarks"]["mfr"]
    genuine, images = sum(n * (n - 1) // 2 for n in PEOPLE.values()), sum(PEOPLE.values())
    for result in (own, mfr):
        assert (result["genuine_pairs"], result["impostor_pairs"]) == (
            genuine,
            images * (images - 1) // 2 - genuine,
        )
    # The images are shared: they are embedded once.
    (stored,) = (tmp_path / "out").glob("features-*.npy")
    assert len(np.load(stored)) == images
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == {"schema_version": 1, **found}
    again = evaluated(capsys, model, "--embeddings", stored, "--benchmark", f"own={people}")
    assert again["verified"] is True
    assert again["benchmarks"]["own"] == own


def test_an_unreadable_image_is_a_failure_to_enrol(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    people = write_people(tmp_path / "people", PEOPLE)
    (people / "bob" / "0.jpg").write_bytes(b"no image")
    result = evaluated(capsys, model, "--benchmark", f"own={people}")["benchmarks"]["own"]
    assert result["figures"]["fte"]["value"] == pytest.approx(0.1)
    assert result["failures"] == 1


def test_one_in_a_gallery(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    write_people(tmp_path / "set" / "gallery", {"ann": 2, "bob": 1, "cem": 1})
    write_people(tmp_path / "set" / "probe", {"ann": 1, "bob": 2})
    write_people(tmp_path / "set" / "unknown", {"zoe": 100})
    result = evaluated(capsys, model, "--benchmark", tmp_path / "set")["benchmarks"]["set"]
    assert result["kind"] == "1:n"
    assert (result["mated"], result["non_mated"]) == (3, 100)
    assert result["figures"]["rank-5"]["value"] == 1.0
    assert result["figures"]["tpir@fpir=0.01"]["value"] is not None


def test_rank_1_among_distractors_is_a_figure_of_its_own(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    for part, people in {"gallery": {"ann": 2, "bob": 1}, "probe": {"ann": 1, "bob": 2}}.items():
        write_people(tmp_path / "set" / part, people)
    alone = evaluated(capsys, model, "--benchmark", tmp_path / "set")["benchmarks"]["set"]
    # The very images of the probes, as distractors, are ahead of everybody.
    shutil.copytree(tmp_path / "set" / "probe", tmp_path / "set" / "distractors")
    among = evaluated(capsys, model, "--benchmark", tmp_path / "set")["benchmarks"]["set"]
    assert among["distractors"] == 3
    assert among["figures"].pop("distractors/rank-1")["value"] == 0.0
    assert among["figures"] == alone["figures"]
    assert alone["figures"]["rank-1"]["value"] > 0


def test_the_person_in_a_gallery_is_the_folder_below_it(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    for part, people in {"gallery": {"ann": 2, "bob": 1}, "probe": {"ann": 1, "bob": 2}, "unknown": {"ann": 1}}.items():
        write_people(tmp_path / "set" / part, people)
    flat = evaluated(capsys, model, "--benchmark", tmp_path / "set")["benchmarks"]["set"]
    assert (flat["gallery"]["identities"], flat["mated"], flat["non_mated"]) == (2, 3, 1)
    for number, person in enumerate(sorted((tmp_path / "set").glob("*/*"))):
        person.rename(tmp_path / "inner")
        (person / f"day {number % 2}").parent.mkdir()
        (tmp_path / "inner").rename(person / f"day {number % 2}")
    deep = evaluated(capsys, model, "--benchmark", tmp_path / "set")["benchmarks"]["set"]
    assert deep["figures"] == flat["figures"]


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_stored_features_are_found_by_their_names(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, suffix: str
) -> None:
    """Whatever their order, and if the set has moved."""
    for part, names in {
        "gallery": ("ann", "ann-lena", "bob"),
        "probe": ("ann", "ann-lena"),
        "distractors": ("z",),
    }.items():
        write_people(tmp_path / "set" / part, dict.fromkeys(names, 2))
    wanted = evaluated(capsys, model, "--benchmark", tmp_path / "set")["benchmarks"]["set"]
    features = tmp_path / f"features{suffix}"
    assert run("embed", model, tmp_path / "set", "--out", features, "--workers", 0) == 0
    capsys.readouterr()
    (tmp_path / "set").rename(tmp_path / "moved")
    found = evaluated(capsys, "--embeddings", features, "--benchmark", f"set={tmp_path / 'moved'}")["benchmarks"]["set"]
    assert found == wanted
    images = sorted(tmp_path.glob("moved/*/*/*.jpg"), reverse=True)
    rows = [[image.relative_to(tmp_path), image.parent.name, "", 0] for image in images]
    listed = write_csv(tmp_path / "list.csv", [["path", "identity", "group", "mask"], *rows])
    direct = evaluated(capsys, model, "--benchmark", listed)["benchmarks"]["list"]
    assert evaluated(capsys, "--embeddings", features, "--benchmark", listed)["benchmarks"]["list"] == direct
    write_people(tmp_path / "moved" / "probe", {"late": 1})
    said = complaint(capsys, "evaluate", "--embeddings", features, "--benchmark", tmp_path / "moved", "--json")
    assert "has no row for 1 of 13 images, first" in said
    assert "probe/late/0.jpg" in said


def test_pairs_of_a_file_whose_images_failed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A genuine pair is a non-match; an impostor pair was not compared."""
    people = write_people(tmp_path / "people", {f"p{number}": 2 for number in range(20)})
    pairs = tmp_path / "pairs.bin"
    assert run("data", "pairs", people, "--out", pairs, "--pairs", 40) == 0
    is_same = read_pairs(pairs).is_same
    features = np.tile(np.eye(2, dtype=np.float32)[0], (80, 1))
    features[1::2][~is_same] = [0.0, 1.0]
    capsys.readouterr()
    for kind, count, figures in (
        (True, 4, {"accuracy": 0.9, "tar@far=0.1": 0.8, "fte": 0.05}),
        (False, 4, {"accuracy": 1.0, "tar@far=0.1": 1.0, "fte": 0.05}),
    ):  # each of 40 pairs, 20 of either kind
        lost = 2 * np.flatnonzero(is_same == kind)[:count]
        rows = features.copy()
        rows[lost] = 0
        write_features(tmp_path / "features.npy", rows, "c" * 64, mirrored=False, failed=lost.tolist())
        result = evaluated(capsys, "--embeddings", tmp_path / "features.npy", "--benchmark", pairs)["benchmarks"][
            "pairs"
        ]
        assert {name: round(result["figures"][name]["value"], 3) for name in figures} == figures
        assert (result["genuine_pairs"], result["impostor_pairs"]) == (20, 20 if kind else 16)
        assert (result["interval"], result["failures"]) == ("pairs", 4 if kind else 0)
        assert result["accuracy_std"] >= 0


def test_models_of_one_name_keep_their_scores_apart(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    models = [shutil.copytree(model, tmp_path / name / "best") for name in ("a", "b")]
    evaluated(capsys, *models, "--benchmark", f"lfw={LFW}", "--out", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*best-lfw-scores.npz"))) == 2


def test_a_folder_of_verification_files_compares_groups(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "rfw"
    folder.mkdir()
    for number, group in enumerate(("African", "Asian")):
        people = write_people(tmp_path / group, {f"{group}{n}": 3 for n in range(20 + number)})
        assert run("data", "pairs", people, "--out", folder / f"{group}.bin", "--pairs", 120) == 0
    african = folder / "African.bin"
    (folder / "African_test.xz").write_bytes(lzma.compress(african.read_bytes()))
    african.unlink()
    capsys.readouterr()
    alone = evaluated(capsys, model, "--benchmark", folder / "Asian.bin")["benchmarks"]["Asian"]["figures"]
    result = evaluated(capsys, model, "--benchmark", folder)["benchmarks"]["rfw"]
    assert result["impostor_pairs"] == 120
    assert {f"asian/{name}": figure for name, figure in alone.items()}.items() <= result["figures"].items()
    assert result["groups_at"]["fmr"] == 0.1
    rates = [result["figures"][f"{group}/fmr"]["value"] for group in ("african_test", "asian")]
    assert 0 < sum(rates) / 2 <= 0.1
    assert result["figures"]["garbe"]["value"] is not None


def listed_features(tmp_path: Path, header: Sequence[str]) -> tuple[Path, Path]:
    """Features of 30 people with 4 images each in two groups, and their list with a column for each of the header."""
    generator = np.random.default_rng(0)
    ids = np.arange(120) // 4
    norms = generator.uniform(1, 9, 120)
    noise = generator.normal(size=(120, 32)) * (2.0 / norms[:, None])
    rows = generator.normal(size=(30, 32))[ids] + noise
    rows *= (norms / np.linalg.norm(rows, axis=1))[:, None]
    np.save(tmp_path / "features.npy", rows.astype(np.float32))
    columns = {"path": "x.jpg", "mask": 0}
    lines = [
        [{"identity": one, "group": ("a", "b")[one % 2], "quality": -norms[row], **columns}[name] for name in header]
        for row, one in enumerate(ids.tolist())
    ]
    return tmp_path / "features.npy", write_csv(tmp_path / "list.csv", [list(header), *lines])


def test_a_list_has_group_figures_and_the_error_against_the_share_discarded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    features, listed = listed_features(tmp_path, ["path", "identity", "group", "mask"])
    arguments = ["--embeddings", features, "--benchmark", listed]
    result = evaluated(capsys, *arguments)["benchmarks"]["list"]
    at = result["groups_at"]
    assert (at["fmr"], at["groups"]) == (1e-2, ["a", "b"])
    units = np.load(features).astype(float)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    products, ids = units @ units.T, np.arange(120) // 4
    for left, right in ((0, 0), (0, 1), (1, 1)):
        of = (ids[:, None] % 2 == left) & (ids % 2 == right) & (ids[:, None] != ids)
        assert at["cross_fmr"][left][right] == pytest.approx(np.mean(products[of] >= at["cosine"]), abs=1e-12)
    quality = result["quality"]
    assert (quality["by"], quality["discarded"][0]) == ("norm", 0)
    assert quality["fnmr"][4] < quality["fnmr"][0]  # images of small norm are the noisy ones here
    assert run("evaluate", *arguments, "--workers", 0) == 0
    shown = capsys.readouterr().out
    assert "Quality by norm: without the worst 10%" in shown
    assert "set for FMR 0.01 over all" in shown
    assert "training set are among these is unknown" in shown
    listed.write_text(listed.read_text().replace(",b,", ",,", 4))
    assert run("evaluate", *arguments, "--workers", 0) == 0
    assert "4 of 120 images name no group" in capsys.readouterr().out


def test_a_list_may_bring_a_quality(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    features, listed = listed_features(tmp_path, ["path", "identity", "group", "mask", "quality"])
    result = evaluated(capsys, "--embeddings", features, "--benchmark", listed)["benchmarks"]["list"]
    assert result["quality"]["by"] == "column"
    assert result["quality"]["fnmr"][4] > result["quality"]["fnmr"][0]  # the column is upside down
    listed.write_text(listed.read_text().replace("-", "minus ", 1))
    said = complaint(capsys, "evaluate", "--embeddings", features, "--benchmark", listed, "--json")
    assert "Line 2" in said
    assert "finite number" in said


def test_pairs_of_ones_own_are_written_and_evaluated(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    people = write_people(tmp_path / "people", PEOPLE)
    for name in ("pairs.csv", "pairs.bin"):
        assert run("data", "pairs", people, "--out", tmp_path / name, "--pairs", 20, "--json") == 0
        facts = json.loads(capsys.readouterr().out)
        assert (facts["pairs"], facts["genuine"]) == (20, 10)
    found = evaluated(capsys, model, "--benchmark", f"a={tmp_path / 'pairs.csv'}", f"b={tmp_path / 'pairs.bin'}")
    a, b = (found["benchmarks"][name]["figures"]["auc"]["value"] for name in "ab")
    assert a == pytest.approx(b, abs=1e-6)


def test_thresholds_set_on_some_are_tried_on_others(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    ours = write_people(tmp_path / "ours", {f"p{number}": 3 for number in range(12)})
    assert run("evaluate", model, "--benchmark", ours, "--write-thresholds", "--workers", 0) == 0
    capsys.readouterr()
    thresholds = json.loads((model / "thresholds.json").read_text())
    assert thresholds["measured_on"]["name"] == "ours"
    theirs = write_people(tmp_path / "theirs", {f"q{number}": 3 for number in range(10)})
    result = evaluated(capsys, model, "--benchmark", theirs, "--thresholds", model / "thresholds.json")
    realised = result["benchmarks"]["theirs"]["thresholds"]
    assert [row["target"] for row in realised] == [0.01]  # 594 impostor pairs resolve no smaller rate
    assert 0 <= realised[0]["fmr"]["value"] <= 1
    other = tmp_path / "other"
    save_model(other, create_backbone("mini", embedding_dim=16, image_size=112, seed=1), ModelConfig("mini", 16))
    said = complaint(
        capsys, "evaluate", other, "--benchmark", theirs, "--thresholds", model / "thresholds.json", "--json"
    )
    assert "another model" in said


def test_two_models_give_one_table(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_model(
        other, create_backbone("mini", embedding_dim=16, image_size=112, seed=1), ModelConfig("mini", 16, flip=False)
    )
    assert run("evaluate", model, other, "--benchmark", LFW, "--workers", 0) == 0
    shown = capsys.readouterr().out
    assert "model" in shown
    assert "other" in shown
    assert shown.count("accuracy") == 1
    assert max(map(len, shown.splitlines())) <= 80
    assert run("evaluate", model, other, "--benchmark", LFW, "--workers", 0, "--json") == 0
    assert set(json.loads(capsys.readouterr().out)["models"]) == {str(model), str(other)}


def write_ijb(folder: Path, people: int = 12) -> Path:
    """Two templates of one image for each person, all pairs, and two galleries."""
    (folder / "meta").mkdir(parents=True)
    faces, media, pairs = [], [], []
    for face in range(2 * people):
        faces.append(f"{face}.jpg 38 51 73 51 56 71 41 92 70 92 0.9")
        media.append(f"{face}.jpg {face} {face}")
    pairs = [f"{a} {b} {int(a // 2 == b // 2)}" for a in range(2 * people) for b in range(a + 1, 2 * people)]
    for name, lines in (
        ("face_tid_mid", media),
        ("template_pair_label", pairs),
        ("name_5pts_score", faces),
    ):
        (folder / "meta" / f"ijbc_{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_ijb_on_stored_features(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = write_ijb(tmp_path / "ijbc")
    generator = np.random.default_rng(0)
    features = (generator.normal(size=(12, 8)).repeat(2, axis=0) + 0.3 * generator.normal(size=(24, 8))).astype("f4")
    np.save(tmp_path / "features.npy", features)
    assert run("evaluate", "--embeddings", tmp_path / "features.npy", "--benchmark", f"ijbc={folder}", "--json") == 0
    captured = capsys.readouterr()
    assert "unverified" in captured.err
    result = json.loads(captured.out)["benchmarks"]["ijbc"]
    units = features.astype(float) / np.linalg.norm(features.astype(float), axis=1, keepdims=True)
    scores, same = [], []
    for a in range(24):
        for b in range(a + 1, 24):
            scores.append(units[a] @ units[b])
            same.append(a // 2 == b // 2)
    impostor = np.sort(np.array(scores)[~np.array(same)])
    limit = impostor[-1 - len(impostor) // 10]
    wanted = (np.array(scores)[np.array(same)] > limit).mean()
    assert result["figures"]["tar@far=0.1"]["value"] == pytest.approx(wanted, abs=1e-12)
    assert result["figures"]["tar@far=1e-6"]["value"] is None
    assert result["curves"]["kept"] == 32  # a tenth of the impostor pairs and a fifth more
    compat = evaluated_stored(capsys, tmp_path / "features.npy", folder, "--compat", "insightface")
    assert "insightface" in compat["reading"]


def test_ijb_keeps_scores_and_counts_failures(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    folder = write_ijb(tmp_path / "ijbc")
    rows = np.random.default_rng(0).normal(size=(12, 16)).repeat(2, axis=0).astype(np.float32)
    rows[3] = 0
    contract = contract_of(load_model(model))
    write_features(tmp_path / "features.npy", rows, contract, mirrored=True, failed=[3])
    stored = [model, "--embeddings", tmp_path / "features.npy", "--benchmark", f"ijbc={folder}"]
    result = evaluated(capsys, *stored, "--out", tmp_path / "out")["benchmarks"]["ijbc"]
    assert result["failures"] == 1
    assert result["figures"]["fte"]["value"] == pytest.approx(1 / 24)
    assert (tmp_path / "out" / "ijbc-scores.npz").is_file()
    # Templates join several pictures, and a threshold is for two.
    assert "does not compare two pictures" in complaint(capsys, "evaluate", *stored, "--write-thresholds")
    people = write_people(tmp_path / "people", {f"p{number}": 3 for number in range(12)})
    assert run("evaluate", model, "--benchmark", people, "--write-thresholds", "--workers", 0) == 0
    capsys.readouterr()
    assert run("evaluate", *stored, "--thresholds", model / "thresholds.json") == 0
    assert "ijbc: the thresholds, which are for two pictures, are not tried on it" in capsys.readouterr().out


def evaluated_stored(capsys: pytest.CaptureFixture[str], features: Path, folder: Path, *more: object) -> Any:
    assert run("evaluate", "--embeddings", features, "--benchmark", f"ijbc={folder}", "--json", *more) == 0
    return json.loads(capsys.readouterr().out)["benchmarks"]["ijbc"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["MODEL"], "--benchmark"),
        (["--benchmark", "LFW"], "nothing to evaluate"),
        (["MODEL", "--benchmark", "nowhere"], "neither a path that exists"),
        (["MODEL", "--benchmark", "EMPTY"], "no benchmark that is known"),
        (["MODEL", "--benchmark", "LFW", "LFW"], "given twice"),
        (["MODEL", "--benchmark", "a/b=LFW"], "has a slash"),
        (["MODEL", "--benchmark", "ALONE"], "benchmark alone: No two images"),
        (["MODEL", "--benchmark", "SLASHED"], "cannot be called 'a/b'"),
        (["MODEL", "--benchmark", "LFW", "--batch-size", "0"], "batch"),
        (["--embeddings", "FEATURES", "--benchmark", "LFW"], "3 features"),
        (["--embeddings", "NAN", "--benchmark", "LFW"], "NaN"),
        (["--embeddings", "missing.npy", "--benchmark", "LFW"], "missing.npy"),
        (["MODEL", "--embeddings", "OTHERS", "--benchmark", "LFW"], "another model"),
        (["MODEL", "--benchmark", "LISTLESS"], "no column"),
        (["MODEL", "--benchmark", "SMALL"], "112 × 112"),
        (["MODEL", "--benchmark", "LATIN"], "cannot be read as a CSV file in UTF-8"),
        (["MODEL", "--benchmark", "NUL"], "cannot be read: embedded null byte"),
        (["MODEL", "--embeddings", "PLAIN", "--benchmark", "LFW", "--write-thresholds"], "does not say whose features"),
        (["MODEL", "--benchmark", "LFW", "--thresholds", "missing.json"], "missing.json"),
    ],
)
def test_mistakes_are_one_sentence(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    np.save(tmp_path / "features.npy", np.ones((3, 16), np.float32))
    np.save(tmp_path / "nan.npy", np.full((80, 16), np.nan, np.float32))
    np.save(tmp_path / "others.npy", np.ones((80, 16), np.float32))
    sidecar = {"schema_version": 1, "contract": "0" * 64, "count": 80, "width": 16, "mirrored": True, "source": "x"}
    (tmp_path / "others.npy.json").write_text(json.dumps({**sidecar, "failed": []}))
    np.save(tmp_path / "plain.npy", np.ones((80, 16), np.float32))
    (tmp_path / "latin.csv").write_bytes("left,right,is_same\njörg/1.png,jörg/2.png,1\n".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    write_people(tmp_path / "people", PEOPLE)
    places = {
        "MODEL": model,
        "LFW": LFW,
        "EMPTY": tmp_path / "empty",
        "FEATURES": tmp_path / "features.npy",
        "NAN": tmp_path / "nan.npy",
        "OTHERS": tmp_path / "others.npy",
        "PLAIN": tmp_path / "plain.npy",
        "LATIN": tmp_path / "latin.csv",
        "NUL": write_csv(tmp_path / "nul.csv", [["left", "right", "is_same"], ["a\0.png", "b.png", 1]]),
        "LISTLESS": write_csv(tmp_path / "list.csv", [["file", "who"], ["a.jpg", "ann"]]),
        "ALONE": write_csv(
            tmp_path / "alone.csv",
            [["path", "identity", "group", "mask"], *([f"people/ann/{n}.jpg", "ann", "", 0] for n in range(3))],
        ),
        "SLASHED": write_csv(tmp_path / "l.csv", [["path", "identity", "group", "mask"], ["a.jpg", "ann", "a/b", 0]]),
        "SMALL": write_people(tmp_path / "small", {"ann": 2, "bob": 2}, size=64),
    }
    said = complaint(capsys, "evaluate", *(places.get(word, word) for word in arguments), "--json", "--workers", 0)
    assert words in said
