"""What README and docs promise beyond their python blocks, which ``conftest.py`` of the clone runs."""

import importlib
import importlib.metadata
import itertools
import json
import re
import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
from packaging.requirements import Requirement

from experiments import use
from planar_vae_jax import load_run
from planar_vae_jax.analysis import evaluate, fixed_images, means

ROOT = Path(__file__).parents[1]


@pytest.mark.usefixtures("any_promotion")
def test_the_experiment_of_ones_own_trains_is_used_and_goes_on(tmp_path, monkeypatch, capsys):
    (program,) = re.findall(r"```python\n(.*?def main\(.*?)```", (ROOT / "docs/experiment.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("own.py").write_text(program)
    generator, labels = np.random.default_rng(0), np.arange(96) % 3
    images = generator.integers(0, 256, (96, 8, 8), np.uint8)
    np.savez("images.npz", x_train=images, y_train=labels, x_test=images[:9], y_test=labels[:9])
    flags = ["--dataset=images.npz", "--features=8", "--workdir=runs"]
    own = importlib.import_module("own")
    try:
        own.main([*flags, "--epochs=2"])
        table = capsys.readouterr().out
        for flows, seed in itertools.product((0, 5), (0, 1)):
            name = f"flows={flows}-seed={seed}"
            assert re.search(rf"^{name} +\d", table, re.MULTILINE)
            summary = json.loads(Path("runs", name, "summary.json").read_text())
            assert summary["epochs"] == 2
            assert set(summary["by"]) == {"0", "1", "2"}
        run = load_run("runs/flows=5-seed=0", build=own.build)
        figures = means(evaluate(run.model, fixed_images(images[:9], np.arange(9), "test", "dynamic"), nll_samples=32))
        assert figures["nll"] == json.loads(Path("runs/flows=5-seed=0/summary.json").read_text())["nll"]
        assert run.sample(jax.random.key(0), 8).shape == (8, 8, 8)

        use.main(["--workdir=runs/flows=5-seed=0", "--build=own.py:build", "--scores=images.npz", "--nll_samples=32"])
        scores = json.loads(Path("runs/flows=5-seed=0/use/scores.json").read_text())
        assert (scores["images"], scores["nll"]) == (9, pytest.approx(figures["nll"], rel=1e-5))
        use.main(["--workdir=runs/flows=5-seed=0", "--build=own.py:build", "--interpolate=0,1"])
        assert Path("runs/flows=5-seed=0/use/interpolation.png").exists()

        capsys.readouterr()
        own.main([*flags, "--epochs=2"])
        assert capsys.readouterr().out.count("is finished") == 4
        own.main([*flags, "--epochs=3"])
        assert capsys.readouterr().out.count("after epoch 2") == 4
    finally:
        del sys.modules["own"]
    assert len(Path("runs/flows=0-seed=1/metrics.jsonl").read_text().splitlines()) == 3


def test_a_plain_installation_brings_the_core_alone():
    """And of what that needs, no pyarrow."""
    waiting = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    core = {"flax", "jax", "jaxlib", "numpy", "optax", "scipy"}
    assert {Requirement(one).name for one in waiting} == core
    needed = set()
    while waiting:
        one = Requirement(waiting.pop())
        if one.name not in needed and (one.marker is None or one.marker.evaluate({"extra": ""})):
            needed.add(one.name)
            waiting += importlib.metadata.requires(one.name) or []
    assert "pyarrow" not in needed
