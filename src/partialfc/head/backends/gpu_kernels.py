"""Triton kernels of the GPU backend: the two passes without their plain matrix products, which cuBLAS computes.

Rows past the count, which only the device knows, are zeros or not computed at all. Offsets into the centers are int64:
C × D exceeds 2^31 at four million classes of 512.
"""

from __future__ import annotations

import triton
import triton.language as tl

from partialfc.head.loss import SMALLEST_NORM

_SMALLEST_NORM: tl.constexpr = tl.constexpr(SMALLEST_NORM)


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    """`keyed_random.mix` in int64."""
    x = x + -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _round(values, rows, columns, key, D):  # type: ignore[no-untyped-def]
    """`rows.round_stochastically`, bit for bit: float32 with the lower half of each number zero."""
    quarters = (D + 3) // 4
    draws = _mix(_mix(rows * quarters + columns // 4) ^ key)
    noise = ((draws >> ((columns % 4) * 16)) & 0xFFFF).to(tl.int32)
    bits = values.to(tl.int32, bitcast=True)
    rounded = ((bits + noise) & -65536).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(values) < float("inf"), rounded, values)


@triton.jit
def unit_kernel(  # type: ignore[no-untyped-def]
    centers, classes, unit, inverse, count, first, last, N, D, BN: tl.constexpr, BD: tl.constexpr
):
    """Gather a tile: the unit centers of classes[first:last] in `unit` (N, D), 1 over their norms in `inverse` (N,)."""
    positions, columns = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BD)
    sampled = first + positions < tl.minimum(tl.load(count), last)
    rows = tl.load(classes + first + positions, mask=sampled, other=0)
    in_d = (columns < D)[None, :]
    w = tl.load(centers + rows[:, None] * D + columns[None, :], mask=sampled[:, None] & in_d, other=0.0).to(tl.float32)
    square = tl.sum(w * w, 1)
    # A center without a direction (zero, infinite or NaN) becomes NaN, which the loss then shows.
    sound = (square >= _SMALLEST_NORM * _SMALLEST_NORM) & (square < float("inf"))
    inverses = 1.0 / tl.maximum(tl.sqrt(square), _SMALLEST_NORM)
    scale = tl.where(sound, inverses, tl.where(sampled, float("nan"), 0.0))
    in_n = positions < N
    stored = (w * scale[:, None]).to(unit.dtype.element_ty)
    tl.store(unit + positions[:, None] * D + columns[None, :], stored, mask=in_n[:, None] & in_d)
    tl.store(inverse + positions, scale, mask=in_n)


