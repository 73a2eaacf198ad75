"""The model card of a hub folder: front matter for programs, and what a person should know."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from partialfc.core.errors import InputError
from partialfc.evaluation.statistics.figures import rate_name
from partialfc.evaluation.statistics.thresholds import Thresholds
from partialfc.model.config import ModelConfig
from partialfc.model.contract import same_source

_TASK = {"type": "face-verification", "name": "Face verification"}
_LIMITS = """Errors differ between groups of people, and with pose, age, light and image quality: measure them
with `partialfc evaluate` on people and images like those of the use. Recognising people may need
their consent and a legal ground."""


def read_results(path: Path, contract: str) -> Mapping[str, Any]:
    """The benchmarks in a `results.json` of `evaluate --out`, by name.

    Raises:
        InputError: it is none, or its results are those of another model or of several.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        benchmarks, measured = dict(content["benchmarks"]), str(content["contract"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} holds no results of one model ({error!r}): evaluate the model alone, with --out."
        ) from error
    if not same_source(measured, contract):
        raise InputError(f"{path} holds the results of another model (contract {measured[:12]}…): evaluate this one.")
    return benchmarks


def model_card(
    name: str,
    config: ModelConfig,
    contract: str,
    benchmarks: Mapping[str, Any],
    thresholds: Thresholds | None,
) -> str:
    """The text of a model card, Markdown with YAML front matter.

    Args:
        name: of the model.
        benchmarks: results by name, as `read_results` gives them. A figure becomes a metric of the `model-index`, with
            its FAR, and the ends of its interval, among the `args`.
    """
    matter: dict[str, Any] = {
        "library_name": "partialfc",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["face-recognition", "face-verification", "partial-fc", config.backbone],
    }
    if index := [_result(benchmark, content) for benchmark, content in benchmarks.items()]:
        matter["model-index"] = [{"name": name, "results": index}]
    front = yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)
    flip = "f(x) + f(mirrored x)" if config.flip else "f(x)"
    facts = {
        "Network": f"{config.backbone}, embeddings of {config.embedding_dim} numbers",
        "Input": f"aligned faces of {config.image_size} × {config.image_size} pixels, template {config.template}, "
        f"channels {config.color_order}, (x / 255 − {config.mean:g}) / {config.std:g}",
        "Embedding": f"{flip}, compared by the cosine",
        "Trained on": "; ".join(config.trained_on) or "unknown",
        "Contract": f"`{contract}`",
    }
    parts = [f"# {name}", "\n".join(f"- {key}: {value}" for key, value in facts.items())]
    if config.saw_only_procedural:
        parts.append(
            "**This model has seen drawings alone, procedural faces of people who do not exist. It decides nothing "
            "about photographs.**"
        )
    usage = [
        "from partialfc import load_model",
        "",
        'model = load_model("FOLDER")',
        'answer = model.verify("a.png", "b.png")',
    ]
    parts += ["## Use", "\n".join(["```python", *usage, "print(answer.text())", "```"])]
    if rows := _rows(benchmarks):
        heading = "| benchmark | figure | value | 95 % interval |\n|---|---|---|---|"
        parts += ["## Measured", "\n".join([heading, *rows])]
    if thresholds is not None:
        parts += ["## Thresholds", _thresholds(thresholds)]
    return "\n\n".join([f"---\n{front}---", *parts, "## Limits", _LIMITS]) + "\n"


def _result(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    metrics = []
    for figure, measured in content["figures"].items():
        if measured["value"] is None:
            continue
        kind, is_at, rate = figure.rpartition("@")[2].partition("=")  # of "tar@far=1e-4"
        arguments = {kind: float(rate)} if is_at else {}
        arguments |= {end: measured[end] for end in ("low", "high") if measured.get(end) is not None}
        metrics.append({"type": figure, "value": measured["value"], "name": figure, "args": arguments})
    return {"task": dict(_TASK), "dataset": {"name": name, "type": name}, "metrics": metrics}


def _rows(benchmarks: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, content in benchmarks.items():
        for figure, measured in content["figures"].items():
            if measured["value"] is not None:
                low, high = measured.get("low"), measured.get("high")
                interval = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
                rows.append(f"| {name} | {figure} | {measured['value']:.4g} | {interval} |")
    return rows


def _thresholds(thresholds: Thresholds) -> str:
    lines = [f"Measured on {thresholds.measured_on.get('name')}; `thresholds.json` has the intervals.", ""]
    lines += ["| FMR | cosine | FNMR there |", "|---|---|---|"]
    for row in thresholds.thresholds:
        if row.cosine is not None:
            lines.append(f"| {rate_name(row.target)} | {row.cosine:.4f} | {row.fnmr.value:.3g} |")
    return "\n".join(lines)
