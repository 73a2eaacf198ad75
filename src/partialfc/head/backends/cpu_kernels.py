"""Row loops of the CPU backend, compiled by numba: each reads a row once and finishes it while it is in the cache.

numba has no bfloat16, so such arrays are passed as uint16 of the same bits. Every function is single-threaded and
releases Python's lock; the caller spreads tiles over threads. numba compiles no branch for an argument that is None.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from partialfc.head.loss import SMALLEST_NORM

_SMALLEST_NORM = np.float32(SMALLEST_NORM)
_SMALLEST_SQUARE, _LARGEST = np.float32(SMALLEST_NORM**2), np.finfo(np.float32).max
_OWN_CLASS = np.float32(-2.0)  # below every cosine: marks a sample's own class in a tile
_EXACT = {"contract"}
_REASSOCIATED = {"contract", "reassoc", "nsz"}  # lets a sum run in vector lanes


@intrinsic
def _float_bits(context: Any, value: Any) -> Any:
    """The 32 bits of a float32 as uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def _bits_float(context: Any, bits: Any) -> Any:
    """The float32 with these 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@njit(nogil=True, cache=True, fastmath=_EXACT, error_model="numpy")
def _to_bfloat16(value: Any) -> Any:
    """The bits of the nearest bfloat16, ties to even."""
    bits = _float_bits(value)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(nogil=True, cache=True, fastmath=_EXACT, error_model="numpy")
def _exp(x: Any) -> Any:
    """exp(x) in float32 for x below 88, to two units in the last place; 0 where it would be subnormal.

    2^n e^r with n the nearest integer to x / log 2; log 2 in two parts keeps r exact; the Taylor terms reach float32.
    """
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = (x - n * np.float32(0.693359375)) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.0 / 5040.0)
    p = p * r + np.float32(1.0 / 720.0)
    p = p * r + np.float32(1.0 / 120.0)
    p = p * r + np.float32(1.0 / 24.0)
    p = p * r + np.float32(1.0 / 6.0)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    power = np.uint32(np.int32(max(n, np.float32(-127.0))) + np.int32(127)) << np.uint32(23)
    return p * _bits_float(power)  # n = -127 gives the bits of 0.0


@njit(nogil=True, cache=True, fastmath=_REASSOCIATED, error_model="numpy")
def _inverse_norm(row: Any) -> Any:
    """1 over the norm; NaN for a row without a direction, which the loss then shows: zero, infinite or NaN."""
    total = np.float32(0.0)
    for d in range(row.shape[0]):
        total += row[d] * row[d]
    return np.float32(1.0) / np.sqrt(total) if _SMALLEST_SQUARE <= total <= _LARGEST else np.float32(np.nan)


@njit(nogil=True, cache=True, fastmath=_EXACT, error_model="numpy")
def gather_unit_rows(centers: Any, rows: Any, unit: Any, rounded: Any) -> None:
    """unit (n, D) = the normalised `rows` (n,) of centers (L, D), float32; also `rounded` to bfloat16 unless None."""
    for k in range(rows.shape[0]):
        row = centers[rows[k]]
        inverse = _inverse_norm(row)
        for d in range(row.shape[0]):
            value = row[d] * inverse
            unit[k, d] = value
            if rounded is not None:
                rounded[k, d] = _to_bfloat16(value)


@njit(nogil=True, cache=True, fastmath=_EXACT, error_model="numpy")
def mark_own_classes(cosine: Any, target_positions: Any, first: Any) -> None:
    """Mark the samples' own classes in cosine (n, G), whose rows are the classes from `first` on."""
    for i in range(target_positions.shape[0]):
        k = target_positions[i] - first
        if 0 <= k < cosine.shape[0]:
            cosine[k, i] = _OWN_CLASS


@njit(nogil=True, cache=True, fastmath=_EXACT, error_model="numpy")
def _weight(c: Any, logit: Any, scale: Any, shift: Any, threshold: Any) -> Any:
    """exp(scale logit − shift) for a cosine; 0 for a marked own class and for a conflict, NaN for NaN."""
    return np.float32(0.0) if (c <= _OWN_CLASS) | (c > threshold) else _exp(scale * logit - shift)


