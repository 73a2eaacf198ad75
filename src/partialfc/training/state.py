"""Everything that a run must remember, and its way into a checkpoint and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from partialfc.core.errors import InputError
from partialfc.distributed.collectives import Shard
from partialfc.distributed.sharded import shard_like
from partialfc.head.optim import RowwiseAdamW, RowwiseSGD
from partialfc.head.partial_fc import PartialFC
from partialfc.training.checkpoint.read import Checkpoint
from partialfc.training.checkpoint.write import RowTensors, Snapshot
from partialfc.training.replicas import load_weights, whole_network
from partialfc.training.scaling import LossScale


@dataclass
class TrainState:
    """Tensors and counters of a run.

    Attributes:
        done: optimizer steps done; with the seed it is also the position in the data and in the sampling.
        skipped: steps left out because a gradient was not finite.
        best_score, best_step: the best mean accuracy over the benchmarks, and when.
        loss_scale: of float16, None in other precisions.
        pending_evaluation: the run was stopped where an evaluation was due, which comes first when it goes on.
        average: the backbone with averaged weights, None where they are not averaged.
        skeleton: the backbone on the meta device if it is in parts over the processes, None if each has all of it.
        facts: what must be the same when the run goes on, such as the number of images.
    """

    backbone: nn.Module
    head: PartialFC
    backbone_optimizer: Optimizer
    head_optimizer: RowwiseSGD | RowwiseAdamW
    facts: dict[str, Any]
    identities: list[str] | None = None
    loss_scale: LossScale | None = None
    average: nn.Module | None = None
    skeleton: nn.Module | None = None
    done: int = 0
    skipped: int = 0
    best_score: float | None = None
    best_step: int | None = None
    pending_evaluation: bool = False

    def evaluated(self) -> nn.Module:
        """The network that is evaluated and saved as model: the average if there is one. All ranks call it.

        If the networks are in parts it is a copy, which takes a collective for each parameter.
        """
        return whole_network(self.backbone if self.average is None else self.average, self.skeleton)

    def row_tensors(self) -> RowTensors:
        """The centers and their optimizer state, all up to date, with the global rows they are."""
        self.head_optimizer.flush()  # which also waits for a GPU that still writes state in host memory
        shard, k = self.head.shard, self.head.loss_config.margin.sub_centers
        rows = Shard(shard.start * k, shard.stop * k, shard.total * k, shard.group)
        return RowTensors(
            rows, {"centers": self.head.centers.detach(), **self.head_optimizer.row_state(self.head.centers)}
        )

    def snapshot(self, config: dict[str, Any]) -> Snapshot:
        """What a checkpoint of this moment holds; its tensors are those of the run, no copies, maybe in parts."""
        margin_state = {name: value.tolist() for name, value in self.head.margin_state().items()}
        return Snapshot(
            self.done,
            tensors={
                "backbone": self.backbone.state_dict(),
                "backbone-optimizer": optimizer_tensors(self.backbone, self.backbone_optimizer),
                **({} if self.average is None else {"backbone-ema": self.average.state_dict()}),
            },
            rows=self.row_tensors(),
            state={
                "facts": self.facts,
                "skipped": self.skipped,
                "head_step": self.head.step,
                "best_score": self.best_score,
                "best_step": self.best_step,
                "pending_evaluation": self.pending_evaluation,
                "margin_state": margin_state,
                "loss_scale": None if self.loss_scale is None else self.loss_scale.to_dict(),
                "config": config,
            },
            documents={} if self.identities is None else {"identities": self.identities},
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take everything from a checkpoint written at any world size.

        Raises:
            InputError: it belongs to other data.
        """
        check_facts(checkpoint, self.facts)
        load_weights(self.backbone, checkpoint.tensors("backbone"))
        if self.average is not None:
            load_weights(self.average, checkpoint.tensors("backbone-ema"))
        load_optimizer_tensors(self.backbone, self.backbone_optimizer, checkpoint.tensors("backbone-optimizer"))
        rows = self.row_tensors()
        for name, tensor in rows.tensors.items():
            checkpoint.read_rows(name, rows.shard.start, tensor)
        for name, value in checkpoint.state["margin_state"].items():
            buffer = self.head.get_buffer(f"margin_{name}")
            buffer.copy_(torch.tensor(value, dtype=buffer.dtype))
        if self.loss_scale is not None:
            self.loss_scale = LossScale(**checkpoint.state["loss_scale"])
        self.done = checkpoint.step
        self.head.step = checkpoint.state["head_step"]
        self.skipped = checkpoint.state["skipped"]
        self.best_score = checkpoint.state["best_score"]
        self.best_step = checkpoint.state["best_step"]
        self.pending_evaluation = checkpoint.state.get("pending_evaluation", False)


def check_facts(checkpoint: Checkpoint, facts: dict[str, Any]) -> None:
    """Raise an InputError if the checkpoint was trained on other data than `facts` tell of."""
    for name, value in facts.items():
        saved = checkpoint.state["facts"].get(name)
        if saved != value:
            raise InputError(
                f"{checkpoint.folder} was trained on data with {name} {saved}, but now {name} is {value}: resume with "
                "the same data, or start a new run that takes this one's head over with head.from_run."
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
        # A count of steps stays on the host unless a fused update reads it; all else lives beside its parameter.
        beside = key != "step" or bool(optimizer.defaults.get("fused"))
        parameter = names[name]
        moved = value.to(parameter.device if beside else value.device)
        optimizer.state[parameter][key] = shard_like(moved, parameter) if key != "step" else moved
