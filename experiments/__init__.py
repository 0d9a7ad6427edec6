"""Command-line experiments; run them as ``python -m experiments.NAME``."""

import signal
import sys

if sys.argv[0] == "-m":  # so while an experiment's imports run: Ctrl-C ends them without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
