"""Data sets that TFDS prepared as array_record. TFDS reads that format without TensorFlow."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from planar_vae_jax.data._errors import DataError, Unavailable, brief, joined
from planar_vae_jax.data.dataset import Dataset, assemble


def load_prepared(name: str, data_dir: Path | None) -> Dataset:
    """The data set that somebody prepared in ``data_dir`` or in TFDS's folder, in TFDS's shuffled order.

    TFDS's folder is ``$TFDS_DATA_DIR``, by default ~/tensorflow_datasets.

    Raises:
        Unavailable: it is in neither, or has another format, or TFDS is not installed.
        DataError: it is damaged.
    """
    default = Path(os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))
    folders = [folder for folder in (data_dir, default) if folder is not None]
    reason = f"no prepared TFDS data set in {joined(folders, ' or ')}"
    for folder in folders:
        for info in sorted((folder / name).glob("[0-9]*/dataset_info.json"), reverse=True):
            try:
                return _load(name, info.parent)
            except Unavailable as error:
                reason = str(error)
    raise Unavailable(reason)


def _load(name: str, path: Path) -> Dataset:
    try:
        import array_record.python  # noqa: F401  TFDS installs it on Linux only
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise Unavailable(f"{path} cannot be read here: {brief(error)}") from error
    try:
        builder = tfds.builder_from_directory(path)
        file_format = builder.info.file_format.value
        arrays = _read(builder) if file_format == "array_record" else {}
    except Exception as error:  # TFDS, protobuf and array_record have no class for damage in common
        raise DataError(f"{path} is damaged, repair or delete it: {brief(error)}") from error
    if not arrays:
        raise Unavailable(f"{path} is {file_format}, which TFDS reads with TensorFlow only")
    if max(int(x.max()) for field, x in arrays.items() if field[0] == "x") == 1:  # binarized_mnist: PNGs of 0 and 1
        arrays = {field: x * np.uint8(255) if field[0] == "x" else x for field, x in arrays.items()}
    return assemble(name, f"TFDS prepared data set in {path}", arrays)


def _read(builder: Any) -> dict[str, np.ndarray]:
    import tensorflow_datasets as tfds
    from PIL import Image

    arrays = {}
    # One batched read and PNGs decoded here take a third of the time of a loop over the source.
    decoders = {"image": tfds.decode.SkipDecoding()}
    for split in builder.info.splits:
        source = builder.as_data_source(split=split, decoders=decoders)
        examples = source.__getitems__(range(len(source)))
        short = "valid" if split == "validation" else split
        arrays[f"x_{short}"] = np.stack([np.asarray(Image.open(io.BytesIO(e["image"]))) for e in examples])
        if "label" in examples[0]:
            arrays[f"y_{short}"] = np.array([e["label"] for e in examples], np.uint8)
    return arrays
