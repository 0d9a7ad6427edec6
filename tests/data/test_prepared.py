"""Data sets that TFDS prepared, by its own builders and writers. TensorFlow is not needed."""

import importlib.resources
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from data_samples import as_dataset, assert_valid, binary, digits, error_of, idx_files, no_warning, write_gz

import planar_vae_jax
from planar_vae_jax.data import Dataset, load_dataset

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Small real array_record data sets: TFDS's own builders and writers, given images instead of files."""
    from PIL import Image

    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record", reason="TFDS installs array_record on Linux only")
    directory = tmp_path_factory.mktemp("prepared")

    def png(image):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        file.seek(0)
        return file

    def prepare(name, splits, arrays):
        def generate(split):
            short = split.replace("validation", "valid")
            for i, image in enumerate(arrays[f"x_{short}"]):
                label = {"label": int(arrays[f"y_{short}"][i])} if f"y_{short}" in arrays else {}
                yield i, {"image": png(image), **label}

        builder = tfds.builder(name, data_dir=directory, file_format="array_record")
        builder._split_generators = lambda manager: {split: generate(split) for split in splits}
        builder.download_and_prepare()

    with pytest.MonkeyPatch.context() as patch:
        # TFDS's builders want this package, and do not declare it; the standard library's has all they use.
        patch.setitem(sys.modules, "importlib_resources", importlib.resources)
        tfds.disable_progress_bar()
        prepare("mnist", ("train", "test"), digits())
        ones = {field: x // 255 for field, x in binary(7, 3, 5).items()}
        prepare("binarized_mnist", ("train", "validation", "test"), ones)
    return directory


def sorted_rows(dataset: Dataset, split: str) -> list:
    """Images with their labels in an order of their own: TFDS shuffles."""
    x, y = getattr(dataset, f"x_{split}"), getattr(dataset, f"y_{split}")
    return sorted(zip(map(bytes, x), itertools.repeat(None) if y is None else y.tolist(), strict=False))


@pytest.mark.parametrize("where", ["data_dir", "TFDS_DATA_DIR"])
@pytest.mark.parametrize("name", ["mnist", "auto"])
def test_prepared_mnist(prepared, monkeypatch, tmp_path, name, where):
    if where == "TFDS_DATA_DIR":
        monkeypatch.setenv(where, str(prepared))
    dataset = load_dataset(name, prepared if where == "data_dir" else tmp_path, warn=no_warning)
    assert_valid(dataset)
    assert dataset.name == "mnist"
    assert dataset.source == f"TFDS prepared data set in {prepared / 'mnist' / '3.0.1'}"
    for split in ("train", "test"):
        assert sorted_rows(dataset, split) == sorted_rows(as_dataset(digits()), split)


def test_prepared_binarized_mnist(prepared):
    dataset = load_dataset("binarized_mnist", prepared)
    assert_valid(dataset)
    assert dataset.y_train is None
    for split in ("train", "valid", "test"):
        assert sorted_rows(dataset, split) == sorted_rows(as_dataset(binary(7, 3, 5)), split)


def test_own_files_come_before_a_prepared_data_set(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    write_gz(tmp_path, idx_files(digits()))
    assert load_dataset("mnist", tmp_path).source.startswith("IDX files")


@pytest.mark.parametrize("damage", ["truncated", "missing", "json", "no splits"])
@pytest.mark.parametrize("name", ["mnist", "auto"])
def test_damaged_prepared_data_set_is_named(prepared, tmp_path, name, damage):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "mnist" / "3.0.1"
    shard = next(path.glob("mnist-test*"))
    if damage == "truncated":
        os.truncate(shard, shard.stat().st_size // 2)
    elif damage == "missing":
        shard.unlink()
    elif damage == "json":
        (path / "dataset_info.json").write_text("{")
    else:
        info = json.loads((path / "dataset_info.json").read_text())
        (path / "dataset_info.json").write_text(json.dumps(info | {"splits": info["splits"][:1]}))
    assert str(path) in error_of(name, tmp_path)


def test_tfrecord_is_told_and_passed_over(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "mnist" / "3.0.1"
    info = json.loads((path / "dataset_info.json").read_text())
    (path / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    assert f"{path} is tfrecord, which TFDS reads with TensorFlow only" in error_of("mnist", tmp_path)


@pytest.mark.slow
def test_prepared_needs_neither_tensorflow_nor_importlib_resources(prepared):
    script = f"""if True:
        import sys
        sys.modules["importlib_resources"] = None  # importing it fails
        from planar_vae_jax.data import load_dataset
        assert len(load_dataset("mnist", {str(prepared)!r}).x_test) == 20
        assert "tensorflow" not in sys.modules
    """
    command = [sys.executable, "-W", "error", "-c", script]
    root = Path(planar_vae_jax.__file__).parents[1]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
