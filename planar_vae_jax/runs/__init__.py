"""One run in one folder: flags, checkpoints, the training loop, exact resuming; it knows no model.

- ``config``: ``flag``, ``RunFlags``, ``parse_run``: command-line flags from a dataclass; ``UsageError``, a user's
  mistake.
- ``folder``: ``open_run``, the folder of a run, locked and compared with the flags; ``RunFolder.finish`` writes the
  summary.
- ``fit``: ``fit``, the training loop.
- ``sweep``: ``sweep``, a run for every combination of the values of some flags.
- ``checkpoints``: ``Checkpoints``, which ``fit`` writes; ``read_checkpoint`` and ``fill_params`` for readers.
- ``devices``: ``choose_devices``, what a run computes on.
- ``console``: ``run_main``, the exit status and the one line of an error; progress, tables, warnings.

Files are written whole or not at all by ``replacing`` and ``write_json``; ``RunError`` is a run that cannot go on. In
private files: ``_feed``, examples on the devices or in chunks from the host; ``_hosts``, several processes of one run;
``_signals``, Ctrl-C, SIGTERM and time limits; ``_files``, the lines of metrics among them.
"""

from planar_vae_jax.runs._files import RunError, as_run_error, replacing, write_json

__all__ = ["RunError", "as_run_error", "replacing", "write_json"]
