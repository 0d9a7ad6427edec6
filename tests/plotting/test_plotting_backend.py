"""Importing plotting works with any MPLBACKEND, and brings no model."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

from planar_vae_jax import plotting

ROOT = Path(plotting.__file__).parents[2]


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
    """Runs SCRIPT with this MPLBACKEND and returns what it prints."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SCRIPT],
        cwd=ROOT,
        env=os.environ | {"MPLBACKEND": backend},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout.strip()


def test_a_backend_that_is_not_installed_does_not_matter():
    """A notebook leaves such a value in the environment of the processes that it starts."""
    backend = "module://matplotlib_inline.backend_inline"
    if importlib.util.find_spec("matplotlib_inline"):
        backend = "module://not_installed.backend"
    assert run_with_backend(backend).startswith(backend)  # the environment is unchanged


@pytest.mark.slow
def test_a_backend_that_is_installed_stays():
    assert run_with_backend("svg") == "svg svg"


IMPORTED = """
import sys
from planar_vae_jax import plotting
plotting.check_figures()
parts = ("vae", "train", "data", "analysis", "runs", "load", "report")
unwanted = ("flax", "optax", "orbax", "absl", *(f"planar_vae_jax.{part}" for part in parts))
print([name for name in sys.modules if name.startswith(unwanted)])
"""


def test_plotting_imports_no_model():
    run = subprocess.run(
        [sys.executable, "-c", IMPORTED], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    )
    assert run.stdout.strip() == "[]"


def test_modules_of_plotting_import_arrays_and_matplotlib_alone():
    allowed = ("planar_vae_jax.plotting", "planar_vae_jax.statistics", "numpy", "matplotlib")
    for path in Path(plotting.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.startswith(allowed) or name.split(".")[0] in sys.stdlib_module_names, (path.name, name)
