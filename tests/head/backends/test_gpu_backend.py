"""The GPU's kernels: in Triton's interpreter where there is no GPU, compiled where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import reference
import torch
from torch import Tensor

pytest.importorskip("triton")

from partialfc.head import sampled_softmax
from partialfc.head.backends.base import CenterGradient, ScratchBuffer, SGDRule, ShardBatch
from partialfc.head.backends.gpu import GPUBackend
from partialfc.head.backends.torch_chunked import ChunkedBackend
from partialfc.head.loss import LossConfig
from partialfc.head.margins import CosFace
from partialfc.head.optim import RowwiseAdamW, RowwiseSGD
from partialfc.head.partial_fc import PartialFC

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLASSES, WIDTH, BATCH = 150, 20, 9


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, GPUBackend())


def use(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    monkeypatch.setattr(sampled_softmax, "select_backend", lambda *arguments: backend)


def batch(seed: int, samples: int = BATCH, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(samples, width, generator=generator)
    return embeddings.to(DEVICE), torch.randint(CLASSES, (samples,), generator=generator).to(DEVICE)


def train(head: PartialFC, optimizer: torch.optim.Optimizer, micro_steps: int = 1, **sizes: int) -> list[Tensor]:
    """Losses and embedding gradients of three steps, then the centers."""
    seen = []
    for step in range(3):
        for micro_step in range(micro_steps):
            embeddings, labels = batch(10 * step + micro_step, **sizes)
            loss = head(embeddings.requires_grad_(), labels) / micro_steps
            loss.backward()
            seen += [loss.detach(), embeddings.grad]
        optimizer.step()
        optimizer.zero_grad()
    return [*seen, head.centers.detach().clone()]


@pytest.mark.parametrize("update", ["sparse", "deferred"])
@pytest.mark.parametrize(
    ("options", "sizes", "micro_steps"),
    [
        ({}, {}, 1),
        ({"conflict_threshold": 0.21}, {"samples": 1}, 1),
        pytest.param(
            {"conflict_threshold": 0.21, "conflict_as_zero_logit": True}, {"samples": 70}, 1, marks=pytest.mark.slow
        ),
        ({"sample_rate": 0.3}, {"width": 33}, 2),
        pytest.param({"sample_rate": 0.0}, {"samples": 3, "width": 7}, 1, marks=pytest.mark.slow),
        pytest.param({"scale": 83.0}, {}, 1, marks=pytest.mark.slow),
        pytest.param(
            {"scratch_bytes": 40 * 6 * WIDTH, "conflict_threshold": 0.21}, {"samples": 40}, 1, marks=pytest.mark.slow
        ),
    ],
)
def test_the_same_as_the_chunked_backend(
    update: Any, options: dict[str, Any], sizes: dict[str, int], micro_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for backend in (GPUBackend(), ChunkedBackend()):
        use(monkeypatch, backend)
        width = sizes.get("width", WIDTH)
        head = PartialFC(CLASSES, width, update=update, device=DEVICE, **({"sample_rate": 1.0} | options))
        optimizer = RowwiseSGD(head.parameters(), lr=0.01, weight_decay=0.1)
        results.append(train(head, optimizer, micro_steps, **sizes))
    for kernels, chunked in zip(*results, strict=True):
        torch.testing.assert_close(kernels, chunked, rtol=3e-4, atol=max(3e-6, 5e-5 * float(chunked.abs().max())))


def test_adamw_takes_the_gradient_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for backend in (GPUBackend(), ChunkedBackend()):
        use(monkeypatch, backend)
        head = PartialFC(CLASSES, WIDTH, 1.0, update="deferred", scratch_bytes=4 * WIDTH * 64, device=DEVICE)
        results.append(train(head, RowwiseAdamW(head.parameters(), lr=0.01, eps=0.1)))
    torch.testing.assert_close(results[0][-1], results[1][-1], rtol=3e-4, atol=3e-6)


@pytest.mark.parametrize("target_cosine", [0.2, 0.9])
@pytest.mark.parametrize("operand_dtype", [torch.float32, torch.bfloat16])
def test_error_against_float64(operand_dtype: torch.dtype, target_cosine: float) -> None:
    torch.manual_seed(0)
    head = PartialFC(500, 64, 1.0, CosFace(0.4), operand_dtype=operand_dtype, device=DEVICE)
    centers, labels = head.centers.detach().cpu(), torch.randint(500, (32,))
    unit = torch.nn.functional.normalize
    own = unit(centers)[labels]
    embeddings = 5 * (target_cosine * own + (1 - target_cosine**2) ** 0.5 * unit(torch.randn(32, 64)))
    ours = embeddings.clone().to(DEVICE).requires_grad_()
    head(ours, labels.to(DEVICE)).backward()
    exact = embeddings.double().requires_grad_(), centers.double().requires_grad_()
    reference.dense_loss(*exact, labels, torch.arange(500), scale=64.0, target=reference.cosface(0.4)).backward()
    rounded = reference.plain_bfloat16(embeddings, centers, labels)
    for gradient, plain, truth in zip((ours.grad, head.centers.grad.to_dense()), rounded, exact, strict=True):
        error = (gradient.double().cpu() - truth.grad).norm() / truth.grad.norm()
        limit = (plain - truth.grad).norm() / truth.grad.norm() if operand_dtype == torch.bfloat16 else 1e-5
        assert error <= limit


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from partialfc.head.backends import gpu
from partialfc.head.backends.gpu_kernels import weights_kernel

kinds = {"embeddings": "*bf16", "unit": "*bf16", "weights": "*bf16", "target_positions": "*i64", "count": "*i64"}
kinds |= dict.fromkeys(("sums", "conflicts"), "*fp32") | dict.fromkeys(("first", "last", "G", "N"), "i32")
for limit, conflicts in ((232_448, False), (101_376, True), (49_152, False)):
    gpu._shared_memory = lambda device: limit
    blocks = gpu._product_blocks(torch.device("cpu"), 1024, True, conflicts)
    options = {name: blocks.pop(name) for name in ("num_warps", "num_stages")}
    constants = blocks | {"D": 512, "PRODUCT": True, "UPCAST": False, "SUMS": True, "CONFLICTS": conflicts}
    names = weights_kernel.arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, "fp32") for name in names}
    # Pointers and sizes are multiples of 16, as in a step: only then are loads pipelined through shared memory.
    aligned = [i for i, name in enumerate(names) if signature[name][0] == "*" or name in ("G", "N", "first")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    constants = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=weights_kernel, signature=signature, constexprs=constants, attrs=attributes)
    shared = compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared
    print(limit, shared, blocks["BN"])
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_compiled_blocks_fit_small_and_large_gpus() -> None:
    """The shared memory of an H100, of a consumer's GPU, and less than any has; the larger, the larger the block."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [[int(number) for number in line.split()] for line in done.stdout.splitlines()]
    assert len(lines) == 3
    assert all(limit // 8 < shared <= limit for limit, shared, _ in lines)
    assert lines[0][2] > lines[1][2] > lines[2][2]


def test_bfloat16_tables_are_rounded_as_the_fallback_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's draws are those of `round_stochastically`: nearly all elements agree, the rest by one step."""
    results = []
    for backend in (GPUBackend(), ChunkedBackend()):
        use(monkeypatch, backend)
        head = PartialFC(CLASSES, WIDTH, 0.5, update="deferred", dtype=torch.bfloat16, seed=3, device=DEVICE)
        optimizer = RowwiseSGD(head.parameters(), lr=0.01)
        embeddings, labels = batch(1)
        head(embeddings.requires_grad_(), labels).backward()
        optimizer.step()
        results.append([head.centers.detach().float(), optimizer.row_state(head.centers)["momentum_buffer"].float()])
    for kernels, fallback in zip(*results, strict=True):
        assert float((kernels == fallback).double().mean()) > 0.97
        torch.testing.assert_close(kernels, fallback, rtol=2.0**-6, atol=1e-6)


def test_a_set_flag_leaves_everything_as_it_is() -> None:
    head = PartialFC(CLASSES, WIDTH, 0.5, update="deferred", device=DEVICE)
    embeddings, labels = batch(1)
    head(embeddings.requires_grad_(), labels).backward()
    (gradient,) = head.center_state.deferred
    momentum = torch.zeros_like(head.centers)
    before = head.centers.detach().clone()
    for flag in (1, 0):
        skip, keys = torch.tensor([flag], device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
        rule = SGDRule(0.1, 0.9, 0.0, 0, keys, skip)
        GPUBackend().fused_update(gradient, head.centers, momentum, rule)
        assert torch.equal(before, head.centers.detach()) == bool(flag)
        assert bool((momentum == 0).all()) == bool(flag)


def test_rows_past_two_to_the_31() -> None:
    """A table of which only a few rows at its far end are ever touched; the rest of it takes no memory."""
    width, rows = 512, (1 << 31) // 512 + 50
    centers = torch.empty(rows, width, dtype=torch.bfloat16, device=DEVICE)
    far = torch.arange(rows - 40, rows, device=DEVICE)
    centers[far] = torch.randn(40, width, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    near = centers[far].clone()
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.nn.functional.normalize(torch.randn(3, width, generator=generator)).to(DEVICE)
    results = []
    for table, classes in ((centers, far), (near, torch.arange(40, device=DEVICE))):
        shard = ShardBatch(
            embeddings=embeddings,
            classes=classes,
            count=None,
            target_positions=torch.tensor([1, -1, 39], device=DEVICE),
            hard_negatives=None,
            config=LossConfig(40, CosFace(), 64.0, None, False, torch.float32, scratch_bytes=1 << 20),
            scratch=ScratchBuffer(),
        )
        negatives = GPUBackend().sum_negatives(table, shard, keep=False)
        gradient = CenterGradient(
            shard, embeddings * 1e-9, classes[:1], torch.ones(1, width, device=DEVICE), GPUBackend(), None
        )
        results += [negatives.sums, negatives.weighted_centers, GPUBackend().tile_gradient(gradient, table, 0, 40)]
    for one, other in zip(results[:3], results[3:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
