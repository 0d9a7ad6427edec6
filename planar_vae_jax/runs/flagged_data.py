"""The images that an experiment's flags ask for; what is wrong is told by the flag's name."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from planar_vae_jax.data import (
    ArgumentError,
    DataError,
    Dataset,
    dataset_identity,
    hold_out,
    load_dataset,
    select_classes,
)
from planar_vae_jax.runs.config import UsageError

_AS_FLAG = (" a data_dir", " --data_dir")  # the library's advice names its argument; of equal length, for boxes


def load_images(
    name: str, data_dir: str | None, classes: tuple[int, ...] | None, validation: int, warn: Callable[[str], object]
) -> tuple[Dataset, dict[str, Any]]:
    """The images that are asked for, and what tells them from others.

    Args:
        name, data_dir, warn: see :func:`planar_vae_jax.data.load_dataset`.
        classes: the labels that are kept; ``None``: all.
        validation: how many training images are held out.

    Raises:
        UsageError: there are no such images.
    """
    with _flags_named():
        data = load_dataset(name, data_dir, warn=lambda text: warn(text.replace(*_AS_FLAG)))
    return choose_images(data, classes, validation)


def choose_images(data: Dataset, classes: tuple[int, ...] | None, validation: int) -> tuple[Dataset, dict[str, Any]]:
    """:func:`load_images`, of a data set that is loaded."""
    with _flags_named():
        if classes is not None:
            data = select_classes(data, classes)
        return hold_out(data, validation) if validation else data, dataset_identity(data)


@contextmanager
def _flags_named() -> Iterator[None]:
    try:
        yield
    except DataError as error:
        dashes = "--" if isinstance(error, ArgumentError) else ""  # it names the argument, which is the flag
        raise UsageError(f"{dashes}{error}".replace(*_AS_FLAG)) from error
