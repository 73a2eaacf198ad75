"""The two passes on a GPU: Triton kernels that keep nothing of the size samples × classes.

Pass 1 goes over the classes once and leaves, like attention, the sums of the loss and the embeddings' gradient. Pass 2
computes the cosines again and from them the centers' gradient, projected through the normalisation; it stores that, or
updates the rows of centers and momentum with it at once. Offsets of rows are int64: C × D passes 2^31 at four million
classes. Products take operands of the batch's operand dtype and sum in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from partialfc.head.softmax import CenterGradient, NegativeSums, SGDRule, ShardBatch

T = TypeVar("T")
_NO_THRESHOLD = 2.0  # no cosine is above it
_SPLITS = 32  # parts of the classes that pass 1 sums apart, so that few samples fill a GPU too
_SMALLEST_NORM: tl.constexpr = tl.constexpr(1e-12)
_WARPS, _STAGES = 8, 2
# Samples and classes of a block, the best first, with the shared memory that the compiler takes for D = 512 in pass 1
# and in pass 2 (for compute capability 9.0; in proportion to D).
_BLOCKS = {
    torch.bfloat16: ((64, 32, 163_840, 229_888), (32, 32, 100_352, 131_328), (16, 16, 49_664, 65_664)),
    torch.float32: ((64, 32, 204_800, 328_192), (32, 32, 135_168, 196_864), (16, 16, 66_560, 98_432)),
}


@triton.jit
def _dot(left, right, OPERAND: tl.constexpr, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """left @ right with rounded operands; UPCAST for the interpreter, whose dot is wrong for bfloat16."""
    left, right = left.to(OPERAND), right.to(OPERAND)
    if UPCAST:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    """`keyed_random.mix` in int64."""
    x = x + -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _round(values, rows, columns, key, D):  # type: ignore[no-untyped-def]
    """`row_storage.round_stochastically`, bit for bit: float32 with the lower half of each number zero."""
    quarters = (D + 3) // 4
    draws = _mix(_mix(rows * quarters + columns // 4) ^ key)
    noise = ((draws >> ((columns % 4) * 16)) & 0xFFFF).to(tl.int32)
    bits = values.to(tl.int32, bitcast=True)
    rounded = ((bits + noise) & -65536).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(values) < float("inf"), rounded, values)


@triton.jit
def _weights(  # type: ignore[no-untyped-def]
    e, w, inverse, places, targets, S, scale, shift, threshold, OPERAND: tl.constexpr, UPCAST: tl.constexpr
):
    """exp(s c − shift) of a block, 0 for own classes, conflicts and padding; and which entries are conflicts."""
    cosine = _dot(e, tl.trans(w), OPERAND, UPCAST) * inverse[None, :]
    negative = (places[None, :] < S) & (places[None, :] != targets[:, None])
    conflict = negative & (cosine > threshold)
    weights = tl.where(negative & (cosine <= threshold), tl.exp(scale * cosine - shift), 0.0)
    return weights, conflict


@triton.jit
def _sum_kernel(  # type: ignore[no-untyped-def]
    centers, classes, embeddings, target_places, sums, pull, conflicts,
    G, S, D, per_split, scale, shift, threshold, zero_logit,
    BG: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, OPERAND: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Pass 1 of a block of samples over one part of the classes, into that part's row of the results."""
    samples, columns = tl.program_id(0) * BG + tl.arange(0, BG), tl.arange(0, BD)
    split = tl.program_id(1)
    in_d, in_g = columns < D, samples < G
    e = tl.load(embeddings + samples[:, None] * D + columns[None, :], mask=in_g[:, None] & in_d[None, :], other=0.0)
    targets = tl.load(target_places + samples, mask=in_g, other=-1)
    total, left_out = tl.zeros((BG,), tl.float32), tl.zeros((BG,), tl.float32)
    pulled = tl.zeros((BG, BD), tl.float32)
    for start in range(split * per_split, tl.minimum((split + 1) * per_split, S), BS):
        places = start + tl.arange(0, BS)
        rows = tl.load(classes + places, mask=places < S, other=0)
        inside = (places < S)[:, None] & in_d[None, :]
        w = tl.load(centers + rows[:, None] * D + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(w * w, 1)), _SMALLEST_NORM)
        weights, conflict = _weights(e, w, inverse, places, targets, S, scale, shift, threshold, OPERAND, UPCAST)
        total += tl.sum(weights, 1)
        left_out += tl.sum(conflict.to(tl.float32), 1)
        pulled += _dot(weights * inverse[None, :], w, OPERAND, UPCAST)
    out = split * G + samples
    tl.store(sums + out, total + left_out * zero_logit, mask=in_g)
    tl.store(conflicts + out, left_out, mask=in_g)
    tl.store(pull + out.to(tl.int64)[:, None] * D + columns[None, :], pulled, mask=in_g[:, None] & in_d[None, :])


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    centers, classes, embeddings, scaled, target_places, slots, target_gradient, output, momentum_buffer, skip,
    G, S, D, first, scale, shift, threshold, lr, momentum, decay, first_row, center_key, momentum_key,
    BG: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, OPERAND: tl.constexpr, UPCAST: tl.constexpr,
    UPDATE: tl.constexpr,
):  # fmt: skip
    """Pass 2 of a block of classes: their gradient into `output`, or the update of their rows."""
    places, columns = first + tl.program_id(0) * BS + tl.arange(0, BS), tl.arange(0, BD)
    in_d, in_s = columns < D, places < S
    inside = in_s[:, None] & in_d[None, :]
    rows = tl.load(classes + places, mask=in_s, other=0)
    offsets = rows[:, None] * D + columns[None, :]
    w = tl.load(centers + offsets, mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(w * w, 1)), _SMALLEST_NORM)
    gradient = tl.zeros((BS, BD), tl.float32)
    for start in range(0, G, BG):
        samples = start + tl.arange(0, BG)
        in_g = samples < G
        from_batch = samples[:, None] * D + columns[None, :]
        in_batch = in_g[:, None] & in_d[None, :]
        e = tl.load(embeddings + from_batch, mask=in_batch, other=0.0)
        targets = tl.load(target_places + samples, mask=in_g, other=-1)
        weights, _ = _weights(e, w, inverse, places, targets, S, scale, shift, threshold, OPERAND, UPCAST)
        weights = tl.where(in_g[:, None], weights, 0.0)
        s = tl.load(scaled + from_batch, mask=in_batch, other=0.0)
        gradient += _dot(tl.trans(weights), s, OPERAND, UPCAST)
    along = tl.sum(gradient * w, 1) * inverse * inverse
    gradient = (gradient - along[:, None] * w) * inverse[:, None]
    slot = tl.load(slots + places, mask=in_s, other=-1)
    own = target_gradient + slot.to(tl.int64)[:, None] * D + columns[None, :]
    gradient += tl.load(own, mask=inside & (slot >= 0)[:, None], other=0.0)
    if UPDATE:
        go = inside & (tl.load(skip + tl.zeros((BS,), tl.int32)) == 0)[:, None]
        velocity = tl.load(momentum_buffer + offsets, mask=inside, other=0.0).to(tl.float32)
        velocity = momentum * velocity + (gradient + decay * w)
        w = w - lr * velocity
        numbers = (rows + first_row)[:, None]
        if momentum_buffer.dtype.element_ty == tl.bfloat16:
            velocity = _round(velocity, numbers, columns[None, :], momentum_key, D)
        if centers.dtype.element_ty == tl.bfloat16:
            w = _round(w, numbers, columns[None, :], center_key, D)
        tl.store(momentum_buffer + offsets, velocity.to(momentum_buffer.dtype.element_ty), mask=go)
        tl.store(centers + offsets, w.to(centers.dtype.element_ty), mask=go)
    else:
        stored = (places - first).to(tl.int64)[:, None] * D + columns[None, :]
        tl.store(output + stored, gradient, mask=inside)


