"""experiments.mnist with each likelihood, posterior and architecture, on tiny images."""

import jax
import numpy as np
import pytest
from image_runs import bars, run, write_bars

from planar_vae_jax import evaluation, load_run
from planar_vae_jax.runs.config import UsageError

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_bars(tmp_path_factory.mktemp("data") / "bars.npz")


def opened(workdir, summary):
    """The run of a folder, whose figures are those of its summary; its pictures."""
    found = load_run(workdir)
    x, labels = bars(30, found.vae.image_shape, seed=1)
    rows = np.flatnonzero(np.isin(labels, found.config["classes"] or labels))
    x = x[rows]
    test = evaluation.fixed_images(x, rows, "test", found.binarization)
    figures = evaluation.means(evaluation.evaluate(found.vae, found.params, test, nll_samples=4))
    assert figures.items() <= summary["test"].items()
    for pictures in (
        found.reconstruct(x),
        found.decode(found.encode(x, jax.random.key(0))),
        found.sample(jax.random.key(1), len(x)),
    ):
        assert pictures.shape == x.shape
        assert np.all((pictures >= 0) & (pictures <= 1))
    return found


def test_a_likelihood_of_uint8_images_in_nats_and_bits(images, tmp_path, capsys):
    summary = run(images, tmp_path, "--likelihood=logistic", "--epochs=3")
    assert (summary["likelihood"], summary["binarization"], summary["nats_of"]) == ("logistic", "none", "uint8 images")
    for row in (summary["test"], *summary["per_class"].values()):
        assert row["bits_per_dim"] == pytest.approx(row["nll"] / (32 * np.log(2)), rel=1e-9)
        assert row["bits_per_dim_se"] == pytest.approx(row["nll_se"] / (32 * np.log(2)), rel=1e-9)
    assert 0.0 < summary["test"]["bits_per_dim"] < 12.0
    assert summary["train"]["final_loss"] < summary["train"]["first_loss"]
    shown = capsys.readouterr().out
    assert "bits per dim" in shown
    assert "nats are of uint8 images" in shown
    found = opened(tmp_path, summary)
    assert found.binarization == "none"
    assert found.params["decode"]["log_scale"].shape == (8, 4)


def test_a_density_says_that_it_is_one(images, tmp_path, pages_but_of_latent_space):
    summary = run(images, tmp_path, "--likelihood=gaussian", "--posterior=full", "--amortized")
    assert "density" in summary["nats_of"]
    assert "bits_per_dim" not in summary["test"]
    opened(tmp_path, summary)


def test_grey_levels_under_a_bernoulli_decoder_are_called_a_cross_entropy(
    images, tmp_path, capsys, pages_but_of_latent_space
):
    summary = run(images, tmp_path, "--binarization=none", "--layers=2", "--flows=0", "--posterior=full")
    assert "bounds no likelihood" in summary["nats_of"]
    assert "cross-entropy" in capsys.readouterr().out
    opened(tmp_path, summary)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--encoder=conv",), marks=pytest.mark.slow),
        ("--encoder=conv", "--amortized", "--likelihood=logistic"),
    ],
    ids=" ".join,
)
def test_convolutions_run(images, tmp_path, flags, pages_but_of_latent_space):
    found = opened(tmp_path, run(images, tmp_path, *flags, "--epochs=1", "--classes=1"))
    assert found.config["learning_rate"] == 1e-3


def test_latent_dimensions_are_counted_and_measured(images, tmp_path, capsys):
    summary = run(images, tmp_path, "--flows=0", "--latent=5", "--epochs=20", "--nll_samples=1")
    units = summary["active_units"]
    assert units["of"] == len(units["kl_q0"]) == len(units["variance_of_mean"]) == 5
    assert units["count"] == sum(variance > units["threshold"] for variance in units["variance_of_mean"])
    assert f"active units: {units['count']} of 5" in capsys.readouterr().out
    assert abs(sum(units["kl_q0"]) - summary["test"]["kl"]) < 5 * summary["test"]["kl_se"]


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


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--likelihood=logistic", "--encoder=conv", "--classes=0,2"), marks=pytest.mark.slow),
        ("--likelihood=logistic", "--classes=0,2"),
        ("--objective=reconstruction",),
    ],
    ids=" ".join,
)
def test_images_in_colour(tmp_path, flags, pages_but_of_latent_space):
    colours = write_bars(tmp_path / "colours.npz", (8, 4, 3))
    summary = run(colours, tmp_path / "run", *flags, "--epochs=1")
    found = opened(tmp_path / "run", summary)
    assert found.vae.image_shape == (8, 4, 3)
    if "--likelihood=logistic" in flags:
        assert set(summary["per_class"]) == {"0", "2"}
        assert summary["test"]["bits_per_dim"] == pytest.approx(summary["test"]["nll"] / (96 * np.log(2)), rel=1e-9)
    with pytest.raises(ValueError, match=r"images must be \[N, 8, 4, 3\].*got \[30, 8, 4\]"):
        found.reconstruct(bars(30, (8, 4))[0])
