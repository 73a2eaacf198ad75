"""The published training, imitated in a few plain lines: one process that plays all ranks, dense SGD, its own files.

Nothing of partialfc but the networks is used, so that what a migrated run computes can be compared with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CONFIG = """\
from easydict import EasyDict as edict

config = edict()
config.margin_list = {margin}
config.network = "{network}"
config.embedding_size = {width}
config.sample_rate = {rate}
config.batch_size = {batch}
config.lr = {lr}
config.optimizer = "{optimizer}"
config.weight_decay = 5e-4
config.momentum = 0.9
config.num_classes = {classes}
config.num_image = 123456
config.num_epoch = 20
config.warmup_epoch = 0
config.rec = "{data}"
config.val_targets = []
"""


class PublishedTraining:
    """A run of `world_size` ranks with `batch` images each.

    Args:
        margin: (m2, m3) of cos(θ + m2) − m3, without autograd, as published.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        width: int,
        *,
        world_size: int,
        total: int,
        warmup: int = 0,
        power: float = 2.0,
        lr: float = 0.01,
        margin: tuple[float, float] = (0.0, 0.4),
        optimizer: str = "sgd",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        generator = torch.Generator().manual_seed(5)
        self.backbone = backbone.to(dtype).train()
        self.weight = nn.Parameter(torch.randn(classes, width, generator=generator, dtype=dtype) * 0.01)
        self.world_size, self.total, self.warmup, self.power, self.lr = world_size, total, warmup, power, lr
        self.margin, self.done = margin, 0
        groups: list[dict[str, Any]] = [{"params": list(backbone.parameters())}, {"params": [self.weight]}]
        self.optimizer: torch.optim.Optimizer
        if optimizer == "sgd":
            self.optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=5e-4)
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=5e-4)

    def rate(self, step: int) -> float:
        """The published schedule; its first step takes the full rate."""
        if step == 0:
            return self.lr
        if step <= self.warmup:
            return self.lr * step / self.warmup
        return self.lr * (1 - (step - self.warmup) / (self.total - self.warmup)) ** self.power

    def step(self, images: Sequence[Tensor], labels: Sequence[Tensor], classes: Tensor, scale: float = 64.0) -> float:
        """One step with the images and labels of each rank and the sampled classes: the loss."""
        embeddings, own = torch.cat([self.backbone(part) for part in images]), torch.cat(list(labels))
        targets = torch.searchsorted(classes, own)
        cosine = functional.normalize(embeddings) @ functional.normalize(self.weight[classes]).T
        rows = torch.arange(len(own))
        with torch.no_grad():
            target = cosine[rows, targets]
            with_margin = torch.cos(torch.arccos(target) + self.margin[0]) - self.margin[1]
            shift = torch.zeros_like(cosine)
            shift[rows, targets] = with_margin - target
        probability = torch.softmax(scale * (cosine + shift), dim=1)[rows, targets]
        assert probability.detach().min() > 1e-30  # below, the published value of the loss is clamped, and ours is not
        loss = -probability.log().mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.backbone.parameters(), 5)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.done)
        self.optimizer.step()
        self.done += 1
        return float(loss.detach())

    def save(self, folder: Path) -> Path:
        """Write `checkpoint_gpu_<rank>.pt` of every rank; the first ranks have one class more."""
        folder.mkdir(parents=True, exist_ok=True)
        state = self.optimizer.state_dict()
        number = state["param_groups"][1]["params"][0]
        whole = state["state"].get(number, {})
        scheduler: dict[str, Any] = {"total_iters": self.total, "power": self.power, "warmup_iters": self.warmup}
        scheduler |= {"base_lrs": [self.lr, self.lr], "last_epoch": self.done, "_step_count": self.done + 1}
        start = 0
        for rank in range(self.world_size):
            rows = slice(
                start, start + len(self.weight) // self.world_size + (rank < len(self.weight) % self.world_size)
            )
            start = rows.stop
            shard = {key: value[rows].clone() if value.ndim else value for key, value in whole.items()}
            content = {
                "epoch": 1,
                "global_step": self.done,
                "state_dict_backbone": self.backbone.state_dict(),
                "state_dict_softmax_fc": {"weight": self.weight.detach()[rows].clone()},
                "state_optimizer": {**state, "state": {**state["state"], number: shard}},
                "state_lr_scheduler": scheduler,
            }
            torch.save(content, folder / f"checkpoint_gpu_{rank}.pt")
        return folder

    def write_config(self, path: Path, data: Path, network: str, batch: int, rate: float) -> Path:
        """Write a configuration file of this run."""
        values = {"network": network, "width": self.weight.shape[1], "classes": len(self.weight), "lr": self.lr}
        optimizer = "sgd" if isinstance(self.optimizer, torch.optim.SGD) else "adamw"
        values |= {"margin": (1.0, *self.margin), "data": data, "batch": batch, "rate": rate, "optimizer": optimizer}
        path.write_text(CONFIG.format(**values))
        return path


def random_step(training: PublishedTraining, batch: int, size: int, seed: int) -> float:
    """A step with random images, labels and a sample of the classes."""
    generator, classes = torch.Generator().manual_seed(seed), len(training.weight)
    shape = (training.world_size, batch, 3, size, size)
    images = torch.randn(shape, generator=generator, dtype=training.weight.dtype)
    labels = torch.randint(classes, shape[:2], generator=generator)
    drawn = torch.randperm(classes, generator=generator)[: classes // 3]
    return training.step(list(images), list(labels), torch.cat([labels.flatten(), drawn]).unique())
