"""The training benchmarks: each command with tiny sizes."""

import contextlib
import json

import numpy as np
import pytest
from benchmark_cases import summary, untrained

from benchmarks import accelerator, epoch, time_to_quality
from benchmarks.our_training import synthetic_images
from benchmarks.race import Point
from benchmarks.torch_models import Unavailable
from planar_vae_jax.runs.config import UsageError

pytestmark = pytest.mark.usefixtures("any_promotion")
TINY = ("--batch_size=8", "--latent=2", "--hidden=4")


@pytest.fixture
def traced_once(monkeypatch):
    """The commands train copies of ``untrained()``, which is compiled once."""
    for benchmark in (accelerator, epoch, time_to_quality):
        monkeypatch.setattr(benchmark, "OurTraining", lambda task, optimizer: untrained())
    for benchmark in (accelerator, time_to_quality):
        monkeypatch.setattr(benchmark, "compiled_anew", contextlib.nullcontext)


def test_epoch(tmp_path, capsys, traced_once):
    epoch.main(["--flows=5", "--images=24", "--steps=2", "--rounds=1", "--peers=none", *TINY, f"--workdir={tmp_path}"])
    found = summary(tmp_path)
    assert [row["name"] for row in found["rows"]] == [epoch.PRODUCTS, "ours, schedule_free", "ours, adam"]
    assert all(row["lower_quartile_ms"] <= row["median_ms"] <= row["upper_quartile_ms"] for row in found["rows"])
    assert found["left_out"] == [{"name": "PyTorch", "why": "--peers=none"}]
    assert (found["steps_an_epoch"], found["extrapolated"]) == (3, True)
    products, _, adam = (row["median_ms"] for row in found["rows"])
    assert found["ratios"]["K=5: ours, adam / products alone"] == pytest.approx(adam / products)
    assert "ours, schedule_free, K=5" in capsys.readouterr().out


