"""The training loop: the only place where data, backbone, head and evaluation meet."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from partialfc.checkpoint.read import Checkpoint, load_latest
from partialfc.config.options import TrainConfig, parse_steps
from partialfc.core.console import Progress, counted
from partialfc.core.device import peak_bytes
from partialfc.core.errors import InputError, JobError, StoppedBySignal
from partialfc.distributed.activity import activity
from partialfc.distributed.collectives import (
    broadcast,
    gather_json,
    has_store,
    host_group,
    rank_of,
    start_max,
    world_size_of,
)
from partialfc.distributed.heartbeat import HeartbeatMonitor
from partialfc.distributed.signals import StopSignals
from partialfc.evaluation.pairs import embed_share, evaluate_pairs, gather_shares
from partialfc.evaluation.run import read_benchmarks
from partialfc.head.files import head_rows
from partialfc.model.files import Model, save_model
from partialfc.training.build import build_state, check_batch, model_config_of, open_loader, remarks
from partialfc.training.initialize import fill_with_class_means, initialize, is_resumable, write_identities
from partialfc.training.nonfinite import describe_skip
from partialfc.training.run.folder import open_run_folder
from partialfc.training.run.launch import check_same_data, joined
from partialfc.training.run.log import MetricsLog, SlowData, log_start, open_trackers
from partialfc.training.saver import CheckpointWriter
from partialfc.training.step import Stepper
from partialfc.training.timing import StepClock, StepProfiler, TrainResult

_ABANDON_SECONDS = 10.0  # for a checkpoint that is being written when the run fails; the other ranks may be dead
_CHECKPOINT_TIMEOUT_SECONDS = 7 * 86400.0
_SHOWN_FIGURES = ("epoch", "loss", "target_cosine", "lr", "images_per_second", "data_wait")


def train(
    config: TrainConfig,
    out: Path,
    *,
    benchmarks: Mapping[str, Path] | None = None,
    resume: bool = False,
    verify: bool = False,
    quiet: bool = False,
) -> TrainResult:
    """Train, evaluating on the way; in every process of a torchrun launch.

    Args:
        config: what to train.
        out: the run folder, new or, with `resume`, that of a run with the same configuration.
        benchmarks: verification files by name.
        resume: continue from the newest whole checkpoint, or start if there is none.
        verify: with `resume`, first verify every byte of that checkpoint, also those that no rank needs.
        quiet: no progress display.

    Raises:
        InputError: before anything is trained, for what is wrong with the configuration, the data or the folder.
        StoppedBySignal: SIGTERM or SIGINT came to any process; the state is saved.
        JobError: the training failed.
    """
    config, benchmarks = config.with_backbone(), benchmarks or {}
    with StopSignals() as signals, contextlib.ExitStack() as stack:
        with signals.exit_on_signal():
            seconds = _collective_timeout(config)
            device = stack.enter_context(
                joined(config, benchmarks, resume=resume, verify=verify, timeout_seconds=seconds)
            )
        processes = config.processes
        heartbeats = HeartbeatMonitor(processes.heartbeat_timeout_seconds, processes.timeout_seconds)
        try:
            stack.enter_context(heartbeats)
            with activity("opening data, networks and run folder"):
                trainer = _Trainer(config, out, benchmarks, device, signals, stack, resume, verify, quiet)
            return trainer.run()
        except RuntimeError as error:
            explanation = heartbeats.explain(error)
            if explanation is None:
                raise
            raise explanation from error


def _collective_timeout(config: TrainConfig) -> float:
    """Seconds after which a collective fails by itself: later than `HeartbeatMonitor`, which can name the cause."""
    return config.processes.timeout_seconds + 60


class _Trainer:
    """One run in one process. `stack` closes what it opens."""

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        benchmarks: Mapping[str, Path],
        device: torch.device,
        signals: StopSignals,
        stack: contextlib.ExitStack,
        resume: bool,
        verify: bool,
        quiet: bool,
    ) -> None:
        self.started = time.monotonic()
        self.config, self.device, self.signals = config, device, signals
        self.loader = open_loader(config)
        check_same_data(self.loader)
        self.model_config = model_config_of(config, self.loader)
        self.benchmarks = read_benchmarks(benchmarks, self.model_config)
        self.results: dict[str, dict[str, Any]] = {}
        check_batch(config, self.loader)
        resumes = resume and is_resumable(out, self.loader)
        self.state = build_state(config, self.loader, device)
        old_classes = None if resumes else initialize(self.state, config, self.loader)
        # Nothing is written before all of it is known to fit.
        self.folder = stack.enter_context(open_run_folder(out, config, resume=resume))
        if old_classes is not None and config.head.new_centers == "mean":
            fill_with_class_means(self.state, old_classes, config, self.loader)
        notes = self._restore(verify) if resume else []
        # Writing a checkpoint may take hours as long as it makes progress, which `HeartbeatMonitor` watches.
        timeout = _CHECKPOINT_TIMEOUT_SECONDS if has_store() else _collective_timeout(config)
        self.writer = CheckpointWriter(
            self.folder.checkpoints,
            config.output.keep,
            asynchronous=config.output.checkpoint_async,
            group=host_group(timeout),
            report=None if config.output.on_checkpoint_error == "stop" else self._report_unsaved,
        )
        self.writer.preallocate(head_rows(self.state.head, self.state.head_optimizer))
        self.control_group = host_group(_collective_timeout(config))
        self.stepper = Stepper(config, self.state, self.loader, device)
        self.total_steps = self.stepper.total_steps
        self._open_log(stack, quiet)
        if self.state.best_is_of_others(self.benchmarks):
            by = ", ".join(self.state.best_by or ["benchmarks"])
            notes.append(f"{by} chose the best model, that of step {self.state.best_step:,}; it stays without them")
        for note in [*remarks(self.loader, config), *notes, self.stepper.describe()]:
            self.progress.message(note)

    def _restore(self, verify: bool) -> list[str]:
        """Restore the newest whole checkpoint, if there is one; what the user should know of it."""
        notes: list[str] = []

        def read(checkpoint: Checkpoint) -> str:
            if verify:
                checkpoint.verify(rank_of(), world_size_of())
            self.state.restore(checkpoint)
            files, size = checkpoint.extent
            return f"{checkpoint.folder} is whole: all {size:,} bytes of its {files} files were read and compared"

        verified = load_latest(self.folder.checkpoints, read, warn=notes.append)
        return [*notes, verified or "there is no checkpoint to verify"] if verify else notes

    def _evaluates_first(self) -> bool:
        """Whether an evaluation comes before the next step: the state is at its due step, or at the end of the run."""
        return self.state.pending_evaluation or self.state.done >= self.total_steps

    def _open_log(self, stack: contextlib.ExitStack, quiet: bool) -> None:
        """Open metrics.jsonl, the trackers and the progress display, which stay empty but on rank 0."""
        config, first, is_main_process = self.config, self.state.done, rank_of() == 0
        log_start(self.folder.starts, first, self.device)
        trackers = open_trackers(config, self.folder.root, first, stack) if is_main_process else []
        metrics = MetricsLog(
            self.folder.metrics,
            resume_step=first,
            evaluates_again=self.benchmarks if self._evaluates_first() else (),
            patient=config.output.on_checkpoint_error == "continue",
            enabled=is_main_process,
            trackers=trackers,
        )
        progress = Progress("training", self.total_steps, unit=None, quiet=quiet or not is_main_process)
        self.metrics, self.progress = stack.enter_context(metrics), stack.enter_context(progress)
        self.signals.say = self.progress.message
        self.slow_data, self.unreadable_said = SlowData(config.data.workers), 0

    def run(self) -> TrainResult:
        """Train the steps that are left, with the evaluations and checkpoints that fall due."""
        state, first = self.state, self.state.done
        self.progress.update(first)
        stop, was_pending = self._agreed_signal(), state.pending_evaluation
        if not stop and self._evaluates_first():
            stop = self._evaluate()
            if was_pending and not stop and first >= self.total_steps:
                self._save(last=True)  # with the score, which the last checkpoint could not hold
        if stop:
            saved = f"with {first:,} steps done and saved; go on with --resume" if first else "before its first step"
            raise StoppedBySignal(stop, saved)
        clock = StepClock()
        try:
            self._train(clock)
        except BaseException:
            self.writer.abandon(_ABANDON_SECONDS)
            raise
        return TrainResult(
            folder=self.folder.root,
            steps=state.done,
            images=state.done * self.config.data.global_batch_size,
            seconds=time.monotonic() - self.started,
            images_per_second=clock.images_per_second,
            benchmarks=self.results,
            best_score=state.best_score,
            best_step=state.best_step,
        )

    def _train(self, clock: StepClock) -> None:
        state, output = self.state, self.config.output
        profiled = parse_steps(output.profile_steps) if rank_of() == 0 else range(0)
        with (
            contextlib.closing(self.loader.batches(state.done, self.total_steps)) as batches,
            contextlib.closing(StepProfiler(profiled, self.folder.root)) as profiler,
        ):
            while state.done < self.total_steps:
                finish_control_sync = self._start_control_sync()
                with profiler.step(state.done):
                    with activity(f"reading the images of step {state.done}"):
                        micro_batches = [clock.next_batch(batches) for _ in range(self.loader.micro_steps)]
                    with activity(f"computing step {state.done}"):
                        figures = self.stepper.step(micro_batches)
                state.done += 1
                clock.images += self.config.data.global_batch_size
                stop, minutes_passed, is_writing = finish_control_sync()
                self._report_skip()
                if self._is_due(output.log_every):
                    self._report(figures, clock)
                else:
                    self.progress.update(state.done)
                with clock.stopped():
                    if not is_writing:
                        self.writer.finish()
                    if self._is_due(output.evaluate_every):
                        # Set before evaluating, so a run stopped meanwhile repeats the evaluation on resume.
                        state.pending_evaluation = True
                        stop = stop or self._evaluate()
                    if stop:
                        self._save(last=True)
                        raise StoppedBySignal(stop, f"after step {state.done:,}, and saved; go on with --resume")
                    if minutes_passed or self._is_due(output.checkpoint_every):
                        self._save(last=state.done == self.total_steps)

    def _save(self, *, last: bool = False) -> None:
        self.writer.save(self.state.snapshot(self.config.to_dict()), last=last)

    # -- what the ranks must agree on ----------------------------------------------------------------------------------

    def _agreed_signal(self) -> int:
        """The signal that any rank has received, 0 for none, the same on all ranks. One collective."""
        return start_max([self.signals.received], self.control_group)()[0]

    def _start_control_sync(self) -> Callable[[], list[int]]:
        """Start to exchange what a single rank knows; the returned function gives the maxima over the ranks.

        They are the signal to stop, whether it is time for a checkpoint, and whether one is still being written. The
        exchange runs beside the step and costs it no time. One collective.
        """
        minutes = self.config.output.checkpoint_minutes
        due = minutes > 0 and rank_of() == 0 and time.monotonic() >= self.writer.saved_at + 60 * minutes
        return start_max([self.signals.received, due, self.writer.busy], self.control_group)

    def _count_unreadable(self) -> int:
        """The unreadable records that any rank has met. Two collectives.

        Raises:
            InputError: on all ranks, if there are more than the configuration allows.
        """
        names = {name for rank in gather_json(sorted(self.loader.unreadable), self.device) for name in rank}
        if len(names) > self.loader.max_unreadable:
            raise InputError(
                f"{len(names)} records cannot be read, more than the {self.loader.max_unreadable} that "
                f"data.max_unreadable allows; one is {min(names)}."
            )
        if len(names) > 2 * self.unreadable_said:  # of a thousand, ten lines
            self.unreadable_said = len(names)
            what = f"{counted(len(names), 'record')} cannot be read and others take their places; one is {min(names)}"
            self.progress.message(f"step {self.state.done:,}: {what}")
        return len(names)

    def _is_due(self, every: int) -> bool:
        """Whether something falls due after the steps done: every so many, or once an epoch for 0, and at the end."""
        done, images, batch = self.state.done, len(self.loader), self.config.data.global_batch_size
        if done == self.total_steps:
            return True
        if every:
            return done % every == 0
        return done * batch // images > (done - 1) * batch // images

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def _evaluate(self) -> int:
        """Run the benchmarks on all ranks; save the model as the last one and, if none was better, as the best.

        Returns:
            The signal that interrupted it, after which nothing is logged or saved; 0 if it is complete.
        """
        state, results = self.state, {}
        for network in (state.backbone, state.average):
            for buffer in network.buffers() if network is not None else ():
                broadcast(buffer)
        model = Model(state.evaluated(), self.model_config)
        for name, pairs in self.benchmarks.items():
            with activity(f"evaluating {name}"):
                batches, stop = self._embed(model, pairs.images)
                if stop:
                    return stop
                embeddings = gather_shares(batches, len(pairs.images))
                results[name] = evaluate_pairs(embeddings, pairs.is_same).summary()
        self.results, state.pending_evaluation = results, False
        for name, result in results.items():
            self.metrics.write({"kind": "evaluation", "step": state.done, "benchmark": name, **result})
            accuracy = f"{result['accuracy']:.2%} ± {result['accuracy_std']:.2%}"
            self.progress.message(f"step {state.done}: {name} accuracy {accuracy}")
        score = sum(result["accuracy"] for result in results.values()) / max(1, len(results))
        is_better = state.best_score is None or score > state.best_score
        is_best = is_better and not state.best_is_of_others(self.benchmarks)
        written = self._write_models(model.backbone, ("last", "best") if is_best else ("last",))
        if written and is_best:  # the best model is the best of those that could be written
            state.best_score, state.best_step = score if self.benchmarks else None, state.done
            state.best_by = sorted(self.benchmarks)
        return 0

    def _embed(self, model: Model, images: np.ndarray) -> tuple[list[Tensor], int]:
        """This rank's share of the embeddings, and the signal that interrupted it, 0 if it is complete."""
        batches = []
        with contextlib.closing(embed_share(model, images)) as share:
            for batch in share:
                batches.append(batch)
                if stop := self._agreed_signal():
                    return batches, stop
        return batches, 0

    def _write_models(self, backbone: nn.Module, names: tuple[str, ...]) -> bool:
        """Let rank 0 write models, and return whether it could. Two collectives.

        Raises:
            JobError: on all ranks alike, if it could not, unless the run continues without them.
        """
        message = None
        if rank_of() == 0:
            try:
                for name in names:
                    save_model(self.folder.model(name), backbone, self.model_config)
                    write_identities(self.folder.model(name), self.state.identities)
            except OSError as error:
                message = f"could not write a model ({error})"
        message = gather_json(message, group=self.control_group)[0]
        if message is not None and self.config.output.on_checkpoint_error == "stop":
            raise JobError(f"{message}: make room, and go on with --resume.")
        if message is not None:
            self._report_unsaved(message)
        return message is None

    # -- what the log says ---------------------------------------------------------------------------------------------

    def _report(self, figures: dict[str, Tensor], clock: StepClock) -> None:
        """Write and show the figures of a step, and restart the clock."""
        state = self.state
        line: dict[str, Any] = {
            "kind": "train",
            "step": state.done,
            "epoch": state.done / self.loader.steps_per_epoch,
            **{name: float(value) for name, value in figures.items()},
            "lr": self.stepper.lr,
            "lr_head": self.stepper.lr_head,
            **clock.figures(),
            "sampled_classes": int(state.head.figures.sampled) if state.head.figures else 0,
            "skipped_steps": state.skipped,
            "unreadable": self._count_unreadable(),
            "peak_bytes": peak_bytes(self.device),
        }
        if self.device.type == "cuda":
            line["gpu_peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
        self.metrics.write(line)
        self.progress.update(state.done, **{name: line[name] for name in _SHOWN_FIGURES if name in line})
        if hint := self.slow_data.hint(line["data_wait"]):
            self.progress.message(f"step {state.done:,}: {hint}")
        clock.restart()

    def _report_skip(self) -> None:
        """Log a skipped step with the images behind it; JobError if there were too many in a row."""
        if self.stepper.skip is not None:
            line, sentence = describe_skip(*self.stepper.skip, self.state.done, self.loader, self.control_group)
            self.metrics.write(line)
            self.progress.message(sentence)
            self.stepper.check_skips()

    def _report_unsaved(self, message: str) -> None:
        self.metrics.write({"kind": "checkpoint_error", "step": self.state.done, "message": message})
        self.progress.message(f"step {self.state.done}: {message}; training goes on without it")
