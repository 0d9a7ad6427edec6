"""The benchmark of NumPyro's guides, with tiny sizes."""

import numpy as np
import pytest
from benchmark_cases import summary

pytest.importorskip("numpyro", reason="needs NumPyro: pip install '.[numpyro]'")

from benchmarks import guides
from planar_vae_jax.runs.config import UsageError

pytestmark = pytest.mark.usefixtures("any_promotion")
TINY = ("--models=banana", "--steps=2", "--particles=2", "--particles_at_end=64", "--seconds=0.01")


def test_guides(tmp_path, capsys):
    guides.main([*TINY, "--guides=normal,planar", "--seeds=2", "--samples=0", f"--workdir={tmp_path}"])
    found = summary(tmp_path)
    assert [(row["guide"], row["parameters"]) for row in found["rows"]] == [("AutoNormal", 4), ("AutoPlanar", 84)]
    assert all(np.isfinite(row["negative_elbo"]).all() and len(row["negative_elbo"]) == 2 for row in found["rows"])
    assert found["nuts"] == []
    assert "AutoPlanar                  84 parameters negative ELBO" in capsys.readouterr().out


@pytest.mark.slow
def test_nuts_in_the_noise_of_a_guide(tmp_path):
    guides.main([*TINY, "--guides=normal,planar", "--seeds=1", "--samples=10", f"--workdir={tmp_path}"])
    rows = summary(tmp_path)["nuts"]
    assert [row["guide"] for row in rows] == [guides.PLAIN, "AutoPlanar"]
    for row in rows:
        (per_1000,), (effective,), (gradients,) = row["per_1000_gradients"], row["effective"], row["gradients"]
        assert per_1000 == pytest.approx(1e3 * effective / gradients)
        assert gradients >= 10


def test_guides_name_a_wrong_flag(tmp_path):
    with pytest.raises(UsageError, match=r"--models must be all, or of banana, .*; got 'kidney'"):
        guides.main(["--models=kidney", f"--workdir={tmp_path}"])
