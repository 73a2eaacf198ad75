"""The state of a run, and how it is saved to a checkpoint and restored."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from partialfc.checkpoint.format import MANIFEST
from partialfc.checkpoint.read import Checkpoint
from partialfc.checkpoint.write import Snapshot
from partialfc.core.errors import InputError
from partialfc.core.schema import check_schema_version
from partialfc.distributed.sharded import shard_like
from partialfc.head.files import head_rows, head_state, restore_head, row_shard
from partialfc.head.optim import RowwiseAdamW, RowwiseSGD
from partialfc.head.partial_fc import PartialFC
from partialfc.training.nonfinite import LossScale
from partialfc.training.replicas import load_weights, whole_network

_SCHEMA_VERSION = 1  # of the state in the manifest
_SAVED_COUNTERS = ("skipped", "best_score", "best_step", "best_by", "pending_evaluation")


@dataclass
class TrainState:
    """Tensors and counters of a run.

    Attributes:
        data: what must be the same when the run is resumed, such as the number of images (`build.data_facts`).
        identities: their names in the order of the classes, None if the data has none.
        loss_scale: of float16, None in other precisions.
        average: the backbone with averaged weights, None if they are not averaged.
        skeleton: the backbone on the meta device if the backbone is sharded, None if each process has all of it.
        done: optimizer steps done; with the seed it is also the position in the data and in the sampling.
        skipped: steps left out because a gradient was not finite.
        best_score, best_step: the best mean accuracy over the benchmarks, and after which step.
        best_by: the names of these benchmarks, in alphabetical order; None if an earlier version did not save them.
        pending_evaluation: the run was stopped where an evaluation was due; on resume it comes first.
    """

    backbone: nn.Module
    head: PartialFC
    backbone_optimizer: Optimizer
    head_optimizer: RowwiseSGD | RowwiseAdamW
    data: dict[str, Any]
    identities: list[str] | None = None
    loss_scale: LossScale | None = None
    average: nn.Module | None = None
    skeleton: nn.Module | None = None
    done: int = 0
    skipped: int = 0
    best_score: float | None = None
    best_step: int | None = None
    best_by: list[str] | None = None
    pending_evaluation: bool = False

    def evaluated(self) -> nn.Module:
        """The network that is evaluated and saved as the model: the average if there is one.

        All ranks call it. Of a sharded backbone it is a full copy, which takes a collective for each parameter.
        """
        return whole_network(self.backbone if self.average is None else self.average, self.skeleton)

    def best_is_of_others(self, benchmarks: Collection[str]) -> bool:
        """Whether the best model was chosen by benchmarks with which these cannot be compared: it stays then."""
        return self.best_score is not None and (not benchmarks or self.best_by not in (None, sorted(benchmarks)))

    def snapshot(self, config: dict[str, Any]) -> Snapshot:
        """What a checkpoint of this moment holds; its tensors are those of the run, not copies, and may be sharded."""
        return Snapshot(
            self.done,
            tensors={
                "backbone": self.backbone.state_dict(),
                "backbone-optimizer": optimizer_tensors(self.backbone, self.backbone_optimizer),
                **({} if self.average is None else {"backbone-ema": self.average.state_dict()}),
            },
            shard=row_shard(self.head),
            rows=head_rows(self.head, self.head_optimizer),
            state={
                "schema_version": _SCHEMA_VERSION,
                "data": self.data,
                # The options follow from the configuration and the step.
                "head": {**head_state(self.head, self.head_optimizer), "optimizer_options": {}},
                **{name: getattr(self, name) for name in _SAVED_COUNTERS},
                "loss_scale": None if self.loss_scale is None else asdict(self.loss_scale),
                "config": config,
            },
            documents={} if self.identities is None else {"identities": self.identities},
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore a checkpoint, written at any world size.

        Raises:
            InputError: it belongs to other data or another head, or is of a newer version.
        """
        check_schema_version(checkpoint.folder / MANIFEST, checkpoint.state, _SCHEMA_VERSION)
        check_data_matches(checkpoint, self.data, self.identities)
        restore_head(checkpoint, self.head, self.head_optimizer)
        load_weights(self.backbone, checkpoint.tensors("backbone"))
        if self.average is not None:
            load_weights(self.average, checkpoint.tensors("backbone-ema"))
        load_optimizer_tensors(self.backbone, self.backbone_optimizer, checkpoint.tensors("backbone-optimizer"))
        if self.loss_scale is not None:
            self.loss_scale = LossScale(**checkpoint.state["loss_scale"])
        self.done = checkpoint.step
        for name in _SAVED_COUNTERS:
            setattr(self, name, checkpoint.state[name] if name != "best_by" else checkpoint.state.get(name))


def check_data_matches(checkpoint: Checkpoint, data: dict[str, Any], identities: list[str] | None) -> None:
    """Raise an InputError if the checkpoint was trained on other data than `data` describes.

    An older checkpoint lacks some facts; those, and names that one side lacks, are not compared.
    """
    saved = {"overlay_or_mixture": None, **checkpoint.state["data"]}
    for name in ("images", "classes", "image_size", "overlay_or_mixture"):
        if saved.get(name) != data[name]:
            what = name.replace("_", " ")
            raise _other_data(checkpoint, f"with {what} {saved.get(name)}, but now {what} is {data[name]}")
    same_names = saved.get("names_of_identities") == data["names_of_identities"]
    names = None if same_names else checkpoint.document("identities")
    if names is not None and identities is not None and names != identities:
        other = [label for label, pair in enumerate(zip(names, identities, strict=False)) if pair[0] != pair[1]] or [0]
        raise _other_data(
            checkpoint,
            f"whose class {other[0]} is {names[other[0]]}, but now that is {identities[other[0]]} ({len(other):,} "
            "classes have other names, so that labels would be permuted)",
        )
    before: dict[str, set[int]] = {}
    for label, digest in saved.get("samples", []):
        before.setdefault(digest, set()).add(label)
    moved = [(before[digest], label) for label, digest in data["samples"] if label not in before.get(digest, {label})]
    if moved:
        old, new = min(moved[0][0]), moved[0][1]
        raise _other_data(
            checkpoint,
            f"in which an image had label {old} that has {new} now ({len(moved)} of {len(data['samples'])} looked at)",
        )
    order, now = saved.get("order_of_the_samples", ""), data["order_of_the_samples"]
    if order.partition(" ")[0] == now.partition(" ")[0] and order != now:  # of another format, they cannot be compared
        raise _other_data(checkpoint, "with its images in another order or under other identities, as their files show")


def _other_data(checkpoint: Checkpoint, difference: str) -> InputError:
    return InputError(
        f"{checkpoint.folder} was trained on data {difference}: resume with the same data, or start a new run that "
        "takes this one's head over with head.from_run."
    )


def optimizer_tensors(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter name>.<state key>`."""
    return {
        f"{name}.{key}": value
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(module: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    names = dict(module.named_parameters())
    for full_name, value in tensors.items():
        name, key = full_name.rsplit(".", 1)
        parameter = names[name]
        if key != "step":
            value = shard_like(value.to(parameter.device), parameter)
        elif optimizer.defaults.get("fused"):  # otherwise the count of steps stays on the host
            value = value.to(parameter.device)
        optimizer.state[parameter][key] = value
