"""What people save as images, made levels 0 to 255; or refused with the cure."""

from collections.abc import Callable, Mapping

import numpy as np

from planar_vae_jax.data.errors import DataError, joined, shown

WANTED = "wanted images [N, H, W] or [N, H, W, 3] uint8 of 0 to 255, N > 0"
DARK = 128  # a data set whose lightest pixel is darker was hardly meant to be
SLACK = 1e-6  # what an interpolation's rounding adds to white, or takes from black


def to_levels(images: Mapping[str, np.ndarray], source: str, warn: Callable[[str], object]) -> dict[str, np.ndarray]:
    """Images by field as ``[N, H, W]`` or, in colour, ``[N, H, W, 3]`` uint8.

    An axis of 1 for the channel is dropped, one of 3 goes last, floats in 0 to 1 and booleans are multiplied by 255,
    other integers in 0 to 255 become uint8. Whatever is changed, or looks as if another scale was meant, is said by
    ``warn``: a line for all fields that it is true of.

    Raises:
        DataError: nothing sensible can be made of an array.
    """
    lines: dict[str, list[str]] = {}
    converted = {}
    for field, x in images.items():
        where = f"{source}: {field}"
        converted[field] = _as_uint8(_channels_last(x, where), where)
        if said := _said(x, converted[field]):
            lines.setdefault(said, []).append(field)
    for line, fields in lines.items():
        warn(f"{source}: {joined(fields)}: {line}")
    return converted


def _channels_last(x: np.ndarray, where: str) -> np.ndarray:
    """``[N, H, W]`` or ``[N, H, W, 3]``; of two axes that may be the channel's, 1 goes before 3, last before first."""
    channels = _channels(x)
    if x.size == 0 or (x.ndim != 3 and channels is None):
        raise DataError(f"{where}: {WANTED}, got {shown(x)}")
    if channels is not None and x.shape[3] != channels:
        x = np.moveaxis(x, 1, 3)
    return x[..., 0] if channels == 1 else x


def _channels(x: np.ndarray) -> int | None:
    """How many channels an array with an axis for them has, last or after the first; None of any other."""
    return next((n for n in (1, 3) if x.ndim == 4 and n in (x.shape[3], x.shape[1])), None)


def _as_uint8(x: np.ndarray, where: str) -> np.ndarray:
    if x.dtype == np.uint8:
        return x
    if x.dtype == bool:
        return x * np.uint8(255)
    if np.issubdtype(x.dtype, np.floating):
        return _from_floats(x, where)
    if not np.issubdtype(x.dtype, np.integer):
        raise DataError(f"{where}: {WANTED}, got {shown(x)}")
    if x.min() < 0 or x.max() > 255:
        raise DataError(f"{where}: {WANTED}, got {shown(x)} from {x.min()} to {x.max()}: scale them to 0 to 255")
    return x.astype(np.uint8)


def _from_floats(x: np.ndarray, where: str) -> np.ndarray:
    if not np.isfinite(x).all():
        raise DataError(f"{where}: {WANTED}, got {shown(x)}{'' if np.isnan(x).any() else ' with infinite values'}")
    low, high = float(x.min()), float(x.max())
    if low < -SLACK or high > 1 + SLACK:
        raise DataError(
            f"{where}: {WANTED}, or floats from 0 to 1; got {shown(x)} from {low:g} to {high:g}: "
            f"{_cure(low, high)} instead"
        )
    return np.rint(np.clip(x, 0, 1) * np.asarray(255, x.dtype)).astype(np.uint8)


def _cure(low: float, high: float) -> str:
    """What a user does with floats from ``low`` to ``high``, which are not 0 to 1."""
    if low < 0 or high > 255:
        return "scale them to 0 to 1"
    return f"save x / {high:g}" if high < DARK else "save x.astype(numpy.uint8)"


def _said(came: np.ndarray, made: np.ndarray) -> str:
    """What was made of an array, and a doubt about its scale; empty for what was wanted."""
    parts = []
    if came.dtype != np.uint8 or came.shape != made.shape:
        parts.append(f"{_kind(came)} taken as {'[N, H, W]' if made.ndim == 3 else '[N, H, W, 3]'} uint8{_how(came)}")
    highest = int(made.max())
    if made.min() < highest < DARK:
        parts.append(too_dark(came.dtype, highest, came.max()))
    return "; ".join(parts)


def _kind(came: np.ndarray) -> str:
    channels = _channels(came)
    axes = "H, W" if channels is None else f"H, W, {channels}" if came.shape[3] == channels else f"{channels}, H, W"
    return f"[N, {axes}] {came.dtype}"


def _how(came: np.ndarray) -> str:
    if came.dtype == bool or np.issubdtype(came.dtype, np.floating):
        return ", 255 times what came, rounded"
    return ""


def too_dark(dtype: np.dtype, highest: int, came: float = 0.0) -> str:
    """A doubt about the scale of images whose lightest level is ``highest``; of floats, the lightest that ``came``."""
    if np.issubdtype(dtype, np.floating):
        return f"nearly black: their maximum is {came:.3g}, where 1 is white. Save x / x.max() if that was meant"
    return (
        f"nearly black: their maximum is {highest}, where 255 is white. "
        f"If {highest} was meant as white, multiply by 255 // {highest} = {255 // highest} before saving"
    )
