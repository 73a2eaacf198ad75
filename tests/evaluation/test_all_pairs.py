"""The all-to-all protocol against a plain implementation, and the errors of its list."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from partialfc.core.errors import InputError
from partialfc.evaluation import all_pairs
from partialfc.evaluation.all_pairs import evaluate_all_pairs, read_list
from partialfc.similarity import dot

IMAGES = 300


def features(identities: int = 25, seed: int = 0) -> tuple[Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(identities, (IMAGES,), generator=generator)
    centers = torch.randn(identities, 24, generator=generator)
    units = normalize(centers[labels] + 1.5 * torch.randn(IMAGES, 24, generator=generator))
    units[50:60] = units[0]  # ties, of genuine and of impostor pairs
    return units, labels.numpy()


def plain_tar(units: Tensor, identities: np.ndarray, pairs: list[tuple[int, int]], far: float) -> float:
    """The share of genuine pairs above the threshold, from the definition."""
    left, right = np.array(pairs).T
    scores = dot(units[left], units[right]).double().numpy()
    same = identities[left] == identities[right]
    best = 0.0
    for threshold in np.unique(scores[same]):
        if np.mean(scores[~same] >= threshold) <= far:
            best = max(best, float(np.mean(scores[same] >= threshold)))
    return best


def test_every_part_is_that_of_the_plain_protocol() -> None:
    units, labels = features()
    names = np.array([f"person {label}" for label in labels])
    draws = np.random.default_rng(0)
    masked = draws.random(IMAGES) < 0.2
    groups = draws.choice(["African", "East Asian", "children", ""], IMAGES).tolist()
    fars = (1e-3, 1e-2, 1e-1)
    result = evaluate_all_pairs(units, names, groups, masked, fars)

    def expected(rows: np.ndarray, far: float) -> float:
        return plain_tar(units, labels, list(itertools.combinations(rows.tolist(), 2)), far)

    plain = np.flatnonzero(~masked)
    for far, name in zip(fars, ("1e-3", "0.01", "0.1"), strict=True):
        assert result.figures[f"tar@far={name}"].value == pytest.approx(expected(plain, far), abs=1e-12)
    of = {group: plain[[groups[row] == group for row in plain]] for group in ("African", "East Asian", "children")}
    for group, prefix in (("African", "african"), ("East Asian", "east-asian")):
        assert result.figures[f"{prefix}/tar@far=0.01"].value == pytest.approx(expected(of[group], 1e-2), abs=1e-12)
    assert [name for name in result.figures if name.startswith("children/tar")] == ["children/tar@far=1e-4"]
    cross = list(itertools.product(np.flatnonzero(masked).tolist(), plain.tolist()))
    mask = result.figures["mask/tar@far=1e-4"]
    assert mask.value == pytest.approx(plain_tar(units, labels, cross, 1e-4), abs=1e-12)
    assert mask.low is not None
    assert mask.high is not None
    assert mask.low <= mask.value <= mask.high  # type: ignore[operator]
    assert "mfr-score" not in result.figures  # there is no FAR of 1e-6

    same = sum(labels[a] == labels[b] for a, b in itertools.combinations(plain, 2))
    assert result.facts["genuine_pairs"] == same
    assert result.facts["impostor_pairs"] == len(plain) * (len(plain) - 1) // 2 - same
    assert (result.kind, result.facts["images"], result.facts["identities"]) == ("all-pairs", IMAGES, 25)
    crossed = sum(labels[a] == labels[b] for a, b in cross)
    assert result.facts["parts"]["mask"] == {"genuine_pairs": crossed, "impostor_pairs": len(cross) - crossed}


def test_the_mfr_score_weighs_masks_a_quarter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_pairs, "FARS", (1e-3,))
    units, labels = features()
    figures = evaluate_all_pairs(units, labels, masked=np.arange(IMAGES) % 3 == 0, fars=(1e-3,)).figures
    whole, mask, score = (figures[name] for name in ("tar@far=1e-3", "mask/tar@far=1e-4", "mfr-score"))
    for end in ("value", "low", "high"):
        assert getattr(score, end) == pytest.approx(0.25 * getattr(mask, end) + 0.75 * getattr(whole, end))


def test_what_the_pairs_cannot_resolve_is_null_with_a_reason() -> None:
    units, labels = features()
    groups = ["lonely" if label == labels[0] else "" for label in labels]
    figures = evaluate_all_pairs(units, labels, groups).figures
    assert figures["tar@far=1e-6"].value is None
    assert "cannot resolve" in str(figures["tar@far=1e-6"].reason)
    assert figures["lonely/tar@far=1e-6"].value is None
    assert figures["lonely/tar@far=1e-6"].reason == (
        "No two images of the part 'lonely' are of different identities, but both kinds of pairs are needed."
    )


def test_a_false_accept_rate_beyond_the_kept_scores_is_null(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_pairs, "_MOST_KEPT", 300)
    monkeypatch.setattr(all_pairs, "_ALL_KEPT", 300)
    figures = evaluate_all_pairs(*features(), fars=(1e-3, 1e-1)).figures
    assert figures["tar@far=1e-3"].value == pytest.approx(
        evaluate_all_pairs(*features(), fars=(1e-3,)).figures["tar@far=1e-3"].value
    )
    assert figures["tar@far=0.1"].value is None
    assert "300" in str(figures["tar@far=0.1"].reason)


def test_a_large_set_keeps_what_its_rates_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_pairs, "_ALL_KEPT", 300)
    scores = evaluate_all_pairs(*features(), fars=(1e-3,)).scores[""]
    assert len(scores.impostor) == 2 * (scores.impostors // 1000) + 100


def test_failed_images_are_rejected_in_genuine_pairs_and_make_no_impostors() -> None:
    units, labels = features()
    failed = np.arange(IMAGES) % 7 == 3
    units[torch.from_numpy(failed)] = float("nan")
    result = evaluate_all_pairs(units, labels, fars=(1e-2,), failed=failed)
    kept = np.flatnonzero(~failed)
    alone = evaluate_all_pairs(units[torch.from_numpy(kept)], labels[kept], fars=(1e-2,))
    assert result.facts["impostor_pairs"] == alone.facts["impostor_pairs"]
    same = sum(labels[a] == labels[b] for a, b in itertools.combinations(range(IMAGES), 2))
    assert result.facts["genuine_pairs"] == same
    assert alone.figures["tar@far=0.01"].value is not None
    accepted = alone.figures["tar@far=0.01"].value * alone.facts["genuine_pairs"]
    assert result.figures["tar@far=0.01"].value == pytest.approx(accepted / same)


def test_wrong_input_is_named() -> None:
    units, labels = features()
    with pytest.raises(InputError, match=r"No two images are of different identities"):
        evaluate_all_pairs(units, labels * 0)
    with pytest.raises(InputError, match=r"No two images are of the same identity"):
        evaluate_all_pairs(units, np.arange(IMAGES))
    with pytest.raises(InputError, match=r"300 features but 299 images"):
        evaluate_all_pairs(units, labels[1:])
    with pytest.raises(InputError, match="normalise"):
        evaluate_all_pairs(2 * units, labels)
    with pytest.raises(InputError, match="'asian/east'"):
        evaluate_all_pairs(units, labels, ["asian/east"] * IMAGES)
    with pytest.raises(InputError, match="'mask'"):
        evaluate_all_pairs(units, labels, ["Mask"] * IMAGES)
    with pytest.raises(InputError, match="3 groups for 300 images"):
        evaluate_all_pairs(units, labels, ["a"] * 3)
    with pytest.raises(InputError, match="'masked' has the shape"):
        evaluate_all_pairs(units, labels, masked=[True])


def test_a_list_is_read(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text(
        "\ufeffpath,identity,group,mask,note\na/1.jpg,7,African,0,\n"
        '"b, c/2.jpg", anna ,,1,x\nc.jpg,7,,,\nd.jpg,9,x,True,\n',
        encoding="utf-8",
    )
    images = read_list(path)
    assert images.paths == ["a/1.jpg", "b, c/2.jpg", "c.jpg", "d.jpg"]
    assert images.identities == ["7", "anna", "7", "9"]
    assert images.groups == ["African", "", "", "x"]
    assert images.masked.tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,identity,mask\na,1,0\n", "has no column 'group'"),
        ("", "has no column 'path'"),
        ("path,identity,group,mask\n", "names no images"),
        ("path,identity,group,mask\na,1,,0\nb,2,,perhaps\n", "Line 3 of .* has the mask value 'perhaps'"),
        ("path,identity,group,mask\na,1,,0\nb, ,,0\n", "Line 3 of .* names no identity"),
        ("path,identity,group,mask\na,1\n", "Line 2 of .* has too few values"),
        ("path,identity,group,mask\na,1,,0,9\n", "Line 2 of .* has too many values"),
        ("path,identity,group,mask\n\udcff,1,,0\n", "cannot be read as a CSV file in UTF-8"),
    ],
)
def test_a_wrong_list_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=message):
        read_list(path)


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.csv cannot be read"):
        read_list(tmp_path / "nowhere.csv")
