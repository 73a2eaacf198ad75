"""The training loop: the only place where data, backbone, head and evaluation meet."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from partialfc.config.options import TrainConfig, parse_steps
from partialfc.core.console import Progress
from partialfc.core.device import compute_dtype, dtype_name, peak_bytes
from partialfc.core.errors import InputError, StoppedBySignal
from partialfc.data.loader import Batch
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
from partialfc.evaluation.pairs import evaluate_pair_set
from partialfc.evaluation.run import read_benchmarks
from partialfc.model.config import ModelConfig
from partialfc.model.files import Model, save_model
from partialfc.training.build import (
    build_state,
    check_shares,
    open_loader,
)
from partialfc.training.checkpoint.read import Checkpoint, load_latest
from partialfc.training.checkpoint.writer import Saver
from partialfc.training.identities import write_identities
from partialfc.training.initialize import Start, apply_start, check_resumable, read_start
from partialfc.training.nonfinite import Skip, describe_skip
from partialfc.training.profiling import StepProfiler
from partialfc.training.run.folder import open_run_folder
from partialfc.training.run.launch import check_same_data, joined
from partialfc.training.run.log import MetricsLog, Tracker, open_trackers
from partialfc.training.step import Stepper
from partialfc.training.timing import Clock, TrainResult

_SECONDS_FOR_A_CHECKPOINT = 10.0  # that one is being written when the run fails; the others may be dead
_SECONDS_FOR_ANY_CHECKPOINT = 7 * 86400.0


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
        resume: go on from the newest whole checkpoint, or start if there is none.
        verify: with `resume`, first read and compare every byte of that checkpoint, also what no rank needs.
        quiet: no progress display.

    Raises:
        InputError: before anything is trained, for what is wrong with the configuration, the data or the folder.
        StoppedBySignal: SIGTERM or SIGINT came to any process; the state is saved.
        JobError: the training failed.
    """
    names = benchmarks or {}
    silence, timeout = config.processes.heartbeat_timeout_seconds, config.processes.timeout_seconds
    how = _How(resume, verify, quiet)
    with StopSignals() as signals, contextlib.ExitStack() as held:
        with signals.exit_on_signal():
            device = held.enter_context(
                joined(config, names, resume=resume, verify=verify, timeout_seconds=_patience(config))
            )
        liveness = HeartbeatMonitor(silence, timeout)
        try:
            held.enter_context(liveness)
            with activity("opening data, networks and run folder"):
                trainer = _Trainer(config, out, names, device, signals, held, how)
            return trainer.run()
        except RuntimeError as error:
            lost = liveness.explain(error)
            if lost is None:
                raise
            raise lost from error


def _patience(config: TrainConfig) -> float:
    """Seconds after which a collective fails by itself: `HeartbeatMonitor`, which knows more, is to speak first."""
    return config.processes.timeout_seconds + 60


@dataclass(frozen=True)
class _How:
    """The arguments of `train` that say how to start and show a run."""

    resume: bool
    verify: bool
    quiet: bool


