"""experiments.mnist with each likelihood, posterior and architecture, on tiny images."""

import jax
import numpy as np
import pytest
from image_runs import bars, run, write_bars

from planar_vae_jax import load_run
from planar_vae_jax.analysis import evaluation
from planar_vae_jax.runs.config import UsageError

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_bars(tmp_path_factory.mktemp("data") / "bars.npz")


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return write_bars(tmp_path_factory.mktemp("data") / "colours.npz", (8, 4, 3))


def opened(workdir, summary, drawn=100):
    """The run of a folder, whose figures are those of its summary; its pictures, ``drawn`` of them from the prior."""
    found = load_run(workdir)
    x, labels = bars(30, found.image_shape, seed=1)
    rows = np.flatnonzero(np.isin(labels, found.config["classes"] or labels))
    x = x[rows]
    test = evaluation.fixed_images(x, rows, "test", found.binarization)
    figures = evaluation.evaluate(found.model, test, nll_samples=summary["nll_samples"])
    figures = evaluation.means(figures)
    assert figures.items() <= summary["test"].items()
    shown = x[: len(summary["per_class"])]  # as many as the run draws
    assert_pictures(found.reconstruct(shown), shown.shape)
    assert_pictures(found.sample(jax.random.key(1), drawn), (drawn, *found.image_shape))
    return found


def assert_pictures(pictures, shape):
    assert pictures.shape == shape
    assert np.all((np.asarray(pictures) >= 0) & (np.asarray(pictures) <= 1))


def assert_bits_per_dim(summary, dims):
    for row in (summary["test"], *summary["per_class"].values()):
        assert row["bits_per_dim"] == pytest.approx(row["nll"] / (dims * np.log(2)), rel=1e-9)
        assert row["bits_per_dim_se"] == pytest.approx(row["nll_se"] / (dims * np.log(2)), rel=1e-9)
    assert 0.0 < summary["test"]["bits_per_dim"] < 12.0


@pytest.mark.slow
def test_a_density_says_that_it_is_one(images, tmp_path):
    summary = run(images, tmp_path, "--likelihood=gaussian", "--posterior=full", "--amortized")
    assert "density" in summary["nats_of"]
    assert "bits_per_dim" not in summary["test"]
    found = opened(tmp_path, summary)
    x = bars(3, (8, 4))[0]
    assert_pictures(found.decode(found.encode(x, jax.random.key(0))), x.shape)


def test_levels_under_a_bernoulli_decoder_are_called_a_cross_entropy_and_latent_dimensions_are_counted(
    colours, tmp_path, capsys
):
    flags = ("--binarization=none", "--layers=2", "--flows=0", "--posterior=full")
    summary = run(colours, tmp_path, *flags, "--latent=5", "--epochs=20", "--nll_samples=1")
    shown = capsys.readouterr().out
    assert "bounds no likelihood" in summary["nats_of"]
    assert "cross-entropy" in shown
    assert opened(tmp_path, summary).image_shape == (8, 4, 3)
    units = summary["active_units"]
    assert units["of"] == len(units["kl_q0"]) == len(units["variance_of_mean"]) == 5
    assert units["count"] == sum(variance > units["threshold"] for variance in units["variance_of_mean"])
    assert f"active units: {units['count']} of 5" in shown
    assert abs(sum(units["kl_q0"]) - summary["test"]["kl"]) < 3 * summary["test"]["kl_se"]


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--encoder=conv",), marks=pytest.mark.slow),
        ("--encoder=conv", "--amortized", "--likelihood=logistic"),
    ],
    ids=" ".join,
)
def test_convolutions_run(images, tmp_path, flags):
    # Of few images and samples: the suite's machine code takes 10 ms for each.
    summary = run(images, tmp_path, *flags, "--epochs=1", "--classes=1", "--nll_samples=1")
    found = opened(tmp_path, summary, drawn=2)
    assert found.config["learning_rate"] == 1e-3
    if "--likelihood=logistic" in flags:
        assert_bits_per_dim(summary, 32)
        assert found.model.decoder.head.log_scale.shape == (8, 4)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--likelihood=poisson", ["--likelihood", "logistic", "'poisson'"]),
        (
            "--likelihood=logistic --binarization=dynamic",
            ["--likelihood=logistic", "--binarization", "none", "dynamic"],
        ),
        ("--likelihood=gaussian --objective=reconstruction", ["--likelihood=gaussian", "--objective", "elbo"]),
        ("--posterior=banded", ["--posterior", "full", "'banded'"]),
        ("--layers=3", ["--layers", "at most 2", "3"]),
        ("--encoder=resnet", ["--encoder", "conv", "'resnet'"]),
        ("--encoder=conv --hidden=30", ["--hidden=30", "--encoder=mlp"]),
        ("--encoder=conv --layers=2", ["--layers=2", "--encoder=mlp"]),
    ],
)
def test_what_cannot_be_combined_is_refused(images, tmp_path, flags, words):
    with pytest.raises(UsageError) as caught:
        run(images, tmp_path / "run", *flags.split())
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_convolutions_refuse_images_that_cannot_be_halved_twice(tmp_path):
    odd = write_bars(tmp_path / "odd.npz", (6, 8))
    with pytest.raises(UsageError, match=r"--encoder=conv .*divisible by 4; got 6 x 8 of odd"):
        run(odd, tmp_path / "run", "--encoder=conv")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("encoder", [pytest.param("conv", marks=pytest.mark.slow), "mlp"])
def test_a_likelihood_of_images_in_colour_in_nats_and_bits(colours, tmp_path, encoder, capsys):
    summary = run(colours, tmp_path, "--likelihood=logistic", f"--encoder={encoder}", "--classes=0,2", "--epochs=3")
    shown = capsys.readouterr().out
    assert (summary["likelihood"], summary["binarization"], summary["nats_of"]) == ("logistic", "none", "uint8 images")
    assert "bits per dim" in shown
    assert "nats are of uint8 images" in shown
    assert summary["train"]["final_loss"] < summary["train"]["first_loss"]
    assert set(summary["per_class"]) == {"0", "2"}
    assert (summary["train_images"], summary["test_images"]) == (60, 20)
    assert_bits_per_dim(summary, 96)
    found = opened(tmp_path, summary)
    assert found.binarization == "none"
    assert found.image_shape == (8, 4, 3)
    with pytest.raises(ValueError, match=r"images must be \[N, 8, 4, 3\].*got \[30, 8, 4\]"):
        found.reconstruct(bars(30, (8, 4))[0])
