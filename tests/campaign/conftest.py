"""The runs that the faults are compared with, and the tally of the campaign.

Every fault is real: processes, signals, files. ``FAULTS=10 pytest tests/campaign`` tries each ten times as often; the
table at the end tells what was tried. Without its name, as in ``pytest``, only those marked ``smoke`` are run.
"""

import collections
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from campaign.harness import Run, finish, result

_tally: dict[tuple[str, str], list[int]] = collections.defaultdict(list)


@pytest.fixture(scope="session")
def tally():
    """``tally(fault, outcome, lost)`` after each try; lost: whole lines of metrics that had to be computed again."""
    return lambda fault, outcome, lost=0: _tally[fault, outcome].append(lost)


def pytest_configure(config):
    config.addinivalue_line("markers", "smoke: of the fault campaign, run with the suite too")


def pytest_collection_modifyitems(config, items):
    """Without the campaign's name, its smoke cases alone."""
    here = Path(__file__).parent
    if any("campaign" in str(argument) for argument in config.args):
        return
    left_out = [item for item in items if here in item.path.parents and item.get_closest_marker("smoke") is None]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter):
    if _tally:
        rows = [
            f"| {fault} | {len(lost)} | {sum(lost)} (at most {max(lost)}) | {outcome} |"
            for (fault, outcome), lost in _tally.items()
        ]
        head = ["| fault | times tried | lines of metrics computed again | outcome |", "|---|---|---|---|"]
        terminalreporter.write_line("\n".join(["", *head, *rows]))


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Random images of 5 x 4 pixels in three classes."""
    path = tmp_path_factory.mktemp("data") / "images.npz"
    generator = np.random.default_rng(0)
    sizes = {"train": 1600, "test": 30}
    arrays = {f"x_{split}": generator.integers(0, 256, (size, 5, 4), np.uint8) for split, size in sizes.items()}
    arrays |= {f"y_{split}": (np.arange(size) % 3).astype(np.uint8) for split, size in sizes.items()}
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="session")
def data(images):
    """The flags that name the data, by experiment."""
    return {"mnist": (f"--dataset={images}",), "density": (), "toy": ()}


@pytest.fixture(scope="session")
def whole(tmp_path_factory, data):
    """The results of the runs in one go, by experiment."""
    results = {}

    def get(name):
        if name not in results:
            workdir = tmp_path_factory.mktemp("whole") / "run"
            finish(name, workdir, *data[name])
            results[name] = result(workdir)
        return results[name]

    return get


def killed_half_way(name, workdir, *arguments):
    run = Run(name, workdir, *arguments)
    assert run.until(lambda: run.lines() == 6)
    assert run.stop(signal.SIGKILL) == -signal.SIGKILL
    return workdir


@pytest.fixture(scope="session")
def _half(tmp_path_factory, data):
    return killed_half_way("mnist", tmp_path_factory.mktemp("half") / "run", *data["mnist"])


@pytest.fixture
def half(_half, tmp_path):
    """The folder of an mnist run that was killed half-way, with its checkpoints; a fresh copy."""
    return shutil.copytree(_half, tmp_path / "run")


@pytest.fixture(scope="session")
def _half_toy(tmp_path_factory):
    return killed_half_way("toy", tmp_path_factory.mktemp("half-toy") / "run")


@pytest.fixture
def half_toy(_half_toy, tmp_path):
    """The same of a toy run."""
    return shutil.copytree(_half_toy, tmp_path / "run")
