"""Small sets with the meta files of IJB, written from the description of the protocol."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class IjbSet:
    """What the files of a folder say, and features that fit them."""

    names: list[str]
    scores: np.ndarray
    lines: list[tuple[str, int, int]]  # image, template, media
    pairs: list[tuple[int, int, int]]
    features: np.ndarray
    subjects: dict[int, int]  # of each template


def random_set(seed: int, templates: int = 30, people: int = 8, width: int = 16, pairs: int = 400) -> IjbSet:
    """Templates of one to six images, several of a media, with numbers that are neither dense nor sorted."""
    generator = np.random.default_rng(seed)
    numbers = generator.permutation(10 * templates)[:templates] + 1
    subjects = {int(number): index % people for index, number in enumerate(numbers)}
    lines: list[tuple[str, int, int]] = []
    features = []
    centers = generator.normal(size=(people, width))
    for number in numbers:
        for _ in range(generator.integers(1, 7)):
            media = int(generator.integers(1, 4)) + 10 * int(number) * int(generator.integers(0, 2))
            lines.append((f"img/{len(lines) + 1}.jpg", int(number), media))
            feature = centers[subjects[int(number)]] + generator.normal(size=width)
            features.append(feature * generator.uniform(5, 20))
    sides = generator.choice(numbers, (pairs, 2))
    labelled = [(int(a), int(b), int(subjects[int(a)] == subjects[int(b)])) for a, b in sides]
    scores = generator.uniform(0.2, 1.0, len(lines)).round(4)
    return IjbSet([line[0] for line in lines], scores, lines, labelled, np.array(features, np.float32), subjects)


def write_set(folder: Path, data: IjbSet, prefix: str = "ijbx") -> Path:
    """The three files of 1:1 in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    points = "30.5 40.25 60 40 45 60 35 80 55 80.125"
    faces = [f"{name} {points} {score}\n" for name, score in zip(data.names, data.scores, strict=True)]
    (folder / f"{prefix}_name_5pts_score.txt").write_text("".join(faces))
    (folder / f"{prefix}_face_tid_mid.txt").write_text("".join(f"{a} {b} {c}\n" for a, b, c in data.lines))
    (folder / f"{prefix}_template_pair_label.txt").write_text("".join(f"{a} {b} {c}\n" for a, b, c in data.pairs))
    return folder


def write_identification(folder: Path, data: IjbSet, prefix: str = "ijbx") -> None:
    """Two galleries of one template a person, half of the people each, and all other templates as probes."""
    enrolled: dict[int, int] = {}
    for template, subject in data.subjects.items():
        enrolled.setdefault(subject, template)
    half = len(enrolled) // 2
    galleries = {"G1": list(enrolled.items())[:half], "G2": list(enrolled.items())[half:]}
    for name, gallery in galleries.items():
        text = "".join(f"{template},{subject}\n" for subject, template in gallery)
        (folder / f"{prefix}_1N_gallery_{name}.csv").write_text("TEMPLATE_ID,SUBJECT_ID\n" + text)
    probes = {template: subject for template, subject in data.subjects.items() if template not in enrolled.values()}
    text = "".join(f"{template},{subject}\n" for template, subject in probes.items())
    (folder / f"{prefix}_1N_probe_mixed.csv").write_text("TEMPLATE_ID,SUBJECT_ID\n" + text)
