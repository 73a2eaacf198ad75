"""A head and its optimizer on disk: one folder in the format of checkpoints, read at any world size.

`save_head` and `load_head` serve loops of one's own. The checkpoints of a training hold the same rows and the same
"head" in their state, so that `load_head` reads them too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from partialfc.checkpoint.format import MANIFEST
from partialfc.checkpoint.read import Checkpoint, leftovers
from partialfc.checkpoint.write import Snapshot, save_folder
from partialfc.core.device import DTYPES, dtype_name
from partialfc.core.errors import InputError
from partialfc.core.files import replaceable
from partialfc.distributed.collectives import Group, Shard, gather_json
from partialfc.head.margins import MARGINS
from partialfc.head.optim import RowwiseAdamW, RowwiseSGD
from partialfc.head.partial_fc import PartialFC

RowwiseOptimizer = RowwiseSGD | RowwiseAdamW
T = TypeVar("T")
_OWN_FILES = re.compile(rf"{re.escape(MANIFEST)}|head-\d+-of-\d+\.safetensors")


def save_head(head: PartialFC, optimizer: Optimizer | None, folder: str | Path) -> None:
    """Write the whole head: all rows and their optimizer state, step, seed and margin state. Every rank calls it.

    Args:
        head: on every rank its shard.
        optimizer: the `RowwiseSGD` or `RowwiseAdamW` that holds the centers, also as Fabric or Accelerate wrap it; None
            to save the centers alone.
        folder: for this head alone, on storage that all ranks share; it appears when it is complete, and replaces an
            earlier one.

    Raises:
        InputError: the optimizer is another one, or the folder holds other files; on all ranks alike.
        CheckpointNotWritten: it could not be written (a full disk, say), on all ranks alike; an earlier folder stays.
    """
    path = replaceable(folder)

    def prepare() -> RowwiseOptimizer | None:
        files = [path] if path.is_file() else list(path.iterdir()) if path.is_dir() else []
        for file in files:
            if not (path.is_dir() and _OWN_FILES.fullmatch(file.name)):
                raise InputError(f"Saving the head would delete {file}: give save_head a folder of its own.")
        return _unwrap(head, optimizer)

    rowwise = _on_all_ranks(prepare, head.shard.group)
    rows, state = head_rows(head, rowwise), {"head": head_state(head, rowwise)}
    save_folder(path, Snapshot(state["head"]["step"], {}, row_shard(head), rows, state))


def load_head(
    folder: str | Path,
    head: PartialFC | None = None,
    optimizer: Optimizer | None = None,
    *,
    group: Group | None = None,
    device: torch.device | str | None = None,
) -> PartialFC:
    """Load what `save_head` wrote, at any world size. Every rank calls it.

    Args:
        folder: the one given to `save_head`, or a checkpoint of a training.
        head: the head to load into; None builds one as the saved one was.
        optimizer: as for `save_head`; its learning rate and other options become the saved ones, of which a checkpoint
            of a training has none. None leaves the optimizer state out.
        group, device: of a new head.

    Returns:
        `head`, or the new one.

    Raises:
        InputError: head or optimizer are not as they were saved, and nothing has changed; or the files are damaged, and
            the rows may have changed. On all ranks alike.
    """

    def prepare() -> tuple[Checkpoint, PartialFC, RowwiseOptimizer | None]:
        path = Path(folder)
        if not path.exists():
            replaced = leftovers(path, "old") if path.parent.is_dir() else []  # by a process that died before the end
            if not replaced:
                raise InputError(f"There is no folder {path}: give the one that save_head wrote.")
            path = replaced[0]
        checkpoint = Checkpoint(path)
        loaded = head if head is not None else _build(checkpoint, group, device)
        rowwise = _unwrap(loaded, optimizer)
        _check_matches(checkpoint, loaded, rowwise)
        return checkpoint, loaded, rowwise

    group = group if head is None else head.shard.group
    checkpoint, loaded, rowwise = _on_all_ranks(prepare, group)
    _on_all_ranks(lambda: restore_head(checkpoint, loaded, rowwise, options=True), group)
    return loaded


def row_shard(head: PartialFC) -> Shard:
    """The range of global rows of the centers that this rank has."""
    shard, k = head.shard, head.loss_config.margin.sub_centers
    return Shard(shard.start * k, shard.stop * k, shard.total * k, shard.group)


def head_rows(head: PartialFC, optimizer: RowwiseOptimizer | None) -> dict[str, Tensor]:
    """This rank's rows of the centers and of their optimizer state, after all pending updates."""
    state: dict[str, Tensor] = {}
    if optimizer is None:
        head.center_state.flush(head.centers)
    else:
        optimizer.flush()  # also waits for a GPU that still writes state in host memory
        state = optimizer.row_state(head.centers)
    return {"centers": head.centers.detach(), **state}


