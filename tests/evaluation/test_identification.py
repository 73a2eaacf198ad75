"""1:N against the protocol written out in loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ijb_sets import random_set, write_identification, write_set
from numpy.typing import NDArray

from partialfc.core.errors import InputError
from partialfc.data.ijb_files import read_faces, read_galleries, read_members, read_probes
from partialfc.evaluation import identification as module
from partialfc.evaluation.identification import identify, identify_templates, search
from partialfc.evaluation.templates import template_features


def unit_rows(rows: NDArray[np.float64]) -> NDArray[np.float32]:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def looped_figures(
    gallery: np.ndarray, gallery_ids: list[int], probes: np.ndarray, probe_ids: list[int], failures: int
) -> dict[str, float | None]:
    """Ranks and TPIR at FPIR in loops, from the definitions."""
    mated, non_mated = [], []
    for probe, identity in zip(probes.astype(np.float64), probe_ids, strict=True):
        best: dict[int, float] = {}
        for row, enrolled in zip(gallery.astype(np.float64), gallery_ids, strict=True):
            best[enrolled] = max(best.get(enrolled, -2.0), float(np.float32(row @ probe)))
        if identity not in best:
            non_mated.append(max(best.values()))
            continue
        rank = 1 + sum(score >= best[identity] for other, score in best.items() if other != identity)
        mated.append((rank, best[identity]))
    count = len(mated) + failures
    figures: dict[str, float | None] = {}
    for k in (1, 5, 10):
        figures[f"rank-{k}"] = sum(rank <= k for rank, _ in mated) / count if count else None
    for fpir in (0.01, 0.1):
        hits = [0]
        for threshold in [score for _, score in mated]:
            if sum(score >= threshold for score in non_mated) <= fpir * len(non_mated):
                hits += [sum(rank == 1 and score >= threshold for rank, score in mated)]
        figures[f"tpir@fpir={fpir}"] = max(hits) / count if fpir * len(non_mated) >= 1 and count else None
    return figures


@given(
    seed=st.integers(0, 2**32 - 1),
    people=st.integers(1, 30),
    probes=st.integers(1, 250),
    pictures=st.integers(1, 3),
    failures=st.integers(0, 4),
    grid=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_figures_equal_the_protocol_in_loops(
    seed: int, people: int, probes: int, pictures: int, failures: int, grid: bool
) -> None:
    generator = np.random.default_rng(seed)
    centers = generator.normal(size=(2 * people, 8))
    ids = generator.permutation(np.arange(people).repeat(pictures))
    probe_ids = generator.integers(0, 2 * people, probes)  # about half are not enrolled
    gallery = centers[ids] + generator.normal(size=(len(ids), 8))
    probe_rows = centers[probe_ids] + generator.normal(size=(probes, 8))
    if grid:  # few distinct rows: equal scores are the rule
        gallery, probe_rows = (np.sign(rows) * [1, 1, 1, 1, 0, 0, 0, 0] for rows in (gallery, probe_rows))
    gallery_units, probe_units = unit_rows(gallery), unit_rows(probe_rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ROWS_AT_A_TIME", 16)
        figures = identify(gallery_units, ids, probe_units, probe_ids, failures)
    expected = looped_figures(gallery_units, ids.tolist(), probe_units, probe_ids.tolist(), failures)
    assert set(figures) == set(expected)
    for name, value in expected.items():
        if value is None:
            assert figures[name].value is None
            assert figures[name].reason
        else:
            assert figures[name].value == pytest.approx(value, abs=1e-12)
            low, high = figures[name].low, figures[name].high
            assert low is not None
            assert high is not None
            assert low <= value + 1e-12
            assert value - 1e-12 <= high


def test_equal_scores_never_help() -> None:
    same = np.full((3, 4), 0.5, np.float32)
    ranks, best = search(same, np.array([5, 6, 7]), same[:2], np.array([6, 8]))
    assert ranks.tolist() == [3, 0]
    assert best.tolist() == [1.0, 1.0]


def test_the_best_picture_of_a_person_counts() -> None:
    gallery = np.array([[0, 1], [1, 0], [0.6, 0.8]], np.float32)
    ranks, best = search(gallery, np.array([3, 3, 4]), np.array([[1, 0]], np.float32), np.array([3]))
    assert (ranks.tolist(), best.tolist()) == ([1], [1.0])


def test_a_distractor_is_an_identity_that_no_probe_has() -> None:
    generator = np.random.default_rng(0)
    people = unit_rows(generator.normal(size=(20, 16)))
    probes = unit_rows(people + 0.1 * generator.normal(size=(20, 16)))
    ids = np.arange(20)
    assert identify(people, ids, probes, ids)["rank-1"].value == 1.0
    distractors = np.concatenate([people, probes[:5]])  # five that are closer than the person
    figures = identify(distractors, np.concatenate([ids, -1 - np.arange(5)]), probes, ids)
    assert figures["rank-1"].value == 0.75
    assert figures["rank-5"].value == 1.0


def test_a_probe_that_was_not_enrolled_is_a_miss() -> None:
    rows = np.eye(4, dtype=np.float32)
    figures = identify(rows, np.arange(4), rows[:3], np.arange(3), failures=1)
    assert {figures[f"rank-{k}"].value for k in (1, 5, 10)} == {0.75}


def test_what_cannot_be_resolved_is_null_with_a_reason() -> None:
    rows = np.eye(40, dtype=np.float32)
    figures = identify(rows[:20], np.arange(20), rows, np.arange(40))
    assert figures["tpir@fpir=0.1"].value == 1.0
    assert figures["tpir@fpir=0.01"].reason == "20 non-mated probes cannot resolve a rate of 0.01."
    figures = identify(rows[:20], np.arange(20), rows[20:], np.arange(20, 40))
    assert {figure.reason for figure in figures.values()} == {"No probe shows a person of the gallery."}
    with pytest.raises(InputError, match="gallery is empty"):
        identify(rows[:0], np.arange(0), rows, np.arange(40))


def test_a_list_without_a_header_keeps_its_first_line(tmp_path: Path) -> None:
    data = random_set(3, templates=30, people=5)
    write_set(tmp_path, data)
    write_identification(tmp_path, data)
    wanted = read_probes(tmp_path), read_galleries(tmp_path)
    for path in tmp_path.rglob("*_1N_*.csv"):
        path.write_text(path.read_text().partition("\n")[2])
    assert (read_probes(tmp_path), read_galleries(tmp_path)) == wanted


def test_the_figures_of_ijb_are_averages_of_the_galleries(tmp_path: Path) -> None:
    data = random_set(3, templates=300, people=20)
    write_set(tmp_path, data)
    write_identification(tmp_path, data)
    faces = read_faces(tmp_path)
    templates, units = template_features(data.features, faces, read_members(tmp_path, faces))
    galleries, probes = read_galleries(tmp_path), read_probes(tmp_path)
    result = identify_templates(templates, units, galleries, probes)
    assert result.kind == "ijb-1:n"
    row_of = {number: row for row, number in enumerate(templates.tolist())}
    rows = [row_of[number] for number in probes]
    each = []
    for name, gallery in galleries.items():
        enrolled = units[[row_of[number] for number in gallery]]
        expected = looped_figures(enrolled, list(gallery.values()), units[rows], list(probes.values()), 0)
        each.append(expected)
        shown = result.facts["galleries"][name]
        assert {key: value["value"] for key, value in shown["figures"].items()} == pytest.approx(expected)
        assert shown["mated"] + shown["non_mated"] == result.facts["probes"]
    for name, figure in result.figures.items():
        values = [expected[name] or 0.0 for expected in each]
        assert figure.value == pytest.approx(sum(values) / 2)
        ends = [result.facts["galleries"][gallery]["figures"][name] for gallery in galleries]
        assert sum(end["low"] for end in ends) / 2 <= (figure.low or 0.0) <= (figure.value or 0.0)
        assert sum(end["high"] for end in ends) / 2 >= (figure.high or 0.0) >= (figure.value or 0.0)
    wrong = {999_999: 0}
    with pytest.raises(InputError, match="The list of probes names template 999999"):
        identify_templates(templates, units, galleries, wrong)
    with pytest.raises(InputError, match="Gallery G1 names template 999999"):
        identify_templates(templates, units, {"G1": wrong}, probes)
