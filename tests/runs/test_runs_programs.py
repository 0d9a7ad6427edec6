"""What is compiled for a run, and kept for the next."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from running import OneStep, start, stop

from planar_vae_jax.runs import compiled, fit


def forget():
    """The programs of runs, as a new process has none."""
    for function in vars(compiled).values():
        if hasattr(function, "clear_cache"):
            function.clear_cache()


@pytest.fixture
def programs(tmp_path):
    """The folder of an empty compilation cache that keeps everything."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path / "programs"), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    forget()
    yield tmp_path / "programs"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_second_run_compiles_nothing(tmp_path, programs, monkeypatch):
    monkeypatch.setattr(fit, "Pace", OneStep)
    kept = []
    for seed, epochs, answers in ((0, 3, 6), (1, 4, 9)):
        flags = (f"--seed={seed}", f"--epochs={epochs}")
        stop(tmp_path / str(seed), answers, *flags)
        start(tmp_path / str(seed), *flags)
        forget()
        kept.append({path.name for path in programs.glob("*-cache")})
    assert len(kept[0]) > 3
    assert kept[0] == kept[1]
