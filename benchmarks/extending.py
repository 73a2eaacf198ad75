"""A head trained on 200 procedural identities is continued with 50 more: accuracy on images never seen.

    python benchmarks/extending.py --out /tmp/extending

The table, which goes into docs/results/training.md, has the share of test images whose nearest center is their own,
among all centers of the head, for the old and the new identities, and whether the old centers were bit-identical at
the start.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from documents import write_between
from partialfc.bench.machine import describe
from partialfc.checkpoint.read import load_latest
from partialfc.config.options import TrainConfig
from partialfc.config.recipes import RECIPES
from partialfc.faces.render import render_faces
from partialfc.faces.sets import write_training_set
from partialfc.model.config import ModelConfig
from partialfc.model.embed import embed
from partialfc.model.files import Model
from partialfc.training.build import build_state, open_loader
from partialfc.training.initialize import fill_with_class_means, initialize
from partialfc.training.loop import train
from partialfc.training.state import TrainState

OLD, ALL, SHOTS, TEST_SHOTS, SIZE = 200, 250, 10, 4, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new folder for data and runs")
    parser.add_argument("--epochs", type=float, default=30.0, help="of the training on the old identities")
    parser.add_argument("--further", type=float, default=5.0, help="epochs of the short training on all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for count in (OLD, ALL):
        write_training_set(options.out / f"{count}", identities=range(count), shots=SHOTS, size=SIZE, layout="folder")
    base = RECIPES["demo"]
    base = replace(
        base,
        data=replace(base.data, path=str(options.out / f"{OLD}"), global_batch_size=64, micro_batch_size=64),
        head=replace(base.head, sample_rate=1.0),
        schedule=replace(base.schedule, epochs=options.epochs, warmup_epochs=1.0),
    )
    train(base, options.out / "old", quiet=True)
    lines = [f"{describe('cpu')['cpu']}, one thread, torch {torch.__version__}.", ""]
    lines += ["| state | old identities | new identities |", "|---|---|---|"]
    lines.append(row(f"trained on {OLD}, {options.epochs:g} epochs", restored(base, options.out / "old")))
    for new_centers in ("mean", "random"):
        config = replace(
            base,
            data=replace(base.data, path=str(options.out / f"{ALL}")),
            head=replace(base.head, from_run=str(options.out / "old"), new_centers=new_centers),
            optimizer=replace(base.optimizer, lr=base.optimizer.lr / 4),
            schedule=replace(base.schedule, epochs=options.further, warmup_epochs=0.5),
        )
        state = started(config)
        same = torch.equal(state.head.centers[:OLD], restored(base, options.out / "old").head.centers)
        kept = "" if same else ", old ones CHANGED"
        lines.append(row(f"{ALL}, new centers `{new_centers}`, at the start{kept}", state))
        train(config, options.out / new_centers, quiet=True)
        trained = restored(config, options.out / new_centers)
        lines.append(row(f"{ALL}, new centers `{new_centers}`, after {options.further:g} epochs", trained))
    write_between("results/training.md", "benchmarks/extending.py", lines)


def started(config: TrainConfig) -> TrainState:
    """The state of a run at step 0."""
    loader = open_loader(config)
    state = build_state(config, loader, torch.device("cpu"))
    old_classes = initialize(state, config, loader)
    if old_classes is not None and config.head.new_centers == "mean":
        fill_with_class_means(state, old_classes, config, loader)
    return state


def restored(config: TrainConfig, run: Path) -> TrainState:
    """The state of a run at its last checkpoint."""
    state = build_state(config, open_loader(config), torch.device("cpu"))
    load_latest(run / "checkpoints", state.restore)
    return state


def row(name: str, state: TrainState) -> str:
    """One line of the table, which is also printed."""
    classes = state.head.num_classes
    old = f"{accuracy(state, range(OLD)):.1%}"
    line = f"| {name} | {old} | {f'{accuracy(state, range(OLD, ALL)):.1%}' if classes == ALL else '–'} |"
    print(line, flush=True)
    return line


@torch.no_grad()
def accuracy(state: TrainState, identities: range) -> float:
    """Share of further images of `identities` whose nearest center is their own."""
    people = torch.tensor(identities).repeat_interleave(TEST_SHOTS)
    takes = torch.arange(SHOTS, SHOTS + TEST_SHOTS).repeat(len(identities))
    images: Tensor = render_faces(0, people, takes, size=SIZE).images
    width = state.head.embedding_dim
    embeddings = embed(Model(state.evaluated(), ModelConfig("mini", width, SIZE)), images)
    cosines = F.normalize(embeddings, dim=1) @ F.normalize(state.head.centers.detach(), dim=1).T
    return float((cosines.argmax(dim=1) == people).float().mean())


if __name__ == "__main__":
    main()