class TritonPath:
    """`Path` for centers of float32 or bfloat16, one a class, and margins that leave negatives as they are."""

    in_threads: ClassVar[bool] = False

    def tile_classes(self, batch: ShardBatch) -> int:
        """A tile is its gradient, (n, D) float32."""
        return max(1, batch.scratch_bytes // (4 * batch.embeddings.shape[1]))

    def spread(self, work: Callable[[T], None], items: Iterable[T]) -> None:
        for item in items:
            work(item)

    def sum_negatives(self, centers: Tensor, batch: ShardBatch, *, keep: bool) -> NegativeSums:
        if not len(batch.classes):
            return NegativeSums.zeros(batch.embeddings)
        samples, width = batch.embeddings.shape
        count, blocks = len(batch.classes), _blocks(batch, 2)
        per_split = triton.cdiv(triton.cdiv(count, _SPLITS), blocks["BS"]) * blocks["BS"]
        splits = triton.cdiv(count, per_split)
        sums, conflicts = batch.embeddings.new_empty(2, splits, samples).unbind()
        pull = batch.embeddings.new_empty(splits, samples, width)
        zero_logit = math.exp(-batch.shift) if batch.conflict_as_zero_logit else 0.0
        _sum_kernel[(triton.cdiv(samples, blocks["BG"]), splits)](
            centers.detach(), batch.classes, _operands(batch.embeddings, batch), batch.target_places,
            sums, pull, conflicts, samples, count, width, per_split,
            batch.scale, batch.shift, _threshold(batch), zero_logit, **blocks,
        )  # fmt: skip
        return NegativeSums(sums.double().sum(0), pull.sum(0), conflicts.double().sum())

    def tile_gradient(self, gradient: CenterGradient, centers: Tensor, first: int, last: int) -> Tensor:
        output = centers.new_empty((last - first, centers.shape[1]), dtype=torch.float32)
        _second_pass(gradient, centers, first, last, output, None)
        return output

    def update(self, gradient: CenterGradient, centers: Tensor, momentum_buffer: Tensor, rule: SGDRule) -> bool:
        """The whole update in one kernel."""
        if len(gradient.batch.classes):
            _second_pass(gradient, centers, 0, len(gradient.batch.classes), momentum_buffer, rule)
        return True


def _second_pass(
    gradient: CenterGradient, centers: Tensor, first: int, last: int, output: Tensor, rule: SGDRule | None
) -> None:
    """The gradient of `classes[first:last]` into `output`, or with a rule the update; `output` is the momentum then."""
    batch = gradient.batch
    samples, width = batch.embeddings.shape
    slots = torch.full_like(batch.classes, -1)
    slots[torch.searchsorted(batch.classes, gradient.target_rows)] = torch.arange(
        len(gradient.target_rows), device=slots.device
    )
    skip = torch.zeros(1, dtype=torch.int32, device=centers.device) if rule is None or rule.skip is None else rule.skip
    rates = (0.0, 0.0, 0.0, 0, 0, 0) if rule is None else rule.numbers()
    blocks = _blocks(batch, 3)
    _gradient_kernel[(triton.cdiv(last - first, blocks["BS"]),)](
        centers.detach(), batch.classes, _operands(batch.embeddings, batch), gradient.scaled_embeddings,
        batch.target_places, slots, gradient.target_gradient, output, output, skip,
        samples, last, width, first, batch.scale, batch.shift, _threshold(batch), *rates,
        UPDATE=rule is not None, **blocks,
    )  # fmt: skip


def _operands(embeddings: Tensor, batch: ShardBatch) -> Tensor:
    return embeddings.to(batch.operand_dtype)


def _threshold(batch: ShardBatch) -> float:
    return _NO_THRESHOLD if batch.conflict_threshold is None else batch.conflict_threshold


def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have; the interpreter has no limit."""
    if device.type != "cuda":
        return 1 << 40
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def _fitting(device: torch.device, width: int, operand_dtype: torch.dtype, which: int) -> tuple[int, int] | None:
    """Samples and classes of the best block for pass 1 (`which` 2) or pass 2 (3); None if none fits."""
    available = _shared_memory(device)
    for sizes in _BLOCKS[operand_dtype]:
        if sizes[which] * triton.next_power_of_2(width) <= available * 512:
            return sizes[0], sizes[1]
    return None


def fits(device: torch.device, width: int) -> bool:
    """Whether the kernels' blocks of D = `width` fit this GPU."""
    return _fitting(device, width, torch.float32, 3) is not None


def _blocks(batch: ShardBatch, which: int) -> dict[str, Any]:
    """The compile-time arguments of a kernel; a product wants at least 16 of each."""
    device, width = batch.embeddings.device, batch.embeddings.shape[1]
    samples, classes = _fitting(device, width, batch.operand_dtype, which) or (16, 16)
    return {
        "BG": samples,
        "BS": classes,
        "BD": max(16, triton.next_power_of_2(width)),
        "OPERAND": tl.bfloat16 if batch.operand_dtype == torch.bfloat16 else tl.float32,
        "UPCAST": device.type == "cpu",
        "num_warps": _WARPS,
        "num_stages": _STAGES,
    }
