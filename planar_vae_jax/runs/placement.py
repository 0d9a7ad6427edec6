"""Where the images of a run are: whole on each device while they fit, else on the host and sent in chunks."""

from typing import Any

import jax
import numpy as np

from planar_vae_jax.analysis.evaluation import Images, fixed_images
from planar_vae_jax.data import Dataset
from planar_vae_jax.data.streamed import Streamed
from planar_vae_jax.runs.config import UsageError
from planar_vae_jax.runs.devices import Devices
from planar_vae_jax.runs.memory import device_limit, show_bytes

MAPPED_LIMIT = 2**30  # bytes of a memory-mapped data set, on devices that do not tell what they have, as a CPU
KEY_BYTES = 8  # of each image that is evaluated


class Placement:
    """The images of a run as they are trained on and evaluated, and where they are."""

    def __init__(self, data: Dataset, binarization: str, devices: Devices, batch_size: int, asked: str | None):
        """Decides; nothing is read or sent yet.

        Args:
            data: the images, in memory or memory-mapped.
            binarization: what is made of them.
            devices: where they are computed on.
            batch_size: images of a training step.
            asked: ``--device_memory``.

        Raises:
            UsageError: ``asked`` is no size, or too small for four batches.
        """
        self.data, self.binarization, self.devices = data, binarization, devices
        limit = device_limit(asked, devices.used)
        if limit is None and isinstance(data.x_train, np.memmap):
            limit = MAPPED_LIMIT
        evaluated = [x for x in (data.x_test, data.x_valid) if x is not None]
        self._train = data.x_train.nbytes
        self._evaluated = sum(x.nbytes + KEY_BYTES * len(x) for x in evaluated)
        self._train_room, self._evaluated_room = rooms(self._train, self._evaluated, limit)
        least = 4 * batch_size * data.x_train[:1].nbytes
        if self._train_room is not None and limit is not None and limit < least:
            raise UsageError(
                f"--device_memory must be at least {show_bytes(least)}, four batches of {batch_size} images, to send "
                f"them in chunks; got {asked or show_bytes(limit)}"
            )

    def __str__(self) -> str:
        """For people: ``47 MB of training images, 7.92 MB of test and validation images``."""
        kinds = "test images" if self.data.x_valid is None else "test and validation images"
        shares = ((self._train, self._train_room, "training images"), (self._evaluated, self._evaluated_room, kinds))
        return ", ".join(
            f"{show_bytes(size)} of {kind}{'' if room is None else f' in chunks, {show_bytes(room)} at once'}"
            for size, room, kind in shares
        )

    @property
    def streams(self) -> bool:
        """Whether the training images are sent in chunks."""
        return self._train_room is not None

    def train(self) -> Any:
        """For :func:`planar_vae_jax.runs.fit.fit`; static images are drawn once, for every seed the same."""
        x, static = self.data.x_train, self.binarization == "static"
        if self._train_room is None:
            return np.asarray(fixed(x, self.data.train_index, "train", "static").pixels if static else x)

        def fetch(rows: np.ndarray) -> Any:  # by keys of their own: the same whenever they are drawn
            return fixed(x[rows], self.data.train_index[rows], "train", "static").pixels if static else x[rows]

        return Streamed(fetch, pixels_of(x), len(x), self._train_room)

    def test(self) -> Images | Streamed:
        """The test images as they are evaluated, on all devices."""
        return self._to_evaluate(self.data.x_test, self.data.test_index, "test")

    def valid(self) -> Images | Streamed | None:
        """Likewise the validation images, if there are any."""
        x, index = self.data.x_valid, self.data.valid_index
        return None if x is None or index is None else self._to_evaluate(x, index, "valid")

    def _to_evaluate(self, x: Any, index: np.ndarray, split: str) -> Images | Streamed:
        if self._evaluated_room is None:
            whole: Images = self.devices.replicate(fixed(x, index, split, self.binarization))
            return whole

        def fetch(rows: np.ndarray) -> Images:
            return fixed(x[rows], index[rows], split, self.binarization)

        like = pixels_of(x), jax.ShapeDtypeStruct((KEY_BYTES,), np.uint8)  # as many bytes as a key
        streamed: Streamed = self.devices.replicate(Streamed(fetch, like, len(x), self._evaluated_room))
        return streamed


def fixed(x: Any, index: np.ndarray, split: str, binarization: str) -> Images:
    """:func:`planar_vae_jax.analysis.evaluation.fixed_images`, of a file too."""
    return fixed_images(np.asarray(x), index, split, binarization)


def pixels_of(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and type of one image."""
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)


def rooms(train: int, evaluated: int, limit: int | None) -> tuple[int | None, int | None]:
    """Bytes for two chunks of the training images, and of those that are evaluated; ``None``: they are whole.

    While all fit in the limit, all are whole. Else what is evaluated is whole if it fits in half of it, and has that
    half for chunks if not; training images have the rest, whole or for chunks.
    """
    if limit is None or train + evaluated <= limit:
        return None, None
    half = limit // 2
    rest = limit - evaluated if evaluated <= half else half
    return None if train <= rest else rest, None if evaluated <= half else half
