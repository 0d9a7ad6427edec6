"""Command-line experiments; run them as ``python -m experiments.NAME``."""

import importlib.util
import signal
import sys

if sys.argv[0] == "-m":  # true while an experiment is imported; Ctrl-C then ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    needed = ("absl", "filelock", "matplotlib", "orbax.checkpoint", "tqdm")
    missing = [name for name in needed if importlib.util.find_spec(name.split(".")[0]) is None]
    if missing:
        sys.exit(f"error: {', '.join(missing)} cannot be imported; pip install -e '.[experiments]' brings all of it")
