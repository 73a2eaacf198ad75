"""The training loop: the only place where data, backbone, head and evaluation meet."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from partialfc.data.augment import augment
from partialfc.data.loader import Batch
from partialfc.distributed import broadcast, gather_json, process_group, rank_of, split_evenly, world_size_of
from partialfc.errors import InputError, JobError
from partialfc.evaluation.benchmarks import read_benchmarks
from partialfc.evaluation.pairs import evaluate_pair_set
from partialfc.head.partial_fc import NonFiniteEmbeddings
from partialfc.keyed_random import derive_key
from partialfc.model import Model, ModelConfig, save_model
from partialfc.training.assemble import build_state, choose_device, open_loader, wants_bf16
from partialfc.training.checkpoint import load_latest
from partialfc.training.config import TrainConfig
from partialfc.training.metrics_log import MetricsLog
from partialfc.training.progress import TrainingProgress
from partialfc.training.run_folder import open_run_folder
from partialfc.training.schedule import learning_rate

_MOST_SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves to say; its models and metrics are in the folder.

    Attributes:
        steps, images: optimizer steps and images in all, those before a resume included.
        seconds: wall time of this process, start-up included.
        images_per_second: of this process's training steps alone, over all ranks; None if there was none to do.
        benchmarks: the last result on each benchmark, by name.
        best_score, best_step: the best mean accuracy over the benchmarks, and after which step.
    """

    folder: Path
    steps: int
    images: int
    seconds: float
    images_per_second: float | None
    benchmarks: dict[str, dict[str, Any]]
    best_score: float | None
    best_step: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {**asdict(self), "folder": str(self.folder)}

    def text(self) -> str:
        """The result for people."""
        speed = f", {self.images_per_second:,.0f} images/s" if self.images_per_second else ""
        lines = [f"{self.steps:,} steps, {self.images:,} images in {self.seconds:,.0f} s{speed}"]
        for name, result in self.benchmarks.items():
            lines.append(f"{name}: accuracy {result['accuracy']:.2%} ± {result['accuracy_std']:.2%}")
        lines.append(f"best model (step {self.best_step}): {self.folder / 'model' / 'best'}")
        return "\n".join(lines)


