"""Imports matplotlib, even where MPLBACKEND names a backend that is not installed.

matplotlib reads MPLBACKEND when it is imported and fails if that backend is missing. A notebook leaves such a value to
the processes that it starts. Figures saved to files need no backend, so this module hides the variable during the
import and selects the backend afterwards if it exists.
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
