"""Rounding of weights, and ranges of activations.

Weights are symmetric, per output channel; activations are asymmetric, per tensor, and always contain zero, so that
padding and ReLU are exact (Jacob et al., 2018; Krishnamoorthi, 2018).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from autocompress.core.errors import StageError
from autocompress.core.recipe import Calibrator

PERCENTILE = 99.99
BINS = 4096  # of the histograms that entropy compares: many more than the integers there are
_SHRINKS = np.linspace(1.0, 0.4, 25)
_AT_ONCE = 2**17  # weights whose 25 errors are computed together: they stay in a core's cache, 9 times as fast
_SMALLEST_SCALE = 1e-9  # a channel of zeros would divide by zero


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationStats:
    """What calibration saw of one tensor: true extremes and an evenly spaced sample of its values."""

    low: float
    high: float
    sample: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationScale:
    """uint8 affine quantization: real = scale · (q − zero_point)."""

    scale: float
    zero_point: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What preparing weights for bits found out, by layer; the export takes it instead of finding its own.

    Attributes:
        scales: of each output channel's weights, which lie on scale × integer.
        inputs: lowest and highest value of the layer's input.
        simulated: what the model gave for the first calibration items while it still rounded in training, its floating
            outputs in order; a file has to give the same.
    """

    scales: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    inputs: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    simulated: tuple[NDArray[np.float32], ...] = ()


def quantize_weight(weight: NDArray[np.float32], bits: int, axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round `weight` to signed integers of `bits` bits with one scale per index of `axis`.

    At 8 bits the scale is the largest magnitude over 127. Below, where clipping a few weights pays, it is the one of
    25 smaller scales with the least squared error for that channel.

    Returns:
        int8 array of the same shape, and scales of shape (channels,).
    """
    top = 2 ** (bits - 1) - 1
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    scale = np.abs(rows).max(1).astype(np.float64) / top
    if bits < 8:
        few = max(1, _AT_ONCE // max(1, rows.shape[1]))
        errors = [_squared_errors(rows[i : i + few], scale[i : i + few], top) for i in range(0, len(rows), few)]
        scale = scale * _SHRINKS[np.argmin(np.concatenate(errors, axis=1), axis=0)]
    scale = np.maximum(scale, _SMALLEST_SCALE)
    shape = [1] * weight.ndim
    shape[axis] = -1
    q = np.clip(np.rint(weight / scale.reshape(shape)), -top, top)
    return q.astype(np.int8), scale.astype(np.float32)


def _squared_errors(rows: NDArray[np.float32], scale: NDArray[np.float64], top: int) -> NDArray[np.float32]:
    """Squared error of each row for each shrink of its scale, shrinks first."""
    errors = np.empty((len(_SHRINKS), len(rows)), np.float32)
    rounded = np.empty_like(rows)
    for shrink, error in zip(_SHRINKS, errors, strict=True):
        step = np.maximum(scale * shrink, _SMALLEST_SCALE).astype(np.float32)[:, None]
        np.multiply(rows, 1 / step, out=rounded)
        np.clip(np.rint(rounded, out=rounded), -top, top, out=rounded)
        np.subtract(np.multiply(rounded, step, out=rounded), rows, out=rounded)
        np.einsum("ij,ij->i", rounded, rounded, out=error)
    return errors


def activation_scale(stats: ActivationStats, calibrator: Calibrator, name: str, bits: int = 8) -> ActivationScale:
    """The uint8 scale for a tensor: of its true extremes, of a percentile, or with the least squared error.

    Of fewer than 8 bits, the lowest integers are used.
    """
    low, high = stats.low, stats.high
    if not (np.isfinite(low) and np.isfinite(high)):
        raise StageError("calibrate", f"activation {name!r} ranges from {low} to {high} on the calibration data")
    if calibrator == "percentile":
        low = max(low, float(np.percentile(stats.sample, 100 - PERCENTILE)))
        high = min(high, float(np.percentile(stats.sample, PERCENTILE)))
    low, high = min(low, 0.0), max(high, 0.0)
    if calibrator == "mse":
        scales = [_scale(low * s, high * s, bits) for s in _SHRINKS]
        errors = [_squared_error(stats.sample, s, bits) for s in scales]
        return scales[int(np.argmin(errors))]
    if calibrator == "entropy":
        scales = [_scale(low * s, high * s, bits) for s in _SHRINKS]
        return scales[int(np.argmin([_divergence(stats.sample, low, high, s, bits) for s in scales]))]
    return _scale(low, high, bits)


def _divergence(sample: NDArray[np.float32], low: float, high: float, s: ActivationScale, bits: int) -> float:
    """KL divergence of the values from their quantized form, as histograms over the whole range.

    What is clipped lies in the outermost bins of the one, and is missing in the other; within each quantized value the
    other is level over the bins that hold anything (Migacz, 8-bit Inference with TensorRT, 2017). Zeros, which are
    exact in any form and half of what a rectifier gives, are left out.
    """
    if not high > low:
        return 0.0
    top = 2**bits - 1
    ends = (-s.zero_point * s.scale, (top - s.zero_point) * s.scale)
    edges = np.linspace(low, high, BINS + 1)
    centres = (edges[1:] + edges[:-1]) / 2
    whole = np.histogram(sample[sample != 0], edges)[0].astype(np.float64)
    inside = (centres >= ends[0]) & (centres <= ends[1])
    if not inside.any() or not whole.any():
        return float("inf")
    kept = np.where(inside, whole, 0.0)
    wanted = kept.copy()
    first, last = np.flatnonzero(inside)[[0, -1]]
    wanted[first] += whole[:first].sum()
    wanted[last] += whole[last + 1 :].sum()
    level = np.clip(np.rint(centres / s.scale) + s.zero_point, 0, top).astype(int)
    held = wanted > 0
    total = np.bincount(level[held], kept[held], top + 1)
    count = np.bincount(level[held], minlength=top + 1)
    given = np.where(held, total[level] / np.maximum(count[level], 1), 0.0)
    p, q = wanted[held] / wanted.sum(), np.maximum(given[held] / max(given.sum(), 1.0), 1e-9)
    return float((p * np.log(p / q)).sum())


def _scale(low: float, high: float, bits: int) -> ActivationScale:
    top = 2**bits - 1
    scale = max((high - low) / top, 1e-8)
    return ActivationScale(scale=scale, zero_point=int(np.clip(round(-low / scale), 0, top)))


def _squared_error(sample: NDArray[np.float32], s: ActivationScale, bits: int) -> float:
    q = np.clip(np.rint(sample / s.scale) + s.zero_point, 0, 2**bits - 1)
    return float((((q - s.zero_point) * s.scale - sample) ** 2).mean())
