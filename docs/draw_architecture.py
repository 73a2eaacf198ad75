"""Draws docs/images/architecture.svg: the floors of the package, and the walk of one image and one label through them.

    python docs/draw_architecture.py

The floors are the layers of the import contract in pyproject.toml, so the picture cannot differ from what is checked.
"""

from __future__ import annotations

import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "architecture.svg"

# One line a room, beside its name.
ROOMS = {
    "cli": "one file a command: options in, results out, no logic of its own",
    "demo": "the whole job on procedural faces",
    "finetune": "the whole job on one's own people",
    "report": "runs and results as HTML pages; needs no trainer",
    "use": "what one does with a trained model",
    "audit": "what is wrong with a data set",
    "training": "loop, step, state, saver, run folder: where all parts meet",
    "plan": "predicted memory and step time",
    "bench": "the project's own measurements",
    "config": "options (the dataclasses) and recipes",
    "faces": "renderer of procedural faces",
    "evaluation": "protocols and metrics; they know no training loop",
    "model": "a trained model as a folder; embeddings of images",
    "head": "sampled margin softmax, its optimizers",
    "backbones": "networks, one file a family",
    "data": "sources, loader, augmentation",
    "checkpoint": "sharded tensors in verified files",
    "similarity": "blockwise scans of cosines",
    "distributed": "collectives, rendezvous, heartbeats: every distributed fact",
    "pages": "template, axes and plots of every page",
    "core": "errors, keyed random numbers, atomic files, progress, device",
}

# (room, file, what happens, what comes out), in the order of the walk.
WALK = [
    ("data", "data/loader.py", "which sample comes next", "index i"),
    ("data", "data/sources/", "reads it from storage", "encoded bytes, label y"),
    ("data", "data/images.py", "decodes it in a worker", "uint8 (S, S, 3), label y"),
    ("data", "data/augment.py", "mirrors, normalises (device)", "images (B, 3, S, S)"),
    ("backbones", "backbones/", "runs the network", "embeddings (B, D)"),
    ("distributed", "distributed/collectives.py", "gathers from all ranks", "embeddings (G, D), y (G)"),
    ("head", "head/sampling.py", "positives, random negatives", "classes of this rank"),
    ("head", "head/margins/", "margin on the cosine to y", "target logits t (G)"),
    ("head", "head/backends/", "sums negatives tile by tile", "Z (G), over all ranks"),
    ("head", "head/loss.py", "softplus(log Z − s t)", "loss and its gradients"),
    ("training", "training/step.py", "backward, both optimizers", "only sampled centers move"),
    ("training", "training/saver.py", "each rank writes its shard", "step-00001234/"),
]

WIDTH, MARGIN, GAP = 1000, 24, 8
FLOOR_HEIGHT, STEP_HEIGHT, STEP_GAP, PER_ROW = 42, 84, 26, 4
LIGHT = {"paper": "#ffffff", "ink": "#1c2330", "soft": "#55606f", "box": "#f1f4f8", "edge": "#c3ccd8"}
DARK = {"paper": "#12161d", "ink": "#e8ecf2", "soft": "#a3aebd", "box": "#1d242e", "edge": "#3b4757"}
COLOURS = {  # of the rooms that the walk passes: light, dark
    "data": ("#dcefe3", "#1d3a2a"),
    "backbones": ("#dfe9fb", "#1d3050"),
    "distributed": ("#fdebd2", "#4a3518"),
    "head": ("#f9dfe2", "#4b2229"),
    "training": ("#ece2f8", "#38284f"),
}


