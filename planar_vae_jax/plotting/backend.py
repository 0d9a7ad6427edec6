"""Imports matplotlib, whatever MPLBACKEND says.

As matplotlib is imported, it takes its backend from MPLBACKEND, and fails where that is not installed: as it is with
the one that a notebook leaves to the processes it starts. Figures that become files need none, so here the backend is
taken if it can be.
"""

import contextlib
import os
import sys

_backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"figures need matplotlib: pip install matplotlib ({error})") from error
finally:
    if _backend is not None:
        os.environ["MPLBACKEND"] = _backend
if _backend:
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = _backend