@njit(nogil=True, cache=True, fastmath=_EXACT, error_model="numpy")
def exponentials(
    cosine: Any,
    scale: Any,
    shift: Any,
    threshold: Any,
    limits: Any,
    t: Any,
    sums: Any,
    left_out: Any,
    rounded: Any,
) -> None:
    """exp(scale c − shift) of cosine (n, G): 0 for own classes and for conflicts, which exceed `threshold`.

    With limits (G,) float32, not None, the logit of a cosine above its limit is c (t + c) instead of c, and what is
    stored is multiplied by its derivative.

    Replaces `cosine`, or is stored in `rounded` as bfloat16 unless that is None. Adds the unrounded values to sums (G,)
    float32, and the number of conflicts of each sample to left_out (G,) int32.
    """
    for k in range(cosine.shape[0]):
        row = cosine[k]
        for i in range(row.shape[0]):
            c = row[i]
            logit = c
            if limits is not None:
                logit = c * (t + c) if c > limits[i] else c
            weight = _weight(c, logit, scale, shift, threshold)
            left_out[i] += np.int32(c > threshold)
            sums[i] += weight
            if limits is not None:
                weight *= t + c + c if c > limits[i] else np.float32(1.0)
            if rounded is None:
                row[i] = weight
            else:
                rounded[k, i] = _to_bfloat16(weight)


@njit(nogil=True, cache=True, fastmath=_REASSOCIATED, error_model="numpy")
def _project(center: Any, gradient: Any) -> None:
    """Replace the gradient (D,) of a unit center by that of the center itself: (g − (g·ŵ) ŵ) / |w|."""
    square = np.float32(0.0)
    dot = np.float32(0.0)
    for d in range(center.shape[0]):
        square += center[d] * center[d]
        dot += center[d] * gradient[d]
    inverse = np.float32(1.0) / max(np.sqrt(square), _SMALLEST_NORM)
    along = dot * inverse * inverse
    for d in range(center.shape[0]):
        gradient[d] = (gradient[d] - along * center[d]) * inverse


@njit(nogil=True, cache=True, fastmath=_EXACT, error_model="numpy")
def finish_gradient(centers: Any, rows: Any, gradient: Any, target_rows: Any, target_gradient: Any) -> None:
    """Project gradient (n, D) of the unit centers of `rows` in place, and add the targets' (T, D) where rows coincide.

    `rows` (n,) and `target_rows` (T,) are sorted.
    """
    cursor = np.searchsorted(target_rows, rows[0])
    for k in range(rows.shape[0]):
        _project(centers[rows[k]], gradient[k])
        while cursor < target_rows.shape[0] and target_rows[cursor] < rows[k]:
            cursor += 1
        if cursor < target_rows.shape[0] and target_rows[cursor] == rows[k]:
            for d in range(gradient.shape[1]):
                gradient[k, d] += target_gradient[cursor, d]


@njit(nogil=True, cache=True, fastmath=_EXACT, error_model="numpy")
def sgd_rows(
    centers: Any, momentum_buffer: Any, rows: Any, gradient: Any, lr: Any, momentum: Any, weight_decay: Any
) -> None:
    """One step of SGD on the `rows` (n,) of centers and momentum_buffer (L, D) by gradient (n, D); all float32.

    Without momentum the buffer is None.
    """
    for k in range(rows.shape[0]):
        center = centers[rows[k]]
        if momentum_buffer is None:
            for d in range(center.shape[0]):
                center[d] = center[d] - lr * (gradient[k, d] + weight_decay * center[d])
        else:
            velocity = momentum_buffer[rows[k]]
            for d in range(center.shape[0]):
                v = momentum * velocity[d] + (gradient[k, d] + weight_decay * center[d])
                velocity[d] = v
                center[d] = center[d] - lr * v


@njit(nogil=True, cache=True, fastmath=_EXACT, error_model="numpy")
def transform_rows(centers: Any, momentum_buffer: Any, rows: Any, missed: Any, products: Any) -> None:
    """Apply to the `rows` (n,) of centers and momentum_buffer (L, D) the 2 × 2 matrices products[missed] (k, 4)."""
    for k in range(rows.shape[0]):
        if missed[k] == 0:
            continue
        center = centers[rows[k]]
        velocity = momentum_buffer[rows[k]]
        a, b, c, e = products[missed[k]]
        for d in range(center.shape[0]):
            value = center[d]
            speed = velocity[d]
            center[d] = a * value + b * speed
            velocity[d] = c * value + e * speed
