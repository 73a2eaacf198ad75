"""Procedural twins are read and evaluated as the benchmarks themselves, and differ from each other as they should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import complaint, run

from partialfc.backbones import create_backbone
from partialfc.core.errors import InputError
from partialfc.data.align import scaled_template
from partialfc.data.ijb_files import read_faces, read_galleries, read_members, read_probes, read_template_pairs
from partialfc.data.pair_files import read_pairs
from partialfc.evaluation.all_pairs import read_list
from partialfc.evaluation.images import LooseCrops
from partialfc.faces import protocols
from partialfc.faces.camera import make_camera
from partialfc.faces.parameters import FaceParameters, draw_parameters
from partialfc.faces.protocols import FIRST, PROTOCOLS, PairTwin, detect, write_protocol
from partialfc.faces.settings import FaceSettings
from partialfc.faces.traits import TRAITS, Named, flat
from partialfc.model.config import ModelConfig
from partialfc.model.files import save_model

SIZES = {"identities": 12, "image_size": 32, "seed": 3}
FIGURES = {
    "lfw": ["accuracy"],
    "ijbb": ["tar@far=0.1", "rank-1", "tpir@fpir=0.1"],
    "mfr": [*(f"group-{group}/tar@far=1e-6" for group in range(4)), "mask/tar@far=1e-4", "children/tar@far=1e-4"],
    "gallery": ["rank-1", "distractors/rank-1", "tpir@fpir=0.1"],
}
FIGURES |= dict.fromkeys(("cfp_ff", "cfp_fp", "agedb_30"), FIGURES["lfw"]) | {"ijbc": FIGURES["ijbb"]}


def sizes_of(name: str) -> dict[str, Any]:
    return SIZES | ({"pairs": 20} if isinstance(PROTOCOLS[name], PairTwin) else {})


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What was written of each protocol."""
    folder = tmp_path_factory.mktemp("twins")
    return {name: write_protocol(name, folder / name, **sizes_of(name)) for name in PROTOCOLS}


def test_evaluate_reads_every_twin(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, twins: dict[str, dict[str, Any]]
) -> None:
    size = SIZES["image_size"]
    backbone = create_backbone("mini", embedding_dim=16, image_size=size)
    save_model(tmp_path / "model", backbone, ModelConfig("mini", 16, image_size=size))
    paths = [f"{name}={facts['benchmark']}" for name, facts in twins.items()]
    assert run("evaluate", tmp_path / "model", "--benchmark", *paths, "--workers", 0, "--json") == 0
    results = json.loads(capsys.readouterr().out)["benchmarks"]
    assert results.keys() == FIGURES.keys()
    for name, figures in FIGURES.items():
        assert set(figures) <= results[name]["figures"].keys(), name
        fte = results[name]["figures"].get("fte", {"value": 0.0})
        assert fte["value"] == 0.0, name
    assert results["ijbb"]["1:n"]["galleries"].keys() == {"S1", "S2"}
    assert results["ijbc"]["1:n"]["galleries"].keys() == {"G1", "G2"}


def test_pairs_have_their_settings_on_either_side(tmp_path: Path, twins: dict[str, dict[str, Any]]) -> None:
    frontal, profile = (read_pairs(twins[name]["benchmark"]) for name in ("cfp_ff", "cfp_fp"))
    assert np.array_equal(frontal.is_same, profile.is_same)
    assert np.array_equal(frontal.images[0::2], profile.images[0::2])
    assert not any(np.array_equal(*images) for images in zip(frontal.images[1::2], profile.images[1::2], strict=True))
    about = json.loads((Path(twins["cfp_fp"]["benchmark"]).parent / "faces.json").read_text())
    assert (about["first"]["turn"], about["second"]["turn"], about["protocol"]) == (0.0, 40.0, "cfp_fp")