class _EvaluationStopped(Exception):
    """A signal came to some rank during an evaluation; every rank raises it alike."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class _Trainer:
    """One run in one process."""

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        benchmarks: Mapping[str, Path],
        device: torch.device,
        signals: StopSignals,
        held: contextlib.ExitStack,
        how: _How,
    ) -> None:
        self.clock_of_run = Clock.start()
        self.config, self.device, self.quiet, self.signals = config, device, how.quiet, signals
        self.world_size, self.is_main_process = world_size_of(), rank_of() == 0
        self.loader = open_loader(config)
        check_same_data(self.loader)
        backbone = config.backbone
        self.model_config = ModelConfig(backbone.name, backbone.embedding_dim, self.loader.image_size)
        self.benchmarks = read_benchmarks(benchmarks, self.model_config)
        check_shares(config, self.loader)
        resuming = how.resume and check_resumable(out, self.loader)
        start = Start() if resuming else read_start(config, self.loader)
        self.state = build_state(config, self.loader, device)
        # Nothing is written before all is known to fit.
        self.folder = held.enter_context(open_run_folder(out, config, resume=how.resume))
        apply_start(start, self.state, config, self.loader)
        self.notes: list[str] = []
        if how.resume:
            restore = self._verify_and_restore if how.verify else self.state.restore
            verified = load_latest(self.folder.checkpoints, restore, warn=self.notes.append)
            if how.verify:
                self.notes.append(verified or "there is no checkpoint to verify")
        # A rank may write for hours, as long as it gets on: whether it does is for `HeartbeatMonitor` to say.
        patience = _SECONDS_FOR_ANY_CHECKPOINT if has_store() else _patience(config)
        self.saver = Saver(config, self.folder, host_group(patience), self._report_unsaved)
        self.saver.writer.preallocate(self.state.row_tensors().tensors)
        self.news_group = host_group(_patience(config))
        self.stepper = Stepper(config, self.state, self.loader, device, compute_dtype(config.precision, device))
        self.total_steps = self.stepper.total_steps
        self.results: dict[str, dict[str, Any]] = {}
        self.images_done, self.seconds_done = 0, 0.0

    def _verify_and_restore(self, checkpoint: Checkpoint) -> str:
        """Restore after the ranks have together read every byte; in words what was read."""
        checkpoint.verify(rank_of(), self.world_size)
        self.state.restore(checkpoint)
        files, size = checkpoint.extent
        return f"{checkpoint.folder} is whole: all {size:,} bytes of its {files} files were read and compared"

    def run(self) -> TrainResult:
        """All steps that are left, and what falls due on the way."""
        state = self.state
        first, owed = state.done, state.pending_evaluation
        with (
            contextlib.closing(self.loader.batches(first, self.total_steps)) as batches,
            self._open_trackers(first) as self.trackers,
            contextlib.closing(self._profiler()) as profiler,
            self._open_log(first, owed or first >= self.total_steps) as self.log,
            Progress(
                "training", self.total_steps, unit=None, quiet=self.quiet or not self.is_main_process
            ) as self.progress,
        ):
            for note in [*self.notes, self._description(first)]:
                self.progress.message(note)
            self.progress.update(first)
            saved = f"with {first:,} steps done and saved; go on with --resume" if first else "before its first step"
            stop = self._agreed_signal()
            if not stop and (owed or first >= self.total_steps):
                stop = self._evaluate()
                if owed and not stop and first >= self.total_steps:
                    self.saver.save_and_wait(state)  # with the score that its last checkpoint could not know
            if stop:
                raise StoppedBySignal(stop, saved)
            try:
                self._train(batches, profiler)
            except BaseException:
                self.saver.writer.abandon(_SECONDS_FOR_A_CHECKPOINT)
                raise
        return self._result()

    def _train(self, batches: Iterator[Batch], profiler: StepProfiler) -> None:
        state, output, saver = self.state, self.config.output, self.saver
        clock = Clock.start()
        while state.done < self.total_steps:
            news = self._exchange_news()
            with profiler.step(state.done):
                with activity(f"reading the images of step {state.done}"):
                    micro_batches = [clock.next_batch(batches) for _ in range(self.loader.micro_steps)]
                with activity(f"computing step {state.done}"):
                    figures = self.stepper.step(micro_batches)
            state.done += 1
            stop, minutes_passed, writing = news()
            clock.images += self.config.data.global_batch_size
            if self.stepper.skip is not None:
                self._report_skip(self.stepper.skip)
            if self._is_due(output.log_every):
                clock = self._report(figures, clock)
            with clock.stopped():
                if not writing:
                    saver.finish()
                if self._is_due(output.evaluate_every):
                    state.pending_evaluation = True  # until it is done: who asks for the end will not wait for it
                    stop = stop or self._evaluate()
                if stop:
                    saver.save_and_wait(state)
                    raise StoppedBySignal(stop, f"after step {state.done:,}, and saved; go on with --resume")
                if state.done == self.total_steps:
                    saver.save_and_wait(state)
                elif minutes_passed or self._is_due(output.checkpoint_every):
                    saver.save(state)

    def _agreed_signal(self) -> int:
        """The signal that has come to any rank, 0 for none: one answer for all. One collective."""
        return start_max([self.signals.received], self.news_group)()[0]

    def _between_batches(self) -> None:
        stop = self._agreed_signal()
        if stop:
            raise _EvaluationStopped(stop)

    def _exchange_news(self) -> Callable[[], list[int]]:
        """Begin to tell the other ranks what only this one knows; the answer, asked for after the step, is one for all.

        It is the signal to stop, whether it is time for a checkpoint, and whether one is still being written. The
        exchange runs beside the step and costs it nothing.
        """
        saver = self.saver
        return start_max([self.signals.received, saver.minutes_passed, saver.writer.busy], self.news_group)

    # -- what falls due on the way -----------------------------------------------------------------------------------

    def _is_due(self, every: int) -> bool:
        """Whether something falls due after the steps done: every so many, or once an epoch for 0, and at the end."""
        done, images, batch = self.state.done, len(self.loader), self.config.data.global_batch_size
        if done == self.total_steps:
            return True
        if every:
            return done % every == 0
        return done * batch // images > (done - 1) * batch // images

    def _report(self, figures: dict[str, Tensor], clock: Clock) -> Clock:
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
            "lr": self.stepper.lr,
            "lr_head": self.stepper.lr_head,
            "images_per_second": clock.images / clock.seconds,
            "data_wait": clock.waited / clock.seconds,
            "sampled_classes": int(state.head.figures.sampled) if state.head.figures else 0,
            "skipped_steps": state.skipped,
            "unreadable": len(names),
            "peak_bytes": peak_bytes(self.device),
        }
        if self.device.type == "cuda":
            line["gpu_peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
        self._log(line)
        shown = ("epoch", "loss", "target_cosine", "lr", "images_per_second", "data_wait")
        self.progress.update(state.done, **{name: line[name] for name in shown if name in line})
        self.images_done += clock.images
        self.seconds_done += clock.seconds
        return Clock.start()

    def _report_skip(self, skip: Skip) -> None:
        """Log a skipped step with the images behind it; the end of the run if there were too many in a row."""
        line, sentence = describe_skip(skip, self.state.done, self.loader, self.news_group)
        self._log(line)
        self.progress.message(sentence)
        self.stepper.check_skips()

    def _report_unsaved(self, message: str) -> None:
        self._log({"kind": "checkpoint_error", "step": self.state.done, "message": message})
        self.progress.message(f"step {self.state.done}: {message}; training goes on without it")

    def _log(self, line: dict[str, Any]) -> None:
        self.log.write(line)
        for tracker in self.trackers:
            tracker.write(line)

    @contextlib.contextmanager
    def _open_trackers(self, first: int) -> Iterator[list[Tracker]]:
        output, config = self.config.output, self.config.to_dict()
        trackers = open_trackers(output, self.folder.root, config, first) if self.is_main_process else []
        try:
            yield trackers
        finally:
            for tracker in trackers:
                tracker.close()

    def _open_log(self, first: int, evaluates: bool) -> MetricsLog:
        patient = self.config.output.on_checkpoint_error == "continue"
        again = self.benchmarks if evaluates else ()
        return MetricsLog(
            self.folder.metrics, resume_step=first, evaluates_again=again, patient=patient, enabled=self.is_main_process
        )

    def _profiler(self) -> StepProfiler:
        steps = parse_steps(self.config.output.profile_steps) if self.is_main_process else range(0)
        return StepProfiler(steps, self.folder.root)

    def _evaluate(self) -> int:
        """Run the benchmarks on all ranks; keep the model as the last one and, if no other was better, the best.

        Returns the signal that broke it off, 0 if it is done; nothing is logged or kept of one that is not.
        """
        state = self.state
        for network in (state.backbone, state.average):
            for buffer in network.buffers() if network is not None else ():
                broadcast(buffer)
        model = Model(state.evaluated(), self.model_config)
        results = {}
        try:
            for name, pairs in self.benchmarks.items():
                with activity(f"evaluating {name}"):
                    results[name] = evaluate_pair_set(model, pairs, between=self._between_batches).summary()
        except _EvaluationStopped as stopped:
            return stopped.signum
        self.results, state.pending_evaluation = results, False
        for name, result in results.items():
            self._log({"kind": "evaluation", "step": state.done, "benchmark": name, **result})
            self.progress.message(
                f"step {state.done}: {name} accuracy {result['accuracy']:.2%} ± {result['accuracy_std']:.2%}"
            )
        score = sum(result["accuracy"] for result in results.values()) / max(1, len(results))
        is_best = state.best_score is None or score > state.best_score or not self.benchmarks
        names = ("last", "best") if is_best else ("last",)
        written = self.saver.write_models(lambda: self._write_models(model.backbone, names), self.news_group)
        if is_best and written:  # the best model is the best of those that could be written
            state.best_score, state.best_step = score if self.benchmarks else None, state.done
        return 0

    def _write_models(self, backbone: nn.Module, names: tuple[str, ...]) -> None:
        for name in names:
            save_model(self.folder.model(name), backbone, self.model_config)
            write_identities(self.folder.model(name), self.state.identities)

    # -- words -------------------------------------------------------------------------------------------------------

    def _description(self, first: int) -> str:
        config, loader = self.config, self.loader
        start = f"resumed at step {first}" if first else "new run"
        return (
            f"{start}: {config.backbone.name} on {len(loader):,} images of {loader.num_classes:,} identities, "
            f"{self.total_steps:,} steps of {config.data.global_batch_size}, {config.describe_lr()}, "
            f"{self.world_size} x {self.device.type} in {dtype_name(self.stepper.compute_dtype)}"
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
