"""Data sets: uint8 images ``[N, H, W]`` (in colour ``[N, H, W, 3]``) of whole splits, and their labels.

::

    dataset = load_dataset("mnist", data_dir)        # or "auto", "mnist5k", "digits.npz" ...
    threes = select_classes(dataset, [3])
    dataset = hold_out(dataset, 5000)                # 5000 training images become the validation split

From a name to a data set (sources.py, where one table holds the address and checksum of each file):

- ``DATASETS``: the names.
- ``load_dataset``: the data set of a name, of FILE.npz, or of a folder of npy files.
- ``load_images``: the same with some classes chosen and a validation split held out, and its identity.

A data set (dataset.py):

- ``Dataset``: images, labels and their positions in the split.
- ``assemble``: a data set from arrays in memory.
- ``select_classes``, ``hold_out``, ``choose_images``: smaller data sets made of one.
- ``dataset_identity``: checksums that tell one data set from another.
- ``examples``, ``is_binary``: test images to show; whether all pixels are 0 or 255.

Points ``[N, D]`` that a density is fitted to (points.py):

- ``Points``: train, validation and test split, and the scale by which they are standardised.
- ``read_points``: those of FILE.npy.
- ``split_points``, ``assemble_points``: those in memory.

Other images, and errors:

- ``read_images``: images that a user has in FILE.npz or in pictures, as ``Pictures`` (images.py).
- ``DataError``, and its ``ArgumentError``: one line that says what was wanted, what came, and where.

Batches that are larger than a device's memory are in streamed.py.
"""

from planar_vae_jax.data._errors import ArgumentError, DataError
from planar_vae_jax.data.dataset import (
    Dataset,
    assemble,
    dataset_identity,
    examples,
    hold_out,
    is_binary,
    select_classes,
)
from planar_vae_jax.data.images import Pictures, read_images
from planar_vae_jax.data.points import Points, assemble_points, read_points, split_points
from planar_vae_jax.data.sources import DATASETS, choose_images, load_dataset, load_images

__all__ = [
    "DATASETS",
    "ArgumentError",
    "DataError",
    "Dataset",
    "Pictures",
    "Points",
    "assemble",
    "assemble_points",
    "choose_images",
    "dataset_identity",
    "examples",
    "hold_out",
    "is_binary",
    "load_dataset",
    "load_images",
    "read_images",
    "read_points",
    "select_classes",
    "split_points",
]
