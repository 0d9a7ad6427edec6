"""Exported models: the figures of the run that they are of, README.txt as it stands, and folders left by mistakes."""

import re
import subprocess
import sys
import venv

import jax
import jax.export
import numpy as np
import pytest
from vae_models import drawn

from planar_vae_jax import export
from planar_vae_jax.export import README, export_run
from planar_vae_jax.load import Run
from planar_vae_jax.runs import RunError

pytest.importorskip("flatbuffers", reason="jax.export saves functions by flatbuffers")

SHAPE, KEY, SAMPLES = (8, 4), jax.random.key(7), 5
MODELS = {
    "shared": (SHAPE, "dynamic", {"hidden": 8, "latent": 5, "flow_length": 3}),
    "no layers, colour": (
        (4, 4, 3),
        "none",
        {"hidden": 8, "latent": 2, "flow_length": 0, "likelihood": "logistic", "posterior": "full"},
    ),
    "conv, amortised": (SHAPE, "threshold", {"kind": "conv", "latent": 2, "flow_length": 2, "amortized": True}),
}


def run_of(name):
    shape, binarization, options = MODELS[name]
    return Run({"nll_samples": SAMPLES}, drawn(shape, **options), 12, binarization, shape)


def images_of(run, number):
    return np.random.default_rng(1).integers(0, 256, (number, *run.image_shape), np.uint8)


def figures(run, images, key=KEY):
    """What the exported functions should return."""
    z = run.encode(images, key)
    return {
        "encoder": z,
        "decoder": run.decode(z),
        "free_energy": run.free_energy(images, key),
        "nll": run.nll(images, key, SAMPLES),
    }


@pytest.fixture(
    scope="module",
    params=[name if "conv" not in name else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
def exported(request, tmp_path_factory):
    run, folder = run_of(request.param), tmp_path_factory.mktemp("export") / "functions"
    return run, export_run(run, folder), folder


def test_the_functions_give_the_figures_of_the_run_for_any_number_of_images(exported):
    run, paths, _ = exported
    functions = {
        name: jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call) for name, path in paths.items()
    }
    for number in (1, 3):
        images = images_of(run, number)
        expected = figures(run, images)
        arguments = {name: (images, jax.random.key_data(KEY)) for name in functions}
        arguments["decoder"] = (expected["encoder"],)
        found = {name: function(*arguments[name]) for name, function in functions.items()}
        means, found["encoder"] = found["encoder"]
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=2e-5, atol=2e-5, err_msg=name)
        key = jax.random.key_data(jax.random.key(0))  # by which latents binarises
        means, _ = functions["encoder"](images, key)
        np.testing.assert_allclose(means, run.latents(images), rtol=2e-5, atol=2e-5)


def test_they_are_for_cpus_gpus_and_tpus_and_no_larger_than_their_parameters(exported):
    run, paths, _ = exported
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(run.model))
    for path in paths.values():
        assert jax.export.deserialize(bytearray(path.read_bytes())).platforms == ("cpu", "cuda", "tpu")
        assert path.stat().st_size < parameters + 500_000


def blocks(folder):
    """The programs of README.txt."""
    found = re.findall(r"((?:^    \S.*\n)+)", (folder / README).read_text(), re.MULTILINE)
    return ["".join(line[4:] for line in block.splitlines(keepends=True)) for block in found]


def test_the_lines_of_readme_load_each_function(exported, monkeypatch):
    run, _, folder = exported
    monkeypatch.chdir(folder)
    names = {"means": (3, run.latents(images_of(run, 1)).shape[1]), "pictures": (3, *run.image_shape), "nats": (3,)}
    found = []
    for block in blocks(folder):
        assert len(block.splitlines()) == 5
        space = {}
        exec(block, space)
        found += [name for name, shape in names.items() if np.shape(space.get(name)) == shape]
    assert found == ["means", "pictures", "nats", "nats"]


def test_an_export_that_is_there_is_kept_and_one_that_did_not_end_is_written_again(tmp_path, monkeypatch):
    run, folder = run_of("no layers, colour"), tmp_path / "functions"
    replacing, written = export.replacing, []

    def full(path):
        written.append(path)
        if len(written) == 3:  # once
            raise RunError("no space")
        return replacing(path)

    monkeypatch.setattr(export, "replacing", full)
    with pytest.raises(RunError, match="no space"):
        export_run(run, folder)
    assert {path.name for path in folder.iterdir()} == {"encoder.jaxexport", "decoder.jaxexport"}
    export_run(run, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == {f"{name}.jaxexport" for name in ("encoder", "decoder", "free_energy", "nll")} | {README}
    with pytest.raises(ValueError, match=r"folder must be a new one, or one without a README\.txt; got"):
        export_run(run, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(ValueError, match="folder must be a new one"):
        export_run(run, folder / README)
    with pytest.raises(ValueError, match="samples must be a whole number of at least 1; got 0"):
        export_run(run, tmp_path / "other", samples=0)
    assert not (tmp_path / "other").exists()


def test_without_flatbuffers_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ImportError, match="needs flatbuffers, the extra `export`"):
        export_run(run_of("shared"), tmp_path / "functions")
    assert not (tmp_path / "functions").exists()


ALONE = """
import importlib.util
import numpy
assert not any(map(importlib.util.find_spec, ("planar_vae_jax", "flax", "optax", "orbax")))
given = numpy.load("given.npz")
for number, program in enumerate(open("programs.txt").read().split("---")):
    *load, _, call = program.strip().splitlines()
    space = dict(given)
    exec("\\n".join([*load, call]), space)
    result = call.split(" = ")[0].split(", ")[-1]
    numpy.save(f"found{number}.npy", space[result])
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The Python of an environment of jax and flatbuffers alone."""
    folder = tmp_path_factory.mktemp("alone")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    command = [python, "-I", "-m", "pip", "install", "-q", f"jax=={jax.__version__}", "flatbuffers"]
    installed = subprocess.run(command, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"pip cannot install jax and flatbuffers here: {installed.stderr.strip()[-300:]}")
    return python


@pytest.mark.slow
def test_they_run_where_neither_this_package_nor_flax_is_installed(exported, alone):
    """By the lines of README.txt, with images, keys and codes of ours."""
    run, _, folder = exported
    images = images_of(run, 3)
    expected = figures(run, images)
    np.savez(folder / "given.npz", images=images, key=jax.random.key_data(KEY), z=expected["encoder"])
    (folder / "programs.txt").write_text("---\n".join(blocks(folder)))
    subprocess.run([alone, "-I", "-c", ALONE], check=True, cwd=folder)
    for number, (name, values) in enumerate(expected.items()):
        found = np.load(folder / f"found{number}.npy")
        np.testing.assert_allclose(found, values, rtol=2e-5, atol=2e-5, err_msg=name)
