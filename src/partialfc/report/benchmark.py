"""The section of a report about one benchmark: scores, operating points, groups, and the hardest pairs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partialfc.core.errors import InputError
from partialfc.data.images import UnreadableImage, data_uri
from partialfc.evaluation.statistics.figures import Figure, Result, figure_text, rate_name
from partialfc.model.embed import Images
from partialfc.pages.plots import Line, Scale, chart
from partialfc.pages.tables import Bar, bars, bullets, figure, folded, legend, table

Floats = NDArray[np.float64]


def benchmark_section(name: str, results: Mapping[str, Result], images: Images | None) -> str:
    """Charts, figures, groups, and the hardest pairs, with pictures if `images` are given.

    Args:
        name: of the benchmark.
        results: by the name of the subject.
        images: of the benchmark.

    Raises:
        InputError: `images` are not those that were evaluated.
    """
    curves = {of: result.facts["curves"] for of, result in results.items() if "curves" in result.facts}
    charts = [*_histograms(results), *_curve_charts(curves), _calibration(curves), _quality(results)]
    notes = [note for result in results.values() for note in result.facts.get("notes", ())]
    notes += [one.reason for result in results.values() for one in result.figures.values() if one.reason]
    parts = [
        f"<h2>Benchmark: {escape(name)}</h2>",
        legend(list(curves)),
        f'<div class="grid wide">{"".join(charts)}</div>' if any(charts) else "",
        _figures(name, results),
        *(_groups(name, of if len(results) > 1 else "", result) for of, result in results.items()),
        folded("Notes on these figures", bullets(notes)) if notes else "",
        *(_hardest(name, of if len(results) > 1 else "", result, images) for of, result in results.items()),
    ]
    return "\n".join(part for part in parts if part)


# -- charts ------------------------------------------------------------------------------------------------------------


def _histograms(results: Mapping[str, Result]) -> list[str]:
    """The scores of each subject, on one axis: genuine and impostor pairs."""
    drawn = []
    for of, result in results.items():
        if "curves" not in result.facts:
            continue
        curves = result.facts["curves"]
        edges, genuine, impostor = (np.array(curves["histogram"][key]) for key in ("edges", "genuine", "impostor"))
        centers = (edges[:-1] + edges[1:]) / 2
        lines = [
            Line("impostors", centers, impostor / max(impostor.sum(), 1), look="impostor", shape="area"),
            Line("genuine pairs", centers, genuine / max(genuine.sum(), 1), look="genuine", shape="area"),
        ]
        x, y = Scale("cosine of the pair", "cosine", edges[[0, -1]].tolist()), Scale("share", ends=(0,), kind="share")
        title = f"Scores of {of}" if len(results) > 1 else "Scores"
        hint = (
            "How similar the model finds the two pictures of a pair: genuine pairs show one person, impostors two. The "
            "less the areas overlap, the better."
        )
        total = result.facts.get("impostor_pairs", result.facts.get("impostors", curves["kept"]))
        if isinstance(total, int) and curves["kept"] < total:
            hint += f" Of {total:,} impostor pairs, only the {curves['kept']:,} most similar are shown."
        key = '<i class="key genuine"></i>genuine<i class="key impostor"></i>impostor'
        svg = chart(lines, name=title, x=x, y=y, threshold=_threshold(result.facts))
        drawn.append(figure(title, svg, hint, key))
    return drawn


def _threshold(facts: Mapping[str, Any]) -> float | None:
    """The cosine at which the benchmark decides, as far as it has one."""
    places = (
        facts.get("cosine_threshold"),
        *((facts.get(key) or {}).get("cosine") for key in ("groups_at", "quality")),
    )
    return next((float(place) for place in places if place is not None), None)


def _curve_charts(curves: Mapping[str, Any]) -> list[str]:
    """ROC and DET with their bands."""
    roc, det = [], []
    for of, one in curves.items():
        far, tar, low, high = (np.array(one["roc"][key]) for key in ("far", "tar", "low", "high"))
        roc.append(Line(of if len(curves) > 1 else "TAR", far, tar, low, high))
        # On a logarithmic scale there is no zero: a curve without misses ends, and a band ends near the curve.
        miss = np.where(tar < 1, 1 - tar, np.nan)
        band = (np.maximum(1 - end, np.nanmin(miss, initial=1.0) / 3) for end in (high, low))
        det.append(Line(of if len(curves) > 1 else "FNMR", far, miss, *band))
    charts = []
    for name, lines, x, y, hint in (
        (
            "True accept rate (ROC)",
            roc,
            Scale("false accept rate (FAR)", "FAR", log=True),
            Scale("TAR", ends=(0, 1), kind="share"),
            "Share of genuine pairs that are accepted, when so many impostors may be accepted in error. The band is "
            "the 95% interval at this FAR.",
        ),
        (
            "Errors (DET)",
            det,
            Scale("false match rate (FMR)", "FMR", log=True),
            Scale("FNMR", log=True, kind="share"),
            "Genuine pairs rejected over impostors accepted, both logarithmic: lower is better.",
        ),
    ):
        if any(np.isfinite(line.y).any() for line in lines):
            charts.append(figure(name, chart(lines, name=name, x=x, y=y), hint))
    return charts


def _calibration(curves: Mapping[str, Any]) -> str:
    """Log-likelihood ratios of the bins of the histogram, and the affine map."""
    lines = []
    for place, (of, one) in enumerate(curves.items()):
        edges, genuine, impostor = (np.array(one["histogram"][key]) for key in ("edges", "genuine", "impostor"))
        both = (genuine > 0) & (impostor > 0)
        if one["calibration"] is None or both.sum() < 2:
            continue
        centers = ((edges[:-1] + edges[1:]) / 2)[both]
        ratios = np.log(genuine[both] / genuine.sum()) - np.log(impostor[both] / impostor.sum())
        look = f"s{place + 1}"
        mapped = one["calibration"]["scale"] * centers + one["calibration"]["offset"]
        lines += [
            Line(of if len(curves) > 1 else "measured", centers, ratios, look=look, shape="dots"),
            Line("", centers, mapped, look=look),
        ]
    if not lines:
        return ""
    svg = chart(lines, name="Calibration", x=Scale("cosine of the pair", "cosine"), y=Scale("log-likelihood ratio"))
    hint = (
        "Natural log-likelihood ratio of a score, measured in the bins of the histogram (dots), and by the affine map "
        "with the least Cllr (line). Where they part, an affine map of scores to probabilities is wrong."
    )
    return figure("Calibration", svg, hint)


def _quality(results: Mapping[str, Result]) -> str:
    """FNMR after the pairs of the lowest quality were discarded."""
    found = {of: result.facts["quality"] for of, result in results.items() if result.facts.get("quality")}
    if not found:
        return ""
    lines = [Line(of if len(results) > 1 else "FNMR", one["discarded"], one["fnmr"]) for of, one in found.items()]
    one = next(iter(found.values()))
    svg = chart(
        lines,
        name="Quality",
        x=Scale("share of genuine pairs discarded", "discarded", kind="share", snug=True),
        y=Scale("FNMR", ends=(0,), kind="share"),
    )
    by = "the column quality" if one["by"] == "column" else "the norm of the embedding"
    hint = f"FNMR at the threshold of FMR {rate_name(one['fmr'])}, without the pairs of the lowest quality by {by}."
    return figure("Quality", svg, f"{hint} A curve that falls says that the quality tells the pairs that are missed.")


# -- figures -----------------------------------------------------------------------------------------------------------


def _figures(name: str, results: Mapping[str, Result]) -> str:
    """All figures, those of parts of the benchmark folded."""
    every = dict.fromkeys(figure for result in results.values() for figure in result.figures)
    head = ["figure", *(list(results) if len(results) > 1 else ["value"])]
    tables = []
    for title, is_part in ((f"Figures of {name}", False), (f"Figures of the parts of {name}", True)):
        rows = [
            [one, *(figure_text(one, result.figures.get(one)) for result in results.values())]
            for one in every
            if ("/" in one) == is_part
        ]
        tables.append(table(title, head, rows) if rows else "")
    parts = folded("Parts of the benchmark", tables[1]) if tables[1] else ""
    return f'<div class="card figures">{tables[0]}</div>{parts}'


def _groups(name: str, of: str, result: Result) -> str:
    """FMR and FNMR of each group at the common threshold, and FMR between the groups."""
    at = result.facts.get("groups_at")
    if not at:
        return ""
    found: dict[str, dict[str, Figure]] = {"fmr": {}, "fnmr": {}}
    for key, one in result.figures.items():
        group, _, rate = key.rpartition("/")
        if group and rate in found:
            found[rate][group] = one
    panels = []
    for rate, words in (("fmr", "False match rate"), ("fnmr", "False non-match rate")):
        drawn = [Bar(of, one.value, one.low, one.high) for of, one in found[rate].items() if one.value is not None]
        most = max([row.high or row.value for row in drawn] + [1e-6])
        content = bars(drawn, 0.0, most, Scale(rate, kind="share").words)
        panels.append(f'<div class="card"><b>{words} of each group</b>{content}</div>')
    suffix = f", {of}" if of else ""
    rows = [[group, *(figure_text(rate, found[rate].get(group)) for rate in ("fmr", "fnmr"))] for group in found["fmr"]]
    tables = table(f"Groups of {name}{suffix}", ["group", "FMR", "FNMR"], rows)
    if "cross_fmr" in at:
        cells = [
            [group, *("" if rate is None else f"{rate:.3g}" for rate in row)]
            for group, row in zip(at["groups"], at["cross_fmr"], strict=True)
        ]
        tables += table(f"FMR between groups of {name}{suffix}", ["group", *at["groups"]], cells)
    hint = (
        f"At one threshold for all, {at['cosine']:.3f}, set for FMR {rate_name(at['fmr'])} over all pairs. The lines "
        "are 95% intervals: where they overlap, the groups may be alike."
    )
    return (
        f'<h3>Groups{escape(suffix)}</h3><div class="grid wide">{"".join(panels)}</div>'
        f'<p class="hint">{hint}</p><div class="card figures">{tables}</div>'
    )


# -- hardest pairs -----------------------------------------------------------------------------------------------------


def _hardest(name: str, of: str, result: Result, images: Images | None) -> str:
    """The pairs with the most misleading scores: as pictures, or as a table of their names."""
    hardest = result.facts.get("hardest")
    if not hardest:
        return ""
    if images is not None and len(images) != result.facts.get("images"):
        raise InputError(
            f"The pictures given for {name} are not those that were evaluated: give the same benchmark for both."
        )
    threshold = _threshold(result.facts)
    suffix, parts = f", {of}" if of else "", []
    kinds = (
        ("impostor", "Most similar impostors (two people)"),
        ("genuine", "Least similar genuine pairs (one person)"),
    )
    if images is None:
        rows = [
            [f"{kind} {place}", f"{pair['score']:.4f}", *pair["names"]]
            for kind, _ in kinds
            for place, pair in enumerate(hardest.get(kind, ()), 1)
        ]
        title = f"Hardest pairs of {name}{suffix}"
        return folded(title, table(title, ["pair", "cosine", "first", "second"], rows))
    for kind, title in kinds:
        shown = "".join(_pair(pair, kind, threshold, images) for pair in hardest.get(kind, ()))
        parts.append(f'<h3>{title}{escape(suffix)}</h3><div class="faces">{shown}</div>')
    return "".join(parts)


def _pair(pair: Mapping[str, Any], kind: str, threshold: float | None, images: Images) -> str:
    """Two pictures and their score."""
    shown = []
    for row, place in zip(pair["rows"], ("first", "second"), strict=True):
        with contextlib.suppress(UnreadableImage):
            shown.append(f'<img src="{data_uri(images.image(row))}" alt="{place} picture, {escape(images.name(row))}">')
    is_accepted = None if threshold is None else pair["score"] >= threshold
    words = ""
    if is_accepted is not None:
        mistake = f'<span class="wrong">wrongly {"accepted" if is_accepted else "rejected"}</span>'
        words = ", decided rightly" if is_accepted == (kind == "genuine") else f", {mistake}"
    # Of a path, the folder and the file; of "image 3 of a/b/lfw.bin" the number too.
    first, second = (escape(re.sub(r"\S*/(?=[^/]+/[^/]+$)", "", name)) for name in pair["names"])
    return (
        f'<figure><div class="two">{"".join(shown)}</div>cosine {pair["score"]:.3f}{words}<br>'
        f'<span class="soft">{first} and {second}</span></figure>'
    )