def test_templates_have_several_media_and_probes_search_both_galleries(twins: dict[str, dict[str, Any]]) -> None:
    folder = Path(twins["ijbc"]["benchmark"])
    faces = read_faces(folder)
    members = read_members(folder, faces)
    people, templates = SIZES["identities"], len(protocols.TemplateTwin.templates)
    assert len(np.unique(members.templates)) == people * templates
    # No media is of two templates; one template has two photographs and a video of four frames.
    media = {(t, m) for t, m in zip(members.templates.tolist(), members.media.tolist(), strict=True)}
    assert len(media) == len(np.unique(members.media)) == people * 8
    last = members.media[members.templates == templates]
    assert np.unique(last, return_counts=True)[1].tolist() == [1, 1, 4]
    galleries, probes = read_galleries(folder), read_probes(folder)
    subjects = [set(gallery.values()) for gallery in galleries.values()]
    assert [len(half) for half in subjects] == [people // 2, people // 2]
    assert not subjects[0] & subjects[1]
    assert set(probes.values()) == subjects[0] | subjects[1]
    pairs = read_template_pairs(folder)
    owner = probes | {template: subject for gallery in galleries.values() for template, subject in gallery.items()}
    sides = zip(pairs.left.tolist(), pairs.right.tolist(), strict=True)
    assert [owner[left] == owner[right] for left, right in sides] == pairs.is_same.tolist()
    assert len(pairs.is_same) == people * people * 3
    assert faces.detector_scores.min() > 0.2
    assert faces.detector_scores.max() <= 1
    assert np.ptp(faces.detector_scores) > 0.2


def test_loose_crops_are_aligned_by_their_landmarks(twins: dict[str, dict[str, Any]]) -> None:
    """The eyes are about as far apart in a crop as in the aligned face, and the face is in the crop."""
    folder = Path(twins["ijbb"]["benchmark"])
    faces = read_faces(folder)
    crop = LooseCrops(folder / "loose_crop", faces, 32)
    assert crop.image(0).shape == (32, 32, 3)
    apart = np.linalg.norm(faces.landmarks[:, 1] - faces.landmarks[:, 0], axis=1)
    template = scaled_template(32)
    assert 0.6 < np.median(apart) / float(template[1, 0] - template[0, 0]) < 1.2
    assert (faces.landmarks > 0).all()
    assert (faces.landmarks < 45).all()


def test_the_list_names_groups_children_and_masks(twins: dict[str, dict[str, Any]]) -> None:
    listed = read_list(twins["mfr"]["benchmark"])
    people = SIZES["identities"]
    children = [name == "children" for name in listed.groups]
    assert (len(listed.paths), int(listed.masked.sum()), sum(children)) == (people * 7 + 12, people, 12)
    adults = {identity for identity, child in zip(listed.identities, children, strict=True) if not child}
    assert {listed.identities[row] for row in np.flatnonzero(listed.masked)} == adults
    for identity, group, child in zip(listed.identities, listed.groups, children, strict=True):
        assert group == "children" if child else group == f"group-{int(identity) % 4}"
        assert child == (identity not in adults)


def test_the_gallery_lacks_the_unknown_and_the_distractors(twins: dict[str, dict[str, Any]]) -> None:
    folder = Path(twins["gallery"]["benchmark"])
    people = {
        part: {path.name for path in (folder / part).iterdir()}
        for part in ("gallery", "probe", "unknown", "distractors")
    }
    assert {part: len(names) for part, names in people.items()} == {
        "gallery": 12,
        "probe": 12,
        "unknown": 6,
        "distractors": 24,
    }
    assert people["gallery"] == people["probe"]
    assert len(people["gallery"] | people["unknown"] | people["distractors"]) == 42


# -- what differs between the parts ------------------------------------------------------------------------------------


def drawn(settings: FaceSettings, shots: int = 1) -> tuple[FaceParameters, Named]:
    """Parameters of 64 people, and the nuisances (N,) by name."""
    people = torch.arange(FIRST, FIRST + 64).repeat_interleave(shots)
    parameters = draw_parameters(0, people, torch.arange(shots).repeat(64), settings)
    return parameters, flat(parameters.nuisances(settings))


def degrees_away(settings: FaceSettings) -> torch.Tensor:
    """The angle between the direction of the face and the camera, pitch left out."""
    rotation = make_camera(drawn(settings)[1], settings).rotation
    return torch.rad2deg(torch.atan2(rotation[:, 2, 0].abs(), rotation[:, 2, 2].abs()))


def test_profiles_are_turned_to_either_side() -> None:
    frontal, profile = degrees_away(protocols.FRONTAL), degrees_away(protocols.PROFILE)
    assert float(frontal.max()) < 15
    assert 38 < float(profile.min()) < float(profile.max()) < 52
    sides = make_camera(drawn(protocols.PROFILE)[1], protocols.PROFILE).rotation[:, 2, 0].sign()
    assert 16 < int((sides > 0).sum()) < 48


def test_years_lie_between_the_halves_of_agedb() -> None:
    age = TRAITS.index("age")
    young, old = (drawn(settings)[0].traits[:, age] for settings in (protocols.YOUNG, protocols.OLD))
    assert float((old - young).min()) > 3.5
    others = [row for row, name in enumerate(TRAITS) if name != "age"]
    assert torch.equal(drawn(protocols.YOUNG)[0].traits[:, others], drawn(protocols.OLD)[0].traits[:, others])


def test_children_have_the_proportions_of_children_and_no_beard() -> None:
    adults, children = (drawn(settings)[0].traits for settings in (protocols.BARE, protocols.CHILD))
    moved = {name: float((children - adults)[:, row].mean()) for row, name in enumerate(TRAITS)}
    assert moved["eye_size"] > 1
    assert moved["nose_length"] < -1
    assert moved["chin_length"] < -1
    assert float(children[:, TRAITS.index("beard")].max()) < 0


@pytest.mark.parametrize(("settings", "share"), [(protocols.MASKED, 1.0), (protocols.BARE, 0.0), (protocols.CHILD, 0)])
def test_masks_are_worn_where_they_should_be(settings: FaceSettings, share: float) -> None:
    assert float(drawn(settings)[1]["mask"].mean()) == share


def test_sets_of_accessories_are_worn_in_turn() -> None:
    _, nuisance = drawn(FaceSettings(accessory_sets=3), shots=6)
    for name in ("glasses", "beard", "fringe", "cloth_hue"):
        values = nuisance[name].view(64, 2, 3)
        assert torch.equal(values[:, 0], values[:, 1]), name
        assert len(values.unique()) > 1, name
    for name in ("yaw", "light_side", "back_x", "smile"):
        values = nuisance[name].view(64, 2, 3)
        assert not (values[:, 0] == values[:, 1]).any(), name
    assert not (nuisance["fringe"].view(64, 2, 3)[:, :, 0] == nuisance["fringe"].view(64, 2, 3)[:, :, 1]).any()


def test_frames_of_a_scene_differ_in_pose_and_expression_alone() -> None:
    parameters, nuisance = drawn(FaceSettings(scenes=2), shots=4)
    same = {
        name
        for name, values in nuisance.items()
        if torch.equal(values.view(64, 2, 2)[:, 0], values.view(64, 2, 2)[:, 1])
    }
    assert {"light_side", "back_x", "blur", "fringe", "glasses", "mask", "ageing"} <= same
    assert not {"yaw", "pitch", "smile", "gaze_a"} & same
    ages = parameters.traits[:, TRAITS.index("age")].view(64, 2, 2)
    assert torch.equal(ages[:, 0], ages[:, 1])


def test_the_detector_is_less_sure_of_turned_and_masked_faces() -> None:
    people, shots, landmarks = torch.arange(64), torch.zeros(64, dtype=torch.int64), np.zeros((64, 5, 2), np.float32)
    landmarks[:, 1, 0] = 20.0
    found, sure = detect(0, people, shots, landmarks, protocols.FRONTAL)
    error = np.abs(found - landmarks)
    assert 0 < error.max() < 0.1 * 20
    for worse in (protocols.PROFILE, FaceSettings(yaw=6.0, pitch=6.0, mask=1.0)):
        assert (detect(0, people, shots, landmarks, worse)[1] < sure).all()


# -- wrong input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol", "lfww"], "--protocol: 'lfww' is not one of lfw, cfp_ff, cfp_fp"),
        (["--protocol", "ijbc", "--pairs", "20"], "--pairs does not fit the protocol ijbc, which takes --identities"),
        (["--protocol", "mfr", "--shots", "3"], "--shots does not fit the protocol mfr"),
        (["--protocol", "lfw", "--layout", "folder"], "which takes --identities, --image-size, --pairs, --seed."),
        (["--protocol", "gallery", "--accessory-sets", "4"], "--accessory-sets does not fit"),
        (["--protocol", "lfw", "--pairs", "30"], "take a multiple of 20"),
        (["--protocol", "mfr", "--identities", "9"], "identities is 9: the protocol mfr needs at least 10"),
        (["--protocol", "ijbb", "--image-size", "8"], "at least 16 pixels"),
        (["--accessory-sets", "-1"], "accessory_sets is -1"),
    ],
)
def test_a_mistake_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert message in complaint(capsys, "data", "faces", "--out", tmp_path / "out", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_and_an_unknown_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["data", "faces", "--protocol", "gallery", "--out", tmp_path]
    assert "exists already: remove it" in complaint(capsys, *arguments)
    with pytest.raises(InputError, match="no protocol 'megaface': choose one of lfw"):
        write_protocol("megaface", tmp_path / "out")


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(protocols, "write_ijb", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_protocol("ijbb", tmp_path / "out", identities=10, image_size=16)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_a_protocol_and_says_what_to_evaluate(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, twins: dict[str, dict[str, Any]]
) -> None:
    arguments = ["--identities", 12, "--image-size", 32, "--seed", 3, "--pairs", 20]
    assert run("data", "faces", "--protocol", "lfw", *arguments, "--out", tmp_path / "out", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["benchmark"] == str(tmp_path / "out" / "lfw.bin")
    assert Path(facts["benchmark"]).read_bytes() == Path(twins["lfw"]["benchmark"]).read_bytes()
