"""Figures are files, whatever backend matplotlib is told to use."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

from planar_vae_jax import plotting


def test_check_figures(monkeypatch):
    plotting.check_figures()
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    monkeypatch.setenv("PATH", "")  # no LaTeX
    with pytest.raises(ImportError, match=r"^figures cannot be drawn: .*latex"):
        plotting.check_figures()


SCRIPT = """
import os, sys
from planar_vae_jax import plotting
plotting.check_figures()
assert "matplotlib.pyplot" not in sys.modules
print(os.environ["MPLBACKEND"], sys.modules["matplotlib"].rcParams._get("backend"))
"""


def run_with_backend(backend: str) -> str:
    """Standard output of SCRIPT, which says nothing else."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SCRIPT],
        cwd=Path(plotting.__file__).parents[2],
        env=os.environ | {"MPLBACKEND": backend},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout.strip()


def test_a_backend_that_is_not_installed_does_not_matter():
    """A notebook leaves this in the environment of the processes that it starts."""
    backend = "module://matplotlib_inline.backend_inline"
    if importlib.util.find_spec("matplotlib_inline"):
        backend = "module://not_installed.backend"
    assert run_with_backend(backend).startswith(backend)  # and the environment is as it was


def test_a_backend_that_is_installed_stays():
    assert run_with_backend("svg") == "svg svg"
