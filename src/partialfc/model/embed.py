"""Images to embeddings: those in memory, and any number of them from a storage into a feature file."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from partialfc.core.console import Progress
from partialfc.core.device import DTYPES
from partialfc.core.errors import InputError
from partialfc.data.augment import normalise
from partialfc.data.images import UnreadableImage
from partialfc.data.loader import read_ahead
from partialfc.data.sources.base import Source, read_image
from partialfc.distributed.activity import report_progress
from partialfc.distributed.collectives import all_gather_rows, gather_json, rank_of, world_size_of
from partialfc.model.config import ModelConfig
from partialfc.model.contract import contract_of, variant_of
from partialfc.model.features import Features, FeatureWriter, describe, read_features
from partialfc.model.files import Model

Precision = Literal["float32", "bfloat16", "float16"]
_READ, _UNREADABLE, _REFUSED = range(3)  # the state of an image


def embed(model: Model, images: np.ndarray | Tensor, *, flip: bool | None = None, batch_size: int = 256) -> Tensor:
    """Embeddings of aligned images: f(x) + f(flipped x), as the LFW and IJB protocols take them, or f(x).

    Args:
        model: its backbone runs in evaluation mode; afterwards each of its layers is in the mode it was in.
        images: uint8 (N, S, S, 3) RGB, with S the model's `image_size`.
        flip: add the embedding of the mirrored image; by default as the model's configuration says.
        batch_size: images in one pass.

    Returns:
        float32 (N, D), not normalised, on the model's device.

    Raises:
        InputError: the images are of another size than the model's.
    """
    model = model.with_flip(flip)
    result = torch.empty(len(images), model.config.embedding_dim, device=model.device)
    for number, embeddings in enumerate(embed_batches(model, images, batch_size=batch_size)):
        result[number * batch_size : (number + 1) * batch_size] = embeddings
    return result


def embed_batches(model: Model, images: np.ndarray | Tensor, *, batch_size: int = 256) -> Generator[Tensor, None, None]:
    """The same embeddings, (B, D) a batch. The backbone is in evaluation mode until the iterator ends or is closed."""
    check_images(images, model.config)
    with evaluation_mode(model.backbone):
        for start in range(0, len(images), batch_size):
            embeddings = embed_batch(model, images[start : start + batch_size])
            report_progress()
            yield embeddings


@contextmanager
def evaluation_mode(backbone: nn.Module) -> Iterator[None]:
    """The backbone is in evaluation mode inside; afterwards each of its layers is in the mode it was in."""
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@torch.inference_mode()
def embed_batch(model: Model, images: np.ndarray | Tensor, precision: Precision = "float32") -> Tensor:
    """The embeddings (B, D), float32, of one batch, by a backbone that is in evaluation mode.

    Args:
        precision: of the backbone's arithmetic, by autocast; both passes of a mirrored pair are added in float32.
    """
    pixels = images if isinstance(images, Tensor) else torch.from_numpy(np.array(images))
    dtype = next((parameter.dtype for parameter in model.backbone.parameters()), torch.float32)
    inputs = prepare(pixels.to(model.device), model.config).to(dtype)
    is_reduced = precision != "float32"
    with torch.autocast(model.device.type, DTYPES[precision] if is_reduced else None, enabled=is_reduced):
        embeddings = _wide(model.backbone(inputs))
        if model.config.flip:
            embeddings = embeddings + _wide(model.backbone(inputs.flip(3)))
    return embeddings.float()


def _wide(output: Tensor) -> Tensor:
    """At least float32."""
    return output.to(torch.promote_types(output.dtype, torch.float32))


def check_images(images: np.ndarray | Tensor, config: ModelConfig) -> None:
    """Raise an InputError unless `images` are (N, S, S, 3) with S the `image_size` of `config`."""
    size = config.image_size
    if images.ndim != 4 or tuple(images.shape[1:]) != (size, size, 3):
        size_found = " × ".join(str(length) for length in images.shape[1:3])
        raise InputError(
            f"The images are {size_found} pixels but the model takes {size} × {size}: "
            f"align them to {size} × {size}, or use a model trained at their size."
        )


def prepare(images: Tensor, config: ModelConfig) -> Tensor:
    """Normalise images as the backbone's training did: uint8 (B, S, S, 3) RGB to float32 (B, 3, S, S)."""
    return adapt(normalise(images), config)


