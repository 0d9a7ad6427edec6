"""Figures of test images: one key an image, so they stand whatever else is in the batch or in the run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vae_models import drawn

from planar_vae_jax.analysis import evaluation

SHAPE = (5, 4)
NAMES = {False: "shared", True: "amortized"}


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (23, *SHAPE), np.uint8)


def made(amortized, seed=0):
    return drawn(SHAPE, latent=2, hidden=8, flow_length=3, amortized=amortized, seed=seed)


@pytest.fixture(scope="module", params=NAMES, ids=NAMES.values())
def model(request):
    return made(request.param)


# Where one of the two models will do: all that a test evaluates is compiled for each.
shared, amortized = (pytest.mark.parametrize("model", [one], indirect=True, ids=[name]) for one, name in NAMES.items())


def fixed(images, index=None, split="test", binarization="dynamic"):
    return evaluation.fixed_images(images, np.arange(len(images)) if index is None else index, split, binarization)


@pytest.mark.parametrize("binarization", ["dynamic", "static"])
def test_an_images_binarisation_follows_from_its_index_alone(images, binarization):
    whole = fixed(images, binarization=binarization)
    assert set(np.unique(whole.pixels)) == {0, 255}
    rows = np.array([3, 20, 7])
    part = fixed(images[rows], rows, binarization=binarization)
    np.testing.assert_array_equal(part.pixels, whole.pixels[rows])
    np.testing.assert_array_equal(jax.random.key_data(part.keys), jax.random.key_data(whole.keys[rows]))


def test_train_validation_and_test_images_are_drawn_apart(images):
    drawn = [np.asarray(fixed(images, split=split).pixels) for split in ("train", "valid", "test")]
    for number, one in enumerate(drawn):
        for other in drawn[:number]:
            assert np.mean(one != other) > 0.1


def test_grey_levels_stay_and_thresholds_are_thresholds(images):
    np.testing.assert_array_equal(fixed(images, binarization="none").pixels, images)
    np.testing.assert_array_equal(fixed(images, binarization="threshold").pixels, 255 * (images >= 128))


@shared
def test_the_number_of_importance_samples_changes_no_other_figure(model, images):
    few, more = (evaluation.evaluate(model, fixed(images), nll_samples=samples) for samples in (7, 400))
    for name in ("free_energy", "reconstruction", "kl", "squared_error"):
        np.testing.assert_array_equal(getattr(few, name), getattr(more, name))
    assert np.all(few.nll != more.nll)
    assert np.mean(more.nll) < np.mean(few.nll)
    assert np.all((more.effective_sample_size >= 1) & (more.effective_sample_size <= 400))


@pytest.mark.parametrize(
    ("model", "samples", "counts"),
    [(False, 1, ["1"]), (False, 7, ["1", "3", "7"]), (True, 400, ["100", "200", "400"])],
    indirect=["model"],
)
def test_the_nll_is_given_from_a_quarter_and_from_half_of_the_samples_too(model, images, samples, counts):
    figures = evaluation.evaluate(model, fixed(images), nll_samples=samples)
    found = evaluation.nll_by_samples(figures, samples)["nll_by_samples"]
    assert list(found) == counts
    assert found[counts[-1]] == pytest.approx(np.mean(figures.nll), rel=1e-6)
    for count in counts[:-1]:  # in one pass, as if they had been all
        alone = evaluation.marginal_likelihood(model, fixed(images), samples=int(count)).nll
        assert found[count] == pytest.approx(float(np.mean(alone)), rel=1e-5)


@amortized
def test_memory_does_not_grow_with_samples(model, images):

    def bytes_of(samples):
        compiled = evaluation.marginal_likelihood.lower(model, fixed(images), samples=samples).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = bytes_of((128, 256)), bytes_of((1250, 2500, 5000))
    assert many < 1.1 * few + 4 * 5000 * len(images)  # of which one number for each chunk and image is kept


@shared
def test_another_model_and_other_images_of_the_same_shapes_compile_nothing(model, images, caplog):
    def everything(model, images):
        drawn = fixed(images)
        evaluation.evaluate(model, drawn, nll_samples=7)
        evaluation.reconstruct(model, drawn.pixels)
        evaluation.sample_prior(model, SHAPE, jax.random.key(0), 4)

    everything(model, images)
    with jax.log_compiles():
        everything(made(False, seed=1), images[::-1])
    assert not [line for line in caplog.messages if line.startswith("Compiling")]


def test_means_have_their_standard_errors():
    rng = np.random.default_rng(0)
    figures = evaluation.Figures(*rng.normal(5.0, 2.0, (6, 400)))
    found = evaluation.means(figures)
    assert found["nll"] == pytest.approx(np.mean(figures.nll))
    assert found["nll_se"] == pytest.approx(np.std(figures.nll, ddof=1) / 20)
    names = [name for name in figures._fields if name != "nll_course"]
    assert set(found) == {*names, *(f"{name}_se" for name in names)}


def test_bits_are_nats_over_dimensions():
    row = evaluation.with_bits_per_dim({"nll": 32 * np.log(2), "nll_se": None, "kl": 1.0}, 16)
    assert row == {"nll": 32 * np.log(2), "nll_se": None, "kl": 1.0, "bits_per_dim": 2.0, "bits_per_dim_se": None}


def test_reconstructions_and_samples_are_pictures(model, images):
    for pictures in (
        evaluation.reconstruct(model, fixed(images).pixels),
        evaluation.sample_prior(model, SHAPE, jax.random.key(0), 23),
    ):
        assert pictures.shape == images.shape
        assert jnp.all((pictures >= 0) & (pictures <= 1))


@shared
def test_figures_do_not_depend_on_the_generator_of_the_training(model, images):
    before = evaluation.evaluate(model, fixed(images), nll_samples=7)
    with jax.default_prng_impl("rbg"):
        after = evaluation.evaluate(model, fixed(images), nll_samples=7)
    for mine, theirs in zip(after, before, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@amortized
def test_figures_do_not_depend_on_batches(model, images):
    whole = evaluation.evaluate(model, fixed(images), nll_samples=400)
    for batch_size in (4, 300):
        parts = evaluation.evaluate(model, fixed(images), nll_samples=400, batch_size=batch_size)
        for mine, theirs in zip(parts, whole, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=2e-5)


@shared
def test_pictures_do_not_depend_on_batches(model, images):
    pixels, key = fixed(images).pixels, jax.random.key(1)
    for function in (
        lambda batch_size: evaluation.reconstruct(model, pixels, batch_size=batch_size),
        lambda batch_size: evaluation.sample_prior(model, SHAPE, key, 23, batch_size=batch_size),
    ):
        np.testing.assert_allclose(function(4), function(1000), rtol=1e-5)


def test_an_unknown_split_is_refused(images):
    with pytest.raises(ValueError, match=r"split must be one of test, train, valid; got 'tset'"):
        fixed(images, split="tset")