def floors() -> list[list[str]]:
    """The rooms of each floor from top to bottom."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = [layer.split(" | ") for layer in contract["contracts"][0]["layers"]]
    rooms = [[name.strip().removeprefix("partialfc.") for name in layer] for layer in layers]
    return [layer for layer in rooms if layer != ["__main__"]]


def style() -> str:
    """The style sheet, for light and dark surroundings."""

    def rules(colours: dict[str, str], theme: int) -> str:
        boxes = "".join(f".{room}{{fill:{COLOURS[room][theme]}}}" for room in COLOURS)
        return (
            f".paper{{fill:{colours['paper']}}}.box{{fill:{colours['box']};stroke:{colours['edge']}}}{boxes}"
            f"text{{fill:{colours['ink']}}}.soft{{fill:{colours['soft']}}}"
            f".way{{stroke:{colours['soft']};fill:none}}.tip{{fill:{colours['soft']}}}"
        )

    fonts = (
        "text{font:13px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif}"
        ".name{font-weight:600}.title{font-size:15px;font-weight:600}.small{font-size:12px}"
    )
    return f"{fonts}{rules(LIGHT, 0)}@media(prefers-color-scheme:dark){{{rules(DARK, 1)}}}"


def box(x: float, y: float, width: float, height: float, room: str) -> str:
    kind = f"box {room}" if room in COLOURS else "box"
    return f'<rect class="{kind}" x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height:.0f}" rx="6"/>'


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    place = f'x="{x:.0f}" y="{y:.0f}"' + (f' text-anchor="{anchor}"' if anchor != "start" else "")
    return f"<text {place}" + (f' class="{kind}"' if kind else "") + f">{escape(words)}</text>"


def draw_floors(top: float) -> tuple[list[str], float]:
    """The floors as rows of boxes, and where they end."""
    inside = WIDTH - 2 * MARGIN
    parts, y = [text(MARGIN, top, "Floors: a module imports only from floors below its own", "title")], top + 14
    for rooms in floors():
        width = (inside - GAP * (len(rooms) - 1)) / len(rooms)
        for number, room in enumerate(rooms):
            x = MARGIN + number * (width + GAP)
            parts.append(box(x, y, width, FLOOR_HEIGHT, room))
            if len(rooms) < 3:
                parts += [text(x + 12, y + 26, room, "name"), text(x + 112, y + 26, ROOMS[room], "soft")]
            else:
                parts += [text(x + 12, y + 17, room, "name"), text(x + 12, y + 34, ROOMS[room], "small soft")]
        y += FLOOR_HEIGHT + GAP
    return parts, y


def draw_walk(top: float) -> tuple[list[str], float]:
    """The steps of the walk in rows that run to and fro, and where they end."""
    inside = WIDTH - 2 * MARGIN
    width = (inside - STEP_GAP * (PER_ROW - 1)) / PER_ROW
    parts = [text(MARGIN, top, "One image and its label in a training step", "title")]
    for number, (room, file, what, result) in enumerate(WALK):
        row, column = divmod(number, PER_ROW)
        backwards = row % 2 == 1
        x = MARGIN + (PER_ROW - 1 - column if backwards else column) * (width + STEP_GAP)
        y = top + 16 + row * (STEP_HEIGHT + STEP_GAP)
        parts.append(box(x, y, width, STEP_HEIGHT, room))
        parts += [
            text(x + 10, y + 23, f"{number + 1}  {file}", "name"),
            text(x + 10, y + 45, what, "small"),
            text(x + 10, y + 66, f"→ {result}", "small soft"),
        ]
        if number + 1 < len(WALK):
            parts.append(arrow(x, y, width, backwards, column == PER_ROW - 1))
    rows = -(-len(WALK) // PER_ROW)
    return parts, top + 16 + rows * (STEP_HEIGHT + STEP_GAP)


def arrow(x: float, y: float, width: float, backwards: bool, down: bool) -> str:
    """From a step to the next one: to the side, or down at the end of a row."""
    if down:
        start, end = (x + width / 2, y + STEP_HEIGHT), (x + width / 2, y + STEP_HEIGHT + STEP_GAP)
    elif backwards:
        start, end = (x, y + STEP_HEIGHT / 2), (x - STEP_GAP, y + STEP_HEIGHT / 2)
    else:
        start, end = (x + width, y + STEP_HEIGHT / 2), (x + width + STEP_GAP, y + STEP_HEIGHT / 2)
    (x0, y0), (x1, y1) = start, end
    return f'<line class="way" x1="{x0:.0f}" y1="{y0:.0f}" x2="{x1:.0f}" y2="{y1:.0f}" marker-end="url(#tip)"/>'


def draw() -> str:
    """The whole picture."""
    upper, y = draw_floors(36)
    lower, bottom = draw_walk(y + 36)
    label = "The floors of partialfc, and the way of one image and its label through them"
    tip = (
        '<marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path class="tip" d="M0 0 8 4 0 8z"/></marker>'
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom:.0f}" role="img" aria-label="{label}">',
        f"<style>{style()}</style><defs>{tip}</defs>",
        f'<rect class="paper" width="{WIDTH}" height="{bottom:.0f}" rx="10"/>',
        *upper,
        *lower,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
