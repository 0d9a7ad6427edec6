"""One run in one folder: flags, checkpoints, the training loop, exact resuming; it knows no model.

- ``config``: ``flag``, ``RunFlags``, ``parse_run``: command-line flags from a dataclass; ``UsageError``, a user's
  mistake.
- ``folder``: ``open_run``, the folder of a run, locked and compared with the flags; ``RunFolder.finish`` writes the
  summary.
- ``fit``: ``fit``, the training loop.
- ``sweep``: ``sweep``, a run for every combination of the values of some flags.
- ``checkpoints``: ``Checkpoints``, which ``fit`` writes; ``read_checkpoint`` and ``fill_params`` for readers.
- ``feed``: examples whole on the devices, or in chunks from the host.
- ``devices``: ``choose_devices``, what a run computes on; ``hosts``: several processes of one run.
- ``signals``: Ctrl-C, SIGTERM, time limits; ``console``: ``run_main``, progress, tables, warnings, exit statuses.
- ``files``: files that are whole or absent; ``RunError``, a run that cannot go on.
"""
