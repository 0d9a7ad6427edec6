"""A trained model opened by load_run: what it computes, what it refuses, and that it leaves the folder alone."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_trees_close
from image_runs import SHAPE, TEST, TRAIN
from vae_models import drawn

from experiments import mnist
from planar_vae_jax import load, load_run, planar_flow
from planar_vae_jax.analysis import evaluation
from planar_vae_jax.load import Run
from planar_vae_jax.runs.checkpoints import CheckpointError
from planar_vae_jax.vae import VAE, objectives

FLAGS = ("--epochs=3", "--hidden=8", "--latent=2", "--batch_size=16", "--nll_samples=4", "--flows=2")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (TRAIN, *SHAPE), np.uint8)


@pytest.fixture(scope="module")
def workdir(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("load")
    np.savez(folder / "images.npz", x_train=images, x_test=images[:TEST])
    with jax.numpy_dtype_promotion("standard"):
        mnist.main(
            [*FLAGS, f"--dataset={folder / 'images.npz'}", "--validation=30", f"--workdir={folder / 'run'}"],
            pictures=False,
        )
    return folder / "run"


@pytest.fixture(scope="module")
def run(workdir):
    return load_run(workdir)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_its_config_and_parameters_are_the_runs(run, workdir):
    assert run.config["flows"] == 2
    assert run.config["epochs"] == 3
    assert run.step == 3 * (60 // 16)
    assert run.model.encoder.hidden.first.kernel.shape == (32, 8)


def test_its_figures_are_those_of_the_summary(run, workdir, images, standard_promotion):
    test = evaluation.fixed_images(images[:TEST], np.arange(TEST), "test", "dynamic")
    found = evaluation.means(evaluation.evaluate(run.model, test, nll_samples=4))
    assert found == json.loads((workdir / "summary.json").read_text())["test"]


def test_its_functions_are_the_models_own(run, images):
    key, x = jax.random.key(1), np.where(images > 128, np.uint8(255), np.uint8(0))  # nothing is left to draw
    model = run.model

    @jax.jit
    def expected(z, pixels):
        """Pictures of ``z``; means of the posteriors through the flow, and their pictures."""
        mean, _, _ = model.encode(pixels).transform(jnp.zeros((TRAIN, 2)))
        return jax.nn.sigmoid(model.decode(z)), mean, jax.nn.sigmoid(model.decode(mean))

    z, pixels = run.encode(x, key), np.float32(x / 255.0)
    assert z.shape == (TRAIN, 2)
    decoded, mean, reconstructed = map(np.asarray, expected(z, pixels))
    np.testing.assert_allclose(run.decode(z), decoded, rtol=1e-5)
    np.testing.assert_allclose(run.reconstruct(x), reconstructed, rtol=1e-5)
    distance = (np.asarray(z) - mean) / np.std(z - mean)
    assert 0.05 < np.mean(np.abs(distance)) < 2.0
    energies = [run.free_energy(x, jax.random.key(seed)) for seed in range(300)]
    draw = jax.jit(lambda key: objectives.free_energy(model, pixels, key).free_energy)
    mine, theirs = np.mean(energies, axis=0), np.mean([draw(jax.random.key(seed)) for seed in range(300)], axis=0)
    assert np.all(np.abs(mine - theirs) < 6 * np.std(energies, axis=0) * np.sqrt(2 / 300))
    assert np.all(np.asarray(run.nll(x, key, samples=1000)) < mine)
    assert run.sample(key, 9).shape == (9, *SHAPE)


def test_the_posterior_and_its_codes_are_the_models_own(run, images):
    x = np.where(images > 128, np.uint8(255), np.uint8(0))  # nothing is left to draw
    found = run.posterior(x)
    expected = jax.jit(run.model.encode)(np.float32(x / 255.0))
    assert_trees_close(found, expected, tolerance=1e-5)
    assert found.params.b.shape == (2,)  # all images share the layers
    codes = run.latents(x)
    np.testing.assert_allclose(codes, planar_flow(found.params, found.mean)[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(run.decode(codes), run.reconstruct(x), rtol=1e-5)
    np.testing.assert_array_equal(run.latents(x, KEY), run.encode(x, KEY))
    # The sample lies where its posterior has mass, and that of other images has less.
    nats = np.asarray(found.log_prob(run.encode(x, KEY)))
    assert np.mean(nats - np.asarray(found.log_prob(np.roll(run.encode(x, KEY), 1, 0)))) > 0.1


def test_each_image_keeps_layers_of_its_own():
    model = drawn(SHAPE, hidden=8, latent=2, flow_length=3, amortized=True, posterior="full")
    run = Run({}, model, 0, "threshold")
    x = np.random.default_rng(1).integers(0, 256, (5, *SHAPE), np.uint8)
    expected = jax.jit(model.encode)(np.float32(x >= 128))
    assert expected.params.u.shape == (5, 3, 2)
    assert_trees_close(run.posterior(x), expected, tolerance=1e-5)


def test_lines_and_traversals_start_at_the_codes(run, images):
    few, codes, reconstructed = images[:4], run.latents(images[:4]), run.reconstruct(images[:4])
    lines = run.interpolate(few[:2], few[:2][::-1], 5)
    for line in lines:
        assert line.shape == (2, 5, *SHAPE)
        np.testing.assert_allclose(line[:, 0], reconstructed[:2], rtol=1e-5)
    middle = run.decode((codes[:1] + run.latents(few[:2][::-1])[:1]) / 2)
    np.testing.assert_allclose(lines.code[:1, 2], middle, rtol=1e-4)
    moved = run.traverse(few, [1, 0], [-1.0, 0.5, 2.0])
    assert moved.shape == (4, 2, 3, *SHAPE)
    z = np.array(codes)
    z[:, 1] = 2.0
    np.testing.assert_allclose(moved[:, 0, 2], run.decode(z), rtol=1e-4)
    assert run.traverse(few[:1]).shape == (1, 2, 13, *SHAPE)


def test_scores_are_those_of_the_runs_test_images(run, images):
    test = evaluation.fixed_images(images[:TEST], np.arange(TEST), "test", "dynamic")
    for samples, nll_samples in ((None, 4), (150, 150)):  # by default those of the run
        expected = evaluation.evaluate(run.model, test, nll_samples=nll_samples)
        found = run.scores(images[:TEST], samples)
        np.testing.assert_allclose(found.free_energy, expected.free_energy, rtol=1e-5)
        np.testing.assert_allclose(found.nll, expected.nll, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda run, x: run.interpolate(x, x[1:]), "left and right must be as many images; got 3 and 2"),
        (lambda run, x: run.interpolate(x, x, 1), "steps must be a whole number of at least 2; got 1"),
        (lambda run, x: run.traverse(x, [2]), "dimensions must be numbers from 0 to 1"),
        (lambda run, x: run.traverse(x, [-1]), "dimensions must be a whole number of at least 0; got -1"),
        (lambda run, x: run.traverse(x, [0], 1.0), r"values must be \[T\]; got \[\]"),
    ],
)
def test_lines_and_traversals_that_are_not_there_are_refused(run, images, call, words):
    with pytest.raises(ValueError, match=words):
        call(run, images[:3])


def test_images_are_binarised_as_in_training_whatever_their_type(run, images):
    key = jax.random.key(0)
    whole = run.free_energy(images, key)
    np.testing.assert_array_equal(whole, run.free_energy(images / 255.0, key))
    np.testing.assert_array_equal(whole, run.free_energy(jnp.asarray(images), key))
    assert not np.array_equal(whole, run.free_energy(images, jax.random.key(1)))
    assert not np.array_equal(whole, run.free_energy(np.where(images > 128, np.uint8(255), np.uint8(0)), key))


def test_empty_batches_are_empty(run):
    assert run.encode(np.zeros((0, *SHAPE), np.uint8), jax.random.key(0)).shape == (0, 2)
    assert run.free_energy(np.zeros((0, *SHAPE), np.uint8), jax.random.key(0)).shape == (0,)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (np.zeros((3, 28, 28), np.uint8), ["[N, 8, 4]", "[3, 28, 28]"]),
        (np.zeros((8, 4), np.uint8), ["[N, 8, 4]", "[8, 4]"]),
        (np.zeros((3, 8, 4), np.int64), ["uint8", "int64"]),
        (np.full((3, 8, 4), 7.0), ["0 to 1", "7"]),
        (np.full((3, 8, 4), np.nan), ["0 to 1", "nan"]),
    ],
)
def test_other_images_are_refused(run, bad, words):
    for function in (run.reconstruct, lambda images: run.free_energy(images, jax.random.key(0))):
        with pytest.raises(ValueError, match="images") as caught:
            function(bad)
        for word in words:
            assert word in str(caught.value)


def test_codes_of_another_size_are_refused(run):
    with pytest.raises(ValueError, match=r"z must be \[N, 2\].*\[4, 3\]"):
        run.decode(np.zeros((4, 3), np.float32))


def test_uint8_images_of_zeros_and_ones_are_told_to_be_nearly_black(run, images):
    with pytest.warns(UserWarning, match="multiply them by 255"):
        run.reconstruct((images > 128).astype(np.uint8))


@pytest.mark.parametrize("number", [-1, 2.5, True])
def test_numbers_that_are_none_are_refused(run, images, number):
    with pytest.raises(ValueError, match=f"n must be a whole number of at least 0; got {number}"):
        run.sample(jax.random.key(0), number)
    with pytest.raises(ValueError, match=f"samples must be a whole number of at least 1; got {number}"):
        run.nll(images, jax.random.key(0), samples=number)


def test_rounding_beyond_white_and_floats_of_other_widths_are_taken(run, images):
    key, white = jax.random.key(0), np.ones((2, *SHAPE), np.float32)
    np.testing.assert_array_equal(run.encode(white * np.float32(1.0000001), key), run.encode(white, key))
    half = jnp.full((2, *SHAPE), 0.5, jnp.bfloat16)
    np.testing.assert_array_equal(run.encode(half, key), run.encode(np.asarray(half, np.float32), key))


KEY = jax.random.key(0)
METHODS = {  # each of images [N, H, W]; leaves [N, ...]
    "encode": lambda run, images: run.encode(images, KEY),
    "latents": lambda run, images: run.latents(images),
    "posterior": lambda run, images: [run.posterior(images).mean, run.posterior(images).log_std],
    "decode": lambda run, images: run.decode(images[:, 0, :2] / 255.0),
    "reconstruct": lambda run, images: run.reconstruct(images),
    "sample": lambda run, images: run.sample(KEY, len(images)),
    "interpolate": lambda run, images: run.interpolate(images, images, 3),
    "traverse": lambda run, images: run.traverse(images, [1], [0.0, 2.0]),
    "free_energy": lambda run, images: run.free_energy(images, KEY),
    "nll": lambda run, images: run.nll(images, KEY, 50),
    "scores": lambda run, images: run.scores(images, 50),
}


@pytest.mark.parametrize("method", METHODS)
def test_one_program_serves_every_number_of_images(run, images, method, monkeypatch, caplog):
    """Also more than a program has room for; and image i has one result, however many images there are."""
    monkeypatch.setattr(load, "_BUFFER", 40)
    function = METHODS[method]
    function(run, images[:3])
    with jax.log_compiles(), caplog.at_level("WARNING"):
        found = {number: function(run, images[:number]) for number in (0, 1, 7, 39, 41, 90)}
    assert not [record.message for record in caplog.records if record.message.startswith("Compiling")]
    for number, few in found.items():
        for some, whole in zip(jax.tree.leaves(few), jax.tree.leaves(found[90]), strict=True):
            np.testing.assert_allclose(some, np.asarray(whole)[:number], rtol=1e-5, atol=1e-5)


def test_a_compilation_is_seen(run, images, caplog):
    with jax.log_compiles(), caplog.at_level("WARNING"):
        run.nll(images[:1], KEY, 51)
    assert [record.message for record in caplog.records if record.message.startswith("Compiling")]


def test_a_run_of_ones_own_experiment_is_built_from_its_flags(workdir, tmp_path, images):
    other = shutil.copytree(workdir, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    flags = {"width": 8}
    (other / "config.json").write_text(json.dumps({**config, "experiment": "mine", "flags": flags}))
    with pytest.raises(ValueError, match="build="):
        load_run(other)

    def build(flags, image_shape):
        return VAE.mlp(image_shape, latent=2, hidden=flags["width"], flow_length=2, rngs=nnx.Rngs(7))

    opened = load_run(other, build=build)
    assert (dict(opened.config), opened.binarization) == (flags, "dynamic")
    np.testing.assert_array_equal(opened.reconstruct(images), load_run(workdir).reconstruct(images))


def test_another_layout_is_one_line(workdir, tmp_path):
    other = shutil.copytree(workdir, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    del config["layout"]
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is of another version of planar_vae_jax \(layout 1"):
        load_run(other)


def test_damage_that_is_passed_over_is_a_warning(workdir, tmp_path):
    other = shutil.copytree(workdir, tmp_path / "other")
    newest = max((other / "checkpoints").iterdir(), key=lambda path: int(path.name))
    (newest / "meta" / "metadata").write_text("{}")
    with pytest.warns(UserWarning, match=f"{newest} .*is damaged"):
        assert load_run(other).step < int(newest.name)


def test_opening_reads_only(workdir):
    before = contents(workdir)
    for checkpoint in ("latest", "best"):
        load_run(workdir, checkpoint)
    assert contents(workdir) == before


def test_the_best_is_the_one_with_the_lowest_validation_loss(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    best = int(np.argmin([line["validation_loss"] for line in lines])) + 1
    assert load_run(workdir, "best").step == best * (60 // 16)


def test_what_is_no_such_run_is_told(workdir, tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match="checkpoint must be"):
        load_run(workdir, "newest")
    other = shutil.copytree(workdir, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "experiment": "density"}))
    with pytest.raises(ValueError, match=r"experiments\.density"):
        load_run(other)
    (other / "config.json").write_text(json.dumps({**config, "flags": {**config["flags"], "hidden": 9}}))
    with pytest.raises(ValueError, match=r"another model.*\[9\]"):
        load_run(other)
    flags = {name: config["flags"][name] for name in config["flags"] if name != "latent"}
    (other / "config.json").write_text(json.dumps({**config, "flags": flags}))
    with pytest.raises(ValueError, match="no flag 'latent'"):
        load_run(other)
    for odd in ({"flows": None}, {"h": "sine"}, {"latent": "many"}):
        (other / "config.json").write_text(json.dumps({**config, "flags": {**config["flags"], **odd}}))
        with pytest.raises(ValueError, match="not the config of a run"):
            load_run(other)
    with pytest.raises(ValueError, match="workdir must be"):
        load_run("~nobody-of-this-name/run")
    (other / "config.json").write_text(json.dumps({name: config[name] for name in config if name != "flags"}))
    with pytest.raises(ValueError, match="not the config of a run"):
        load_run(other)
    (other / "config.json").write_text(json.dumps(config))
    shutil.rmtree(other / "checkpoints")
    with pytest.raises((ValueError, CheckpointError), match="no checkpoint"):
        load_run(other)