def train(
    config: TrainConfig,
    out: Path,
    *,
    benchmarks: Mapping[str, Path] | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> TrainResult:
    """Train, evaluating on the way; in every process of a torchrun launch.

    Args:
        config: what to train.
        out: the run folder, new or, with `resume`, that of a run with the same configuration.
        benchmarks: verification files by name.
        resume: go on from the newest whole checkpoint, or start if there is none.
        quiet: no progress display.

    Raises:
        InputError: before anything is trained, for what is wrong with the configuration, the data or the folder.
        JobError: the training failed.
    """
    config.check()
    device = choose_device(config.device)
    with process_group(device):
        return _Trainer(config, out, benchmarks or {}, device, resume=resume, quiet=quiet).run()


@dataclass
class _Clock:
    """Where the time between two lines of the log went; evaluation and checkpoints stop it."""

    started: float
    waited: float = 0.0
    images: int = 0

    @staticmethod
    def start() -> _Clock:
        return _Clock(time.monotonic())

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """The next micro-batch, the wait for it counted."""
        before = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - before
        return batch

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        before = time.monotonic()
        yield
        self.started += time.monotonic() - before

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


class _Trainer:
    """One run in one process."""

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        benchmarks: Mapping[str, Path],
        device: torch.device,
        *,
        resume: bool,
        quiet: bool,
    ) -> None:
        self.clock_of_run = _Clock.start()
        self.config, self.device, self.quiet = config, device, quiet
        self.world_size, self.leads = world_size_of(), rank_of() == 0
        self.loader = open_loader(config)
        backbone = config.backbone
        self.model_config = ModelConfig(backbone.name, backbone.embedding_dim, self.loader.image_size)
        self.benchmarks = read_benchmarks(benchmarks, self.model_config)
        self.folder = open_run_folder(out, config, resume=resume)
        self.state = build_state(config, self.loader, device)
        self.bf16 = wants_bf16(config.precision, device)
        self.notes: list[str] = []
        if resume:
            load_latest(self.folder.checkpoints, self.state.restore, warn=self.notes.append)
        self.network: nn.Module = self.state.backbone
        if self.world_size > 1:
            # BatchNorm's statistics are those of rank 0's batches and travel when they are used, not in every step.
            self.network = DistributedDataParallel(
                self.state.backbone, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.total_steps = max(1, round(config.schedule.epochs * self.loader.steps_per_epoch))
        self.buffers_before = [buffer.clone() for buffer in self.state.backbone.buffers()]
        self.results: dict[str, dict[str, Any]] = {}
        self.images_done, self.seconds_done = 0, 0.0
        self.skipped_in_a_row = 0

    def run(self) -> TrainResult:
        """All steps that are left, and what falls due on the way."""
        state, output = self.state, self.config.output
        first = state.done
        batches = self.loader.batches(first, self.total_steps)
        with (
            MetricsLog(self.folder.metrics, resume_step=first, enabled=self.leads) as self.log,
            TrainingProgress(self.total_steps, "training", quiet=self.quiet or not self.leads) as self.progress,
        ):
            for note in [*self.notes, self._description(first)]:
                self.progress.message(note)
            self.progress.update(first)
            clock = _Clock.start()
            while state.done < self.total_steps:
                figures = self._step([clock.next_batch(batches) for _ in range(self.loader.micro_steps)])
                state.done += 1
                clock.images += self.config.data.global_batch_size
                if self._is_due(output.log_every):
                    clock = self._report(figures, clock)
                with clock.stopped():
                    if self._is_due(output.evaluate_every):
                        self._evaluate()
                    if self._is_due(output.checkpoint_every):
                        state.save(self.folder.checkpoints, self.config.to_dict(), output.keep)
            if first >= self.total_steps:
                self._evaluate()
        return self._result()

    # -- one step ----------------------------------------------------------------------------------------------------

    def _step(self, micro_batches: list[Batch]) -> dict[str, Tensor]:
        """One optimizer step: forward and backward of its micro-steps, then both optimizers, or neither."""
        state, step = self.state, self.state.done
        # Whatever draws from torch's own generator, such as dropout, draws the same after a resume.
        torch.manual_seed(derive_key(self.config.seed, "step", step, rank_of()))
        self.lr = self._learning_rate(step)
        self.lr_head = self.lr * self.config.optimizer.head_lr_factor
        for optimizer, lr in ((state.backbone_optimizer, self.lr), (state.head_optimizer, self.lr_head)):
            for group in optimizer.param_groups:
                group["lr"] = lr
        state.head.step = step
        state.backbone.train()
        buffers = list(state.backbone.buffers())
        torch._foreach_copy_(self.buffers_before, buffers)
        figures = self._forward_and_backward(micro_batches)
        if figures and bool(torch.isfinite(figures["grad_norm"])):
            state.backbone_optimizer.step()
            state.head_optimizer.step()
            self.skipped_in_a_row = 0
        else:
            torch._foreach_copy_(buffers, self.buffers_before)  # BatchNorm has seen what was not finite
            self._skip()
        state.backbone_optimizer.zero_grad()
        state.head_optimizer.zero_grad()
        return figures

    def _forward_and_backward(self, micro_batches: list[Batch]) -> dict[str, Tensor]:
        """Leave the gradients of one optimizer step, the backbone's clipped; its figures, none if they are not finite.

        The ranks exchange the backbone's gradient in the last micro-step only.
        """
        total = torch.zeros(3, dtype=torch.float64, device=self.device)
        for number, batch in enumerate(micro_batches):
            share = self._images_in_micro_step(number) / self.config.data.global_batch_size
            synchronise = number == len(micro_batches) - 1
            try:
                with contextlib.nullcontext() if synchronise else self._without_synchronisation():
                    loss = self._loss(batch)
                    (loss * share).backward()
            except NonFiniteEmbeddings:
                return {}
            seen = self.state.head.figures
            if seen is not None:
                total += share * torch.stack([loss.detach().double(), seen.target_cosine, seen.conflict_share])
        norm = torch.nn.utils.clip_grad_norm_(
            self.state.backbone.parameters(), self.config.optimizer.max_grad_norm or float("inf")
        )
        return {"loss": total[0], "target_cosine": total[1], "conflict_share": total[2], "grad_norm": norm}

    def _loss(self, batch: Batch) -> Tensor:
        """The mean loss of one micro-step over all ranks."""
        images = batch.images.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        positions = batch.positions.to(self.device, non_blocking=True)
        inputs = augment(images, positions, self.config.seed, flip=self.config.data.flip)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            embeddings = self.network(inputs.contiguous(memory_format=torch.channels_last))
        loss: Tensor = self.state.head(embeddings.float(), labels)
        return loss

    def _images_in_micro_step(self, number: int) -> int:
        """Images of one micro-step over all ranks, whose shares may be uneven."""
        total = 0
        for rank in range(self.world_size):
            start, stop = split_evenly(self.config.data.global_batch_size, self.world_size, rank)
            first, last = split_evenly(stop - start, self.loader.micro_steps, number)
            total += last - first
        return total

    def _without_synchronisation(self) -> contextlib.AbstractContextManager[None]:
        if isinstance(self.network, DistributedDataParallel):
            return self.network.no_sync()
        return contextlib.nullcontext()

    def _learning_rate(self, step: int) -> float:
        schedule = self.config.schedule
        return learning_rate(
            step,
            base=self.config.peak_lr(),
            total_steps=self.total_steps,
            warmup_steps=round(schedule.warmup_epochs * self.loader.steps_per_epoch),
            schedule=schedule.kind,
            power=schedule.power,
        )

    def _skip(self) -> None:
        """Count a step whose gradient is not finite; what shows it is the same on all ranks, so all come here."""
        self.state.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= _MOST_SKIPPED_IN_A_ROW:
            raise JobError(
                f"{self.skipped_in_a_row} steps in a row, up to step {self.state.done}, had gradients that are not "
                "finite: lower optimizer.lr or check the data; the checkpoints hold none of these steps."
            )

    # -- what falls due on the way -----------------------------------------------------------------------------------

    def _is_due(self, every: int) -> bool:
        """Whether something falls due after the steps done: every so many, or once an epoch for 0, and at the end."""
        done, images, batch = self.state.done, len(self.loader), self.config.data.global_batch_size
        if done == self.total_steps:
            return True
        if every:
            return done % every == 0
        return done * batch // images > (done - 1) * batch // images

    def _report(self, figures: dict[str, Tensor], clock: _Clock) -> _Clock:
        """Write a line of metrics, check the unreadable records of all ranks, and start a new clock."""
        state = self.state
        names = {name for rank in gather_json(sorted(self.loader.unreadable), self.device) for name in rank}
        if len(names) > self.loader.max_unreadable:
            raise InputError(
                f"{len(names)} records cannot be read, more than the {self.loader.max_unreadable} that "
                f"data.max_unreadable allows; one is {min(names)}."
            )
        values = {name: float(value) for name, value in figures.items()}
        line: dict[str, Any] = {
            "kind": "train",
            "step": state.done,
            "epoch": state.done / self.loader.steps_per_epoch,
            **values,
            "lr": self.lr,
            "lr_head": self.lr_head,
            "images_per_second": clock.images / clock.seconds,
            "data_wait": clock.waited / clock.seconds,
            "sampled_classes": state.head.figures.sampled if state.head.figures else 0,
            "skipped_steps": state.skipped,
            "unreadable": len(names),
        }
        if self.device.type == "cuda":
            line["gpu_peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
        self.log.write(line)
        shown = ("epoch", "loss", "target_cosine", "lr", "images_per_second", "data_wait")
        self.progress.update(state.done, **{name: line[name] for name in shown if name in line})
        self.images_done += clock.images
        self.seconds_done += clock.seconds
        return _Clock.start()

    def _evaluate(self) -> None:
        """Run the benchmarks on all ranks; keep the model as the last one and, if no other was better, the best."""
        state = self.state
        for buffer in state.backbone.buffers():
            broadcast(buffer)
        model = Model(state.backbone, self.model_config)
        for name, pairs in self.benchmarks.items():
            result = evaluate_pair_set(model, pairs).summary()
            self.results[name] = result
            self.log.write({"kind": "evaluation", "step": state.done, "benchmark": name, **result})
            self.progress.message(
                f"step {state.done}: {name} accuracy {result['accuracy']:.2%} ± {result['accuracy_std']:.2%}"
            )
        score = sum(result["accuracy"] for result in self.results.values()) / max(1, len(self.results))
        is_best = state.best_score is None or score > state.best_score or not self.benchmarks
        if is_best:
            state.best_score, state.best_step = score if self.benchmarks else None, state.done
        if self.leads:
            save_model(self.folder.model("last"), state.backbone, self.model_config)
            if is_best:
                save_model(self.folder.model("best"), state.backbone, self.model_config)

    # -- words -------------------------------------------------------------------------------------------------------

    def _description(self, first: int) -> str:
        config, loader = self.config, self.loader
        start = f"resumed at step {first}" if first else "new run"
        return (
            f"{start}: {config.backbone.name} on {len(loader):,} images of {loader.num_classes:,} identities, "
            f"{self.total_steps:,} steps of {config.data.global_batch_size}, {config.describe_lr()}, "
            f"{self.world_size} x {self.device.type} in {'bf16' if self.bf16 else 'float32'}"
        )

    def _result(self) -> TrainResult:
        state = self.state
        return TrainResult(
            folder=self.folder.root,
            steps=state.done,
            images=state.done * self.config.data.global_batch_size,
            seconds=self.clock_of_run.seconds,
            images_per_second=self.images_done / self.seconds_done if self.seconds_done else None,
            benchmarks=self.results,
            best_score=state.best_score,
            best_step=state.best_step,
        )
