"""What `data inspect` finds, as a page with pictures."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from partialfc.core.errors import InputError
from partialfc.core.files import output_errors, write_file
from partialfc.data.augment import augmented_sheet
from partialfc.data.images import UnreadableImage, data_uri
from partialfc.data.sources.base import Source, read_image
from partialfc.pages.template import definition_list, is_page, render_page

_SAMPLES = 24  # pictures that show what the set looks like
_COLUMNS = 10  # of a picture of augmentations
_PER_GROUP = 6  # pictures of a group of duplicates


def check_outputs(page: Path | None, picture: Path | None) -> None:
    """Refuse, with an InputError, a page or a picture of augmentation that could not be written."""
    for out in (page, picture):
        if out is not None and not out.absolute().parent.is_dir():
            raise InputError(f"There is no folder {out.absolute().parent} to write {out.name} into: make it first.")
    if page is not None and page.exists() and not is_page(page):
        raise InputError(f"{page} exists and is no page of partialfc: give another file.")
    if picture is not None and picture.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        raise InputError(f"{picture} is no name of a picture: give one that ends in .jpg or .png.")


def write_page(out: str | Path, facts: dict[str, Any], source: Source, *, pictures: bool = True) -> None:
    """Write one HTML page about a training set, complete in itself.

    Args:
        out: the file to write.
        facts: what `inspect` returned.
        source: the set.
        pictures: False leaves faces out.

    Raises:
        InputError: `out` is a file that is no such page, or cannot be written.
    """
    out = Path(out)
    check_outputs(out, None)
    names = ("images", "classes", "unreadable", "grey", "not_upright")
    figures = [(name.replace("_", " "), f"{facts[name]:,}") for name in names]
    figures += [("format", facts["format"]), ("SHA-256 of labels and pixels", facts["sha256_of_decoded"])]
    body = [
        f'<ul class="card notes">{"".join(f"<li>{escape(sentence)}</li>" for sentence in facts["advice"])}</ul>',
        f'<h2>Figures</h2><div class="card">{definition_list(figures)}</div>',
        '<div class="grid">',
        *[
            _bars(title, facts[name])
            for title, name in (
                ("Images an identity", "images_per_class"),
                ("Sizes, width × height", "sizes"),
                ("Brightness, percentiles", "brightness"),
            )
        ],
        "</div>",
        _sample_pictures(source) if pictures else "",
        _duplicates(facts["duplicates"], source, pictures),
        _unreadable(facts["unreadable_records"]),
    ]
    footer = "Written by partialfc data inspect. The page is complete in itself and loads nothing."
    page = render_page(f"Training set: {source.path.name}", str(source.path), "\n".join(body), footer)
    with output_errors(out):
        write_file(out, page.encode("utf-8", "replace"))


def write_augmented(out: Path, source: Source) -> None:
    """Write a picture of some images and what each preset of augmentation makes of them, as JPEG or PNG by its suffix.

    Raises:
        InputError: no image can be read, or the file cannot be written.
    """
    images: list[np.ndarray] = []
    for index in np.linspace(0, len(source) - 1, min(_SAMPLES, len(source)), dtype=np.int64).tolist():
        with suppress(UnreadableImage):
            image = read_image(source, index)[1]
            if image.shape[0] == image.shape[1] and image.shape == (images or [image])[0].shape:
                images.append(image)
    if not images:
        raise InputError(f"None of the images of {source.path} that were tried is square and readable: align them.")
    sheet = augmented_sheet(torch.from_numpy(np.stack(images[:_COLUMNS])), seed=0)
    try:
        Image.fromarray(sheet.numpy()).save(out, quality=88)
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot write {out}: {error}.") from error


def _bars(title: str, values: dict[str, int]) -> str:
    most = max([*values.values(), 1])
    rows = "".join(
        f'<div class="row"><div>{escape(name)}</div><div class="track">'
        f'<div class="fill" style="width:{100 * value / most:.1f}%"></div></div>'
        f'<div class="value">{value:,}</div></div>'
        for name, value in values.items()
    )
    return f'<div class="card"><b>{escape(title)}</b><div class="bars">{rows}</div></div>'


def _sample_pictures(source: Source) -> str:
    indices = np.linspace(0, len(source) - 1, min(_SAMPLES, len(source)), dtype=np.int64).tolist()
    return f'<h2>Images, spread over the set</h2><div class="faces">{"".join(_figures(source, indices))}</div>'


def _figures(source: Source, indices: Iterable[int]) -> list[str]:
    figures = []
    for index in indices:
        try:
            sample, image = read_image(source, index)
        except UnreadableImage:
            continue
        figures.append(
            f'<figure><img src="{data_uri(image)}" alt="image {index}">class {sample.label}<br>'
            f'<span class="soft">{escape(sample.name)}</span></figure>'
        )
    return figures


def _duplicates(facts: dict[str, Any], source: Source, pictures: bool) -> str:
    counts = [(name.replace("_", " "), f"{facts[name]:,}") for name in facts if name != "groups"]
    parts = [f'<h2>Duplicates</h2><div class="card">{definition_list(counts)}</div>']
    for group in facts["groups"]:
        kinds = ", ".join(sorted(set(group["kinds"])))
        parts.append(f"<h3>{len(group['records'])} images, {kinds}</h3>")
        if pictures:
            parts.append(f'<div class="faces">{"".join(_figures(source, group["records"][:_PER_GROUP]))}</div>')
        else:
            lines = zip(group["names"][:_PER_GROUP], group["labels"], strict=False)
            items = "".join(f"<li>{escape(name)}, class {label}</li>" for name, label in lines)
            parts.append(f'<ul class="card notes">{items}</ul>')
    return "".join(parts)


def _unreadable(reasons: list[str]) -> str:
    items = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    return f'<h2>Unreadable records</h2><ul class="card notes">{items}</ul>' if reasons else ""