@triton.jit
def weights_kernel(  # type: ignore[no-untyped-def]
    embeddings, unit, target_positions, weights, sums, conflicts, count,
    first, last, G, N, scale, shift, threshold, zero_logit,
    D: tl.constexpr, BG: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRODUCT: tl.constexpr, UPCAST: tl.constexpr, SUMS: tl.constexpr, CONFLICTS: tl.constexpr,
):  # fmt: skip
    """`weights` (G, N): exp(s c − shift) of samples and a tile's classes, 0 for own classes, conflicts and padding.

    With PRODUCT the cosines are computed here from `embeddings` (G, D) and `unit` (N, D); otherwise `weights` holds
    them. With SUMS each block of classes adds its part of Z to a row of `sums` (blocks, G), and with CONFLICTS the
    number of negatives it left out to a row of `conflicts`. UPCAST is for the interpreter, whose dot is wrong for
    bfloat16.
    """
    # Neighbouring programs share their classes, whose rows are then cached; the samples' rows stay cached anyway.
    blocks = tl.cdiv(G, BG)
    block = tl.program_id(0) // blocks
    samples = (tl.program_id(0) % blocks) * BG + tl.arange(0, BG)
    positions = block * BN + tl.arange(0, BN)
    used = tl.minimum(tl.load(count), last) - first
    at = samples[:, None] * N + positions[None, :]
    inside = (samples < G)[:, None] & (positions < N)[None, :]
    if PRODUCT:
        # Rows past the end repeat the last one: loads need no mask, and none of the results is stored.
        left = embeddings + tl.minimum(samples, G - 1)[:, None] * D
        right = unit + tl.minimum(positions, N - 1)[None, :] * D
        cosine = tl.zeros((BG, BN), tl.float32)
        for start in range(0, tl.where(block * BN < used, D, 0), BK):
            k = start + tl.arange(0, BK)
            if D % BK == 0:
                e, w = tl.load(left + k[None, :]), tl.load(right + k[:, None])
            else:
                e = tl.load(left + k[None, :], mask=(k < D)[None, :], other=0.0)
                w = tl.load(right + k[:, None], mask=(k < D)[:, None], other=0.0)
            if UPCAST:
                e, w = e.to(tl.float32), w.to(tl.float32)
            cosine = tl.dot(e, w, cosine, input_precision="ieee")
    else:
        cosine = tl.load(weights + at, mask=inside, other=0.0)
    targets = tl.load(target_positions + samples, mask=samples < G, other=-1)
    negative = (positions < used)[None, :] & ((first + positions)[None, :] != targets[:, None])
    values = tl.where(negative & ~(cosine > threshold), tl.exp(scale * cosine - shift), 0.0)
    if SUMS:
        total, own, in_g = tl.sum(values, 1), block * G + samples, samples < G
        if CONFLICTS:
            left_out = tl.sum((negative & (cosine > threshold)).to(tl.float32), 1)
            total += left_out * zero_logit
            tl.store(conflicts + own, tl.load(conflicts + own, mask=in_g, other=0.0) + left_out, mask=in_g)
        tl.store(sums + own, tl.load(sums + own, mask=in_g, other=0.0) + total, mask=in_g)
    tl.store(weights + at, values.to(weights.dtype.element_ty), mask=inside)


@triton.jit
def finish_kernel(  # type: ignore[no-untyped-def]
    centers, classes, inverse, gradient, slots, target_gradient, momentum_buffer, keys, skip, count, rate,
    first, last, D, momentum, decay, first_row,
    BN: tl.constexpr, BD: tl.constexpr, UPDATE: tl.constexpr, RATE_ON_DEVICE: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """Project `gradient` (N, D) of a tile's unit centers, add the targets', and store it or update the rows with it."""
    positions, columns = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BD)
    sampled = first + positions < tl.minimum(tl.load(count), last)
    inside = sampled[:, None] & (columns < D)[None, :]
    rows = tl.load(classes + first + positions, mask=sampled, other=0)
    offsets, in_tile = rows[:, None] * D + columns[None, :], positions[:, None] * D + columns[None, :]
    w = tl.load(centers + offsets, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(inverse + positions, mask=sampled, other=0.0)[:, None]
    g = tl.load(gradient + in_tile, mask=inside, other=0.0)
    g = (g - (tl.sum(g * w, 1)[:, None] * scale * scale) * w) * scale
    slot = tl.load(slots + first + positions, mask=sampled, other=-1).to(tl.int64)[:, None]
    g += tl.load(target_gradient + slot * D + columns[None, :], mask=inside & (slot >= 0), other=0.0)
    if UPDATE:
        lr = tl.load(rate) if RATE_ON_DEVICE else rate
        go = inside & (tl.load(skip + tl.zeros((BN, 1), tl.int32)) == 0)
        velocity = g + decay * w
        if MOMENTUM:
            velocity += momentum * tl.load(momentum_buffer + offsets, mask=inside, other=0.0).to(tl.float32)
        w = w - lr * velocity
        numbers = (rows + first_row)[:, None]
        if centers.dtype.element_ty == tl.bfloat16:
            w = _round(w, numbers, columns[None, :], tl.load(keys), D)
        if MOMENTUM:
            if momentum_buffer.dtype.element_ty == tl.bfloat16:
                velocity = _round(velocity, numbers, columns[None, :], tl.load(keys + 1), D)
            tl.store(momentum_buffer + offsets, velocity.to(momentum_buffer.dtype.element_ty), mask=go)
        tl.store(centers + offsets, w.to(centers.dtype.element_ty), mask=go)
    else:
        tl.store(gradient + in_tile, g, mask=inside)