def test_epoch_against_pytorch(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(epoch, "our_slice", lambda task, optimizer: (lambda: None, None))
    sizes = ("--images=24", "--steps=2", "--rounds=1", "--threads=1", "--compiled=0")
    epoch.main(["--flows=5", *sizes, *TINY, f"--workdir={tmp_path}"])
    found = summary(tmp_path)
    peers_of_ours = [row for row in found["rows"] if row["name"].startswith("PyTorch")]
    assert [row["title"] for row in peers_of_ours] == [
        f"PyTorch {style}, K=5, threads=1" for style in ("eager", "tuned")
    ]
    assert all(max(row["errors"].values()) < 1e-5 for row in peers_of_ours)
    assert found["left_out"] == [{"name": "PyTorch compiled, K=5", "why": "--compiled does not name 5"}]
    medians = {row["name"]: row["median_ms"] for row in found["rows"]}
    ratio = found["ratios"]["K=5: PyTorch eager / ours, adam"]
    assert ratio == pytest.approx(medians["PyTorch eager"] / medians["ours, adam"])


def test_epoch_names_a_wrong_flag(tmp_path):
    with pytest.raises(UsageError, match="--steps must be at most the 3 batches"):
        epoch.main(["--images=24", "--batch_size=8", "--steps=4", f"--workdir={tmp_path}"])


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A small data set in an npz file."""
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    images = synthetic_images(0, 24)
    np.savez(path, x_train=images[:16], x_test=images[16:])
    return path


def test_time_to_quality(digits, tmp_path, capsys, monkeypatch, traced_once):
    def absent(task):
        raise Unavailable("not installed")

    monkeypatch.setitem(time_to_quality.BUILDERS, "PyTorch compiled, Adam", absent)
    chosen = "--contestants=ours,pytorch-eager-adam,pytorch-compiled-adam"
    flags = (f"--dataset={digits}", "--target=1", "--max_epochs=1", chosen, "--threads=1", *TINY)
    time_to_quality.main([*flags, f"--workdir={tmp_path}"])
    found = summary(tmp_path)
    assert [point["epochs"] for point in found["curves"]["ours"]] == [0.0, 0.5, 1.0]
    row = found["rows"][0]
    assert (row["name"], row["seconds"], row["epochs"]) == ("ours", None, None)
    last = found["curves"]["ours"][-1]
    assert row["ms_a_step"] == pytest.approx(1e3 * last["seconds"] / 2)  # an epoch has two steps
    assert row["last_free_energy"] == found["curves"]["ours"][-1]["free_energy"] > 300.0
    assert "PyTorch compiled, Adam" in {one["name"] for one in found["left_out"]}
    for curve in found["curves"].values():  # the same initial weights, evaluated by the same function
        assert curve[0] == found["curves"]["ours"][0]
    assert "PyTorch compiled, Adam left out: not installed" in capsys.readouterr().out


def test_what_a_curve_comes_to():
    curve = [Point(0.0, 0.0, 500.0), Point(0.5, 2.0, 101.0), Point(1.0, 4.0, 99.0)]
    rows = [time_to_quality.row(name, curve, 100.0, 8, 3.0) for name in ("ours", "PyTorch eager, Adam")]
    assert rows[0] == {
        "name": "ours",
        "seconds": 4.0,
        "epochs": 1.0,
        "last_free_energy": 99.0,
        "seconds_an_epoch": 4.0,
        "ms_a_step": 500.0,
        "compile_seconds": 3.0,
    }
    assert time_to_quality.compare(rows) == {
        "seconds: PyTorch eager, Adam / ours": 1.0,
        "seconds: PyTorch eager, Adam / ours, Adam": None,
    }


@pytest.mark.parametrize("argument", ["--contestants=nobody", "--batch_size=9", "--dataset=nothing"])
def test_time_to_quality_names_a_wrong_flag(argument, digits, tmp_path):
    with pytest.raises(UsageError, match=argument.split("=")[0]):
        time_to_quality.main([f"--dataset={digits}", argument, f"--workdir={tmp_path}"])


@pytest.mark.slow
def test_accelerator(digits, tmp_path, capsys, traced_once):
    sizes = ("--cases=3x2x2", "--parameters=shared", "--flows=5", "--prng=threefry2x32", "--seeds=2", "--steps=2")
    times = ("--seconds=0.001", "--rounds=1", f"--dataset={digits}", f"--data_dir={digits.parent}")
    accelerator.main([*sizes, *times, "--target=1", "--max_epochs=1", *TINY, f"--workdir={tmp_path}"])
    found = json.loads((tmp_path / "summary.json").read_text())
    (step,), (seeds,), (flow,), (quality,) = (found[name] for name in ("steps", "seeds", "flows", "quality"))
    assert step["products"] == 2 * 8 * (3 * (2 * 784 * 4 + 4 * 4 + 2 * 4) - 784 * 4)
    assert step["operations"] > step["products"]
    assert step["steps_a_second"] == pytest.approx(1e3 / step["median_ms"])
    assert seeds["ms_a_seed"] == pytest.approx(seeds["median_ms"] / 2)
    assert flow["name"] == "(3, 2, 2) shared"
    assert flow["operations"] >= 2 * 3 * 2 * 2  # the products w.z of two layers and three events
    assert [point["epochs"] for point in quality["curve"]] == [0.0, 0.5, 1.0]
    assert found["left_out"] == []
    assert "K=5, threefry2x32" in capsys.readouterr().out


def test_accelerator_names_what_it_did_not_come_to(tmp_path, capsys):
    accelerator.main(["--minutes=1e-9", "--cases=3x2x2", "--flows=0", "--seeds=1", *TINY, f"--workdir={tmp_path}"])
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["left_out"] == [
        *("steps: K=0, threefry2x32", "steps: K=0, rbg", "seeds: 1 at once"),
        *("flows: (3, 2, 2) shared", "flows: (3, 2, 2) amortized"),
    ]
    assert "left out after --minutes=1e-09" in capsys.readouterr().out
