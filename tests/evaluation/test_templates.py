"""IJB 1:1 against the protocol written out in loops, and its nearest-FAR reading against scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ijb_sets import IjbSet, random_set, write_set
from sklearn.metrics import roc_curve

from partialfc.core.errors import InputError
from partialfc.data.ijb_files import (
    FaceList,
    Members,
    TemplatePairs,
    read_faces,
    read_members,
    read_template_pairs,
)
from partialfc.evaluation import templates as module
from partialfc.evaluation.statistics.figures import rate_name
from partialfc.evaluation.templates import FARS, nearest_far, pair_scores, template_features, verify_templates


def looped_templates(data: IjbSet) -> dict[int, np.ndarray]:
    """The unit vector of each template, in loops, in float64."""
    score = dict(zip(data.names, data.scores, strict=True))
    feature = dict(zip(data.names, data.features.astype(np.float64), strict=True))
    vectors = {}
    for template in {line[1] for line in data.lines}:
        total = np.zeros(data.features.shape[1])
        for media in {line[2] for line in data.lines if line[1] == template}:
            of_media = [score[name] * feature[name] for name, a, b in data.lines if (a, b) == (template, media)]
            total += sum(of_media) / len(of_media)
        vectors[template] = total / np.sqrt((total * total).sum())
    return vectors


def looped_scores(data: IjbSet) -> tuple[list[float], list[float]]:
    """Genuine and impostor scores, in loops, in float64."""
    vectors = looped_templates(data)
    scores: tuple[list[float], list[float]] = ([], [])
    for left, right, same in data.pairs:
        scores[1 - same].append(float(sum(vectors[left] * vectors[right])))
    return scores


def looped_tar(genuine: list[float], impostor: list[float], far: float) -> float:
    """The highest TAR over all thresholds whose FAR does not exceed the target."""
    best = 0.0
    for threshold in [*genuine, float("inf")]:
        if sum(score >= threshold for score in impostor) / len(impostor) <= far:
            best = max(best, sum(score >= threshold for score in genuine) / len(genuine))
    return best


def members_of(*rows: tuple[int, int, int]) -> Members:
    faces, templates, media = np.array(rows).T
    return Members(faces, templates, media)


def face_list(scores: list[float]) -> FaceList:
    names = [f"a/{number}.jpg" for number in range(len(scores))]
    return FaceList(names, np.zeros((len(scores), 5, 2), np.float32), np.array(scores))


def pairs_of(*rows: tuple[int, int, int]) -> TemplatePairs:
    left, right, labels = np.array(rows, dtype=np.int32).T
    return TemplatePairs(left, right, labels == 1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shuffled", [False, True])
def test_files_to_figures_equal_the_protocol_in_loops(
    tmp_path: Path, seed: int, shuffled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FACES_AT_A_TIME", 7)
    monkeypatch.setattr(module, "_TEMPLATES_AT_A_TIME", 4)
    data = random_set(seed)
    data.pairs.extend(data.pairs[:50])  # duplicated pairs count twice
    write_set(tmp_path, data)
    if shuffled:
        path = tmp_path / "ijbx_face_tid_mid.txt"
        lines = path.read_text().splitlines()
        path.write_text("\n".join(np.random.default_rng(seed).permutation(lines)))
    faces = read_faces(tmp_path)
    numbers, units = template_features(data.features, faces, read_members(tmp_path, faces))
    expected = looped_templates(data)
    assert numbers.tolist() == sorted(expected)
    np.testing.assert_allclose(units, [expected[number] for number in numbers.tolist()], atol=1e-7)
    result = verify_templates(numbers, units, read_template_pairs(tmp_path))
    genuine, impostor = looped_scores(data)
    assert result.kind == "ijb-1:1"
    assert (result.facts["genuine"], result.facts["impostors"]) == (len(genuine), len(impostor))
    for far in FARS:
        figure = result.figures[f"tar@far={rate_name(far)}"]
        if far * len(impostor) < 1:
            assert figure.value is None
            assert figure.reason is not None
            continue
        assert figure.value == pytest.approx(looped_tar(genuine, impostor, far), abs=1e-12)
        assert figure.low is not None
        assert figure.high is not None
        assert figure.low <= (figure.value or 0.0) <= figure.high


def test_scores_are_float64_products_rounded_to_float32() -> None:
    generator = np.random.default_rng(0)
    units = generator.normal(size=(2000, 64))
    units = (units / np.linalg.norm(units, axis=1, keepdims=True)).astype(np.float32)
    left, right = generator.integers(0, 2000, (2, 5000))
    exact = np.array([np.dot(units[a].astype(float), units[b].astype(float)) for a, b in zip(left, right, strict=True)])
    scores = pair_scores(units, left, right)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, exact.astype(np.float32))
    np.testing.assert_array_equal(pair_scores(units, right, left), scores)
    np.testing.assert_array_equal(pair_scores(units, left[:1], right[:1]), scores[:1])


def test_a_mean_within_media_and_a_sum_over_them() -> None:
    features = np.array([[1, 0], [3, 0], [0, 1], [5, 5]], np.float32)
    faces = face_list([0.5, 0.5, 1.0, 1.0])
    # Template 9: the mean of 0.5 and 1.5 in one media, and 1 in another; template 4: one image.
    numbers, units = template_features(features, faces, members_of((0, 9, 7), (2, 9, 8), (3, 4, 7), (1, 9, 7)))
    assert numbers.tolist() == [4, 9]
    np.testing.assert_allclose(units, np.full((2, 2), 0.5**0.5), rtol=1e-7)


def test_a_single_template_and_a_sum_of_zero() -> None:
    numbers, units = template_features(np.ones((1, 4), np.float32), face_list([0.25]), members_of((0, 5, 1)))
    assert numbers.tolist() == [5]
    np.testing.assert_array_equal(units, np.full((1, 4), 0.5, np.float32))
    opposite = np.array([[1, 2], [-1, -2]], np.float32)
    _, units = template_features(opposite, face_list([1, 1]), members_of((0, 5, 1), (1, 5, 2)))
    np.testing.assert_array_equal(units, np.zeros((1, 2)))


def test_one_genuine_and_one_impostor_pair() -> None:
    numbers, units = np.array([1, 2, 3]), np.eye(3, dtype=np.float32)
    result = verify_templates(numbers, units, pairs_of((1, 1, 1), (2, 3, 0)))
    assert {figure.value for figure in result.figures.values()} == {None}
    compat = verify_templates(numbers, units, pairs_of((1, 1, 1), (2, 3, 0)), compat=True)
    assert {figure.value for figure in compat.figures.values()} == {1.0}


def test_wrong_features() -> None:
    faces, members = face_list([1.0, 1.0, 1.0]), members_of((0, 1, 1), (1, 1, 2), (2, 2, 2))
    with pytest.raises(InputError, match=r"shape \(2, 4\), but .* lists 3 images"):
        template_features(np.ones((2, 4), np.float32), faces, members)
    with pytest.raises(InputError, match=r"shape \(3,\)"):
        template_features(np.ones(3, np.float32), faces, members)
    features = np.ones((3, 4), np.float32)
    features[1, 2] = np.nan
    with pytest.raises(InputError, match=r"1 of 3 features hold NaN or infinity, first that of image a/1\.jpg"):
        template_features(features, faces, members)


@pytest.mark.parametrize("table", [1 << 24, 4])
def test_wrong_pairs(table: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TABLE", table)  # numbers beyond it are searched
    numbers, units = np.array([1, 3, 5]), np.eye(3, dtype=np.float32)
    for unknown in (0, 2, 6):
        with pytest.raises(InputError, match=f"A pair names template {unknown}, of which there is no image"):
            verify_templates(numbers, units, pairs_of((1, 3, 0), (1, unknown, 1)))
    for label in (0, 1):
        with pytest.raises(InputError, match="All 2 pairs are of one kind"):
            verify_templates(numbers, units, pairs_of((1, 3, label), (1, 5, label)))


def insightface_reading(scores: np.ndarray, labels: np.ndarray) -> list[tuple[float, float]]:
    """FAR and TAR at the point nearest to each target, from the end of the curve."""
    fars, tars, _ = roc_curve(labels, scores)
    fars, tars = fars[::-1], tars[::-1]
    points = [min((abs(far - target), place) for place, far in enumerate(fars))[1] for target in FARS]
    return [(fars[point], tars[point]) for point in points]


@given(seed=st.integers(0, 2**32 - 1), size=st.integers(2, 300), levels=st.sampled_from([2, 5, 40, 10**6]))
@settings(max_examples=80, deadline=None)
def test_compat_reads_as_the_public_script_does(seed: int, size: int, levels: int) -> None:
    generator = np.random.default_rng(seed)
    labels = np.append([True, False], generator.random(size - 2) < 0.2)
    scores = ((generator.normal(size=size) + labels).round(2) * levels).round() / levels
    figures, read = nearest_far(scores.astype(np.float32), labels)
    expected = insightface_reading(scores.astype(np.float32), labels)
    values = [(read[rate_name(far)], figures[f"tar@far={rate_name(far)}"].value) for far in FARS]
    np.testing.assert_allclose(np.array(values, dtype=np.float64), expected, rtol=1e-15)


def test_compat_may_exceed_the_target() -> None:
    generator = np.random.default_rng(0)
    data = random_set(1, pairs=3000)
    faces = face_list(data.scores.tolist())
    members = members_of(*[(row, *line[1:]) for row, line in enumerate(data.lines)])
    numbers, units = template_features(data.features, faces, members)
    pairs = pairs_of(*[data.pairs[row] for row in generator.permutation(len(data.pairs))])
    compat, normal = (verify_templates(numbers, units, pairs, compat=compat) for compat in (True, False))
    figures = [result.figures["tar@far=1e-3"].value or 0.0 for result in (compat, normal)]
    assert figures[0] >= figures[1]
    assert compat.figures["tar@far=1e-3"].low is None
    assert set(compat.facts["far_read"]) == {rate_name(far) for far in FARS}
