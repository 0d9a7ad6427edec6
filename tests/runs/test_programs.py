"""The programs that are compiled for a run: kept for the next run of the same shapes, and released."""

import gc
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from running import start, stop


@pytest.fixture
def programs(tmp_path):
    """The folder of an empty compilation cache that keeps everything."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path / "programs"), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    jax.clear_caches()
    yield tmp_path / "programs"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.usefixtures("one_step_at_a_time")
@pytest.mark.slow
def test_a_run_of_the_same_shapes_compiles_nothing(tmp_path, programs):
    kept = []
    for seed, epochs, answers in ((0, 3, 6), (1, 4, 9)):
        flags = (f"--seed={seed}", f"--epochs={epochs}")
        stop(tmp_path / str(seed), answers, *flags)
        start(tmp_path / str(seed), *flags)
        jax.clear_caches()  # as a new process has none
        kept.append({path.name for path in programs.glob("*-cache")})
    assert any("steps" in name for name in kept[0])
    assert kept[0] == kept[1]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="counts memory maps, as Linux does")
@pytest.mark.slow
def test_runs_with_many_learning_rates_release_their_programs(tmp_path):
    """A program takes memory maps, of which Linux allows a process 65,530."""
    maps = []
    for number in range(9):
        start(tmp_path / str(number), f"--rate={0.01 * (number + 1)}", "--epochs=1")
        gc.collect()
        maps.append(len(Path("/proc/self/maps").read_text().splitlines()))
    assert maps[-1] - maps[4] < 50
