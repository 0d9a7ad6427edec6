"""What the tests of runs share: short calls, and toy runs that are compared with or continued."""

import shutil

import pytest
from running import OneStep, result, start, stop

from planar_vae_jax.runs import fit


@pytest.fixture
def one_step_at_a_time(monkeypatch):
    """Each call of the compiled steps takes one step, so that a run can be stopped after each."""
    monkeypatch.setattr(fit, "Pace", OneStep)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """``whole(*flags)``: all that a toy run with these flags leaves that nothing interrupts."""
    results = {}

    def get(*flags):
        if flags not in results:
            workdir = tmp_path_factory.mktemp("whole") / "run"
            start(workdir, *flags)
            results[flags] = result(workdir)
        return results[flags]

    return get


@pytest.fixture(scope="session")
def _stopped(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "Pace", OneStep)
        stop(workdir, 12)  # in the third epoch
    return workdir


@pytest.fixture
def stopped(_stopped, tmp_path):
    """The folder of a toy run that was stopped at step 10 of 12; a fresh copy."""
    return shutil.copytree(_stopped, tmp_path / "run")