def head_state(head: PartialFC, optimizer: RowwiseOptimizer | None) -> dict[str, Any]:
    """What JSON can hold of a head and its optimizer: `identity` must match where it is loaded."""
    config = head.loss_config
    name = next((name for name, margin in MARGINS.items() if margin is type(config.margin)), None)
    return {
        "step": head.steps_taken(),
        "identity": {
            "num_classes": head.num_classes,
            "embedding_dim": head.embedding_dim,
            "seed": head.seed,
            "margin": re.sub(r" at 0x\w+", "", repr(config.margin)),  # without addresses of functions
            **({} if optimizer is None else {"optimizer": type(optimizer).__name__}),
        },
        "margin_state": {name: value.tolist() for name, value in head.margin_state().items()},
        "options": {
            "sample_rate": head.sample_rate,
            "sampler": head.sampler,
            "margin": None if name is None else {"name": name, **asdict(config.margin)},
            "scale": config.scale,
            "conflict_threshold": config.conflict_threshold,
            "conflict_as_zero_logit": config.conflict_as_zero_logit,
            "operand_dtype": dtype_name(config.operand_dtype),
            "update": head.update,
        },
        "optimizer_options": {} if optimizer is None else _options(_parameter_group(head, optimizer)),
    }


def restore_head(
    checkpoint: Checkpoint, head: PartialFC, optimizer: RowwiseOptimizer | None, *, options: bool = False
) -> None:
    """Restore what `head_rows` and `head_state` put into a checkpoint, at any world size. No collective.

    Args:
        options: whether the optimizer's options become the saved ones.

    Raises:
        InputError: the head or the optimizer does not match; nothing has changed.
        DamagedCheckpoint: the rows may have changed in part.
    """
    _check_matches(checkpoint, head, optimizer)
    saved = _saved_state(checkpoint)
    if optimizer is not None and options:
        group = _parameter_group(head, optimizer)
        for name, value in saved["optimizer_options"].items():
            if isinstance(group.get(name), Tensor):
                group[name].fill_(value)  # a captured graph reads this tensor
            else:
                group[name] = tuple(value) if isinstance(value, list) else value
    for name, tensor in head_rows(head, optimizer).items():
        checkpoint.read_rows(name, row_shard(head).start, tensor)
    for name, value in saved["margin_state"].items():
        buffer = head.get_buffer(f"margin_{name}")
        buffer.copy_(torch.tensor(value, dtype=buffer.dtype))
    head.step = saved["step"]


def _check_matches(checkpoint: Checkpoint, head: PartialFC, optimizer: RowwiseOptimizer | None) -> None:
    """Raise InputError unless the checkpoint holds this head and optimizer."""
    saved = _saved_state(checkpoint)
    for name, value in head_state(head, optimizer)["identity"].items():
        if (there := saved["identity"].get(name)) != value:
            raise InputError(f"{checkpoint.folder} holds {name} {there}, not {value}: build it as it was saved.")
    for name, tensor in head_rows(head, optimizer).items():
        if (dtype := checkpoint.row_dtypes.get(name)) != tensor.dtype:
            there, here = (dtype_name(dtype) if dtype else "none", dtype_name(tensor.dtype))
            raise InputError(f"{checkpoint.folder} holds {name} in {there}, not {here}: build it as it was saved.")


def _saved_state(checkpoint: Checkpoint) -> dict[str, Any]:
    if "head" not in checkpoint.state:
        raise InputError(f"{checkpoint.folder} does not say how its head was built: save it with this version.")
    state: dict[str, Any] = checkpoint.state["head"]
    return state


def _build(checkpoint: Checkpoint, group: Group | None, device: torch.device | str | None) -> PartialFC:
    """A head like the saved one."""
    state = _saved_state(checkpoint)
    identity, options = state["identity"], dict(state["options"])
    if options["margin"] is None:
        raise InputError(f"partialfc does not know the margin {identity['margin']}: build the head and pass it.")
    arguments = dict(options.pop("margin"))
    options["operand_dtype"] = DTYPES[options["operand_dtype"]]
    return PartialFC(
        identity["num_classes"],
        identity["embedding_dim"],
        seed=identity["seed"],
        margin=MARGINS[arguments.pop("name")](**arguments),
        dtype=checkpoint.row_dtypes["centers"],
        group=group,
        device=device,
        **options,
    )


def _unwrap(head: PartialFC, optimizer: Any) -> RowwiseOptimizer | None:
    """The head's optimizer, out of the wrappers of Fabric and Accelerate."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if isinstance(optimizer, RowwiseOptimizer):
        _parameter_group(head, optimizer)
    elif optimizer is not None:
        kind = type(optimizer).__name__
        raise InputError(f"The head's state is kept by RowwiseSGD or RowwiseAdamW, not {kind}: pass that one, or None.")
    return optimizer


def _parameter_group(head: PartialFC, optimizer: RowwiseOptimizer) -> dict[str, Any]:
    for group in optimizer.param_groups:
        if any(parameter is head.centers for parameter in group["params"]):
            return group
    raise InputError("The optimizer does not hold the centers of this head: pass the one made of head.parameters().")


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """The options of a parameter group that JSON can hold, a tensor as its number."""
    values = {name: value.item() if isinstance(value, Tensor) else value for name, value in group.items()}
    return {name: value for name, value in values.items() if isinstance(value, bool | int | float | str | tuple | None)}


def _on_all_ranks(work: Callable[[], T], group: Group | None) -> T:
    """The result of `work`, which does not communicate; an InputError on any rank is raised on all. Two collectives."""
    message = None
    try:
        result = work()
    except InputError as error:
        message = str(error)
    messages = [message for message in gather_json(message, group=group) if message is not None]
    if messages:
        raise InputError(messages[0])
    return result