def adapt(prepared: Tensor, config: ModelConfig) -> Tensor:
    """From red, green and blue in [-1, 1] to the order and scale that the backbone takes: (B, 3, S, S)."""
    if config.color_order == "bgr":
        prepared = prepared.flip(1)
    if (config.mean, config.std) != (0.5, 0.5):  # normalise gives (x - 0.5) / 0.5
        prepared = (prepared * 0.5 + (0.5 - config.mean)) / config.std
    return prepared


# -- from a storage into a file ----------------------------------------------------------------------------------------


class Images(Protocol):
    """Numbered images, read in any order and by several processes."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The name of an image in messages; a resumed run must find the same names."""
        ...

    def image(self, index: int) -> NDArray[np.uint8]:
        """An image, uint8 (H, W, 3) RGB.

        Raises:
            UnreadableImage: it cannot be read, which makes it a failure to enrol.
            InputError: it is wrong, which ends the work.
        """
        ...


@dataclass(frozen=True)
class SourceImages:
    """The images of a `Source`, without their labels."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """As `Images.name`."""
        return self.source.name(index)

    def image(self, index: int) -> NDArray[np.uint8]:
        """As `Images.image`."""
        return read_image(self.source, index)[1]


def embed_source(
    model: Model,
    images: Images,
    path: str | Path,
    *,
    source: str,
    names: list[str] | None = None,
    batch_size: int = 256,
    precision: Precision = "float32",
    workers: int = 2,
    quiet: bool = False,
) -> Features:
    """Embed any number of images, on all ranks, into a feature file, and go on where an interrupted call was.

    The images are cut into the same batches at any world size, and the ranks take whole batches in turn: the file does
    not depend on the world size, as long as the ranks compute alike. An interrupted call, see `FeatureWriter`, is
    continued, at any world size, if model, names of the images, precision and batch size are the same; the images must
    be too. An image that cannot be read gets a row of zeros and is listed as failed. One collective for a batch of
    every rank, and four small ones.

    Args:
        path: the `.npy` file, in a folder that all ranks see; a finished one is replaced.
        source: what the images are, in words, for the sidecar.
        names: a name for each row, for the sidecar.
        precision: of the backbone's arithmetic; less than float32 makes a variant of the model's contract.
        workers: reading processes of each rank; 0 reads in the rank itself.
        quiet: no progress display.

    Raises:
        InputError: on all ranks alike: an image is not of the model's size, an embedding is not finite, or an argument
            is impossible.
        OSError: the file cannot be written.
    """
    _check_arguments(images, source, names, batch_size, precision)
    path, contract, is_main_process = Path(path), contract_of(model), rank_of() == 0
    variant = contract if precision == "float32" else variant_of(contract, precision)
    shape = (len(images), model.config.embedding_dim)
    facts = describe(shape, variant, mirrored=model.config.flip, source=source)
    work = {"batch_size": batch_size, "images": _hash_of_names(images)}
    with ExitStack() as stack:
        writer = stack.enter_context(closing(FeatureWriter(path, facts, work))) if is_main_process else None
        done: int = gather_json(writer.rows if writer else 0)[0]
        rounds = stack.enter_context(closing(_embed_rounds(model, images, done, batch_size, precision, workers)))
        progress = stack.enter_context(Progress("embedding", len(images), quiet=quiet or not is_main_process))
        progress.update(done)
        for embeddings, failed in rounds:
            if writer:
                writer.append(embeddings.numpy(), failed)
            progress.update(done := done + len(embeddings))
            report_progress()
        if writer:
            if writer.failed:
                first = images.name(writer.failed[0])
                progress.message(
                    f"{len(writer.failed):,} of {len(images):,} images cannot be read; the first is {first}"
                )
            writer.publish(names)
    gather_json(None)  # the file is there
    return read_features(path, contract)


def _check_arguments(images: Images, source: str, names: list[str] | None, batch_size: int, precision: str) -> None:
    if precision not in get_args(Precision):
        raise InputError(f"precision is {precision!r}: choose one of {', '.join(get_args(Precision))}.")
    if batch_size < 1:
        raise InputError(f"The batch size is {batch_size}: give a positive number.")
    if not len(images) or len(names or images) != len(images):
        raise InputError(f"{source} has {len(images)} images: give at least one, and a name for each or none.")


def _hash_of_names(images: Images) -> str:
    digest = hashlib.sha256()
    for index in range(len(images)):
        digest.update(images.name(index).encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def _embed_rounds(
    model: Model, images: Images, first: int, batch_size: int, precision: Precision, workers: int
) -> Generator[tuple[Tensor, list[int]], None, None]:
    """The embeddings from image `first` on, a batch of each rank a time, on every rank.

    Yields:
        float32 (n, D) on the host, and the rows among them whose image cannot be read. One collective.
    """
    world_size, rank, size = world_size_of(), rank_of(), model.config.image_size
    starts = range(first, len(images), batch_size)
    read = partial(_read_batch, images, size, batch_size)
    with evaluation_mode(model.backbone), closing(read_ahead(starts[rank::world_size], read, workers)) as batches:
        for start in starts[::world_size]:
            cuts = [min(start + batch_size * number, len(images)) for number in range(world_size + 1)]
            counts = [stop - begin for begin, stop in pairwise(cuts)]
            own = torch.empty(0, model.config.embedding_dim + 1, device=model.device)
            if counts[rank]:
                pixels, states = next(batches)
                own = torch.cat([embed_batch(model, pixels, precision), states.to(model.device)[:, None]], dim=1)
            rows = all_gather_rows(own, counts).cpu()
            embeddings, states = rows[:, :-1].contiguous(), rows[:, -1]
            if refused := (states == _REFUSED).nonzero().flatten().tolist():
                index = start + refused[0]
                _read_one(images, size, index)  # raises what the reading process met, on all ranks
                raise InputError(f"{images.name(index)} has changed while it was read: leave it alone until the end.")
            embeddings[states == _UNREADABLE] = 0.0
            if not bool((finite := embeddings.isfinite().all(dim=1)).all()):
                name = images.name(start + int(finite.int().argmin()))
                raise InputError(
                    f"The embedding of {name} is not finite in {precision}: use a model saved before it diverged, or "
                    "a wider precision."
                )
            yield embeddings, (states == _UNREADABLE).nonzero().flatten().tolist()


def _read_batch(images: Images, size: int, batch_size: int, start: int) -> tuple[Tensor, Tensor]:
    """Pixels uint8 (B, S, S, 3) from image `start` on, and the state of each image, float32 (B,)."""
    stop = min(start + batch_size, len(images))
    pixels, states = np.zeros((stop - start, size, size, 3), np.uint8), np.full(stop - start, _READ, np.float32)
    for row, index in enumerate(range(start, stop)):
        try:
            pixels[row] = _read_one(images, size, index)
        except UnreadableImage:
            states[row] = _UNREADABLE
        except InputError:
            states[row] = _REFUSED
    return torch.from_numpy(pixels), torch.from_numpy(states)


def _read_one(images: Images, size: int, index: int) -> NDArray[np.uint8]:
    """One image; an InputError names it if it is not of `size`."""
    image = images.image(index)
    if image.shape != (size, size, 3):
        raise InputError(
            f"{images.name(index)} is {image.shape[1]} × {image.shape[0]} pixels but the model takes {size} × {size}: "
            f"align the images to {size} × {size}, or use a model trained at their size."
        )
    return image
