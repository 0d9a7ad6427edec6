"""Runs: command-line flags, the folder of a run, checkpoints, and a training loop that resumes exactly.

Nothing in this folder knows a model.

- ``config``: ``flag``, ``RunFlags`` and ``parse_run`` make command-line flags from a dataclass; ``UsageError`` reports
  a user's mistake.
- ``folder``: ``open_run`` locks the folder of a run and compares it with the flags; ``RunFolder.finish`` writes the
  summary and the page.
- ``page``: ``report.html``; ``Link`` is a cell of a table that leads to another page.
- ``fit``: ``fit``, the training loop.
- ``sweep``: ``sweep`` trains a run for every combination of the values of some flags.
- ``checkpoints``: ``fit`` writes ``Checkpoints``; ``read_checkpoint`` and ``fill_params`` read them.
- ``devices``: ``choose_devices`` chooses the devices that a run computes on.
- ``console``: ``run_main`` turns errors into one line and an exit status; progress, tables, warnings.

``replacing`` and ``write_json`` write a file whole or not at all; ``RunError`` reports a run that cannot continue, and
``as_run_error`` turns another error into one. The private files are ``_feed`` (examples on the devices, or in chunks
from the host), ``_hosts`` (several processes of one run), ``_signals`` (Ctrl-C, SIGTERM and time limits), ``_files``
(writing files safely, ``metrics.jsonl`` among them), ``_about`` and ``_charts`` (parts of the page) and
``_tensorboard``.
"""

from planar_vae_jax.runs._files import RunError, as_run_error, replacing, write_json

__all__ = ["RunError", "as_run_error", "replacing", "write_json"]
