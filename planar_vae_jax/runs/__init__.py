"""One run in one folder; knows no model and no data set.

- ``config``: flags from a dataclass, and those of every run; ``folder``: is it the same run; ``description``: what
  ``config.json`` says; ``lock``: whose it is.
- ``devices``: what it computes on; ``processes``: several of one run; ``native_errors``: what C++ says of them;
  ``shared``: their checkpoints.
- ``fit``: the training loop; ``epochs``: how far it is; ``compiled``: what it compiles, the cache of programs, what is
  not finite; ``signals``: Ctrl-C and SIGTERM.
- ``together``: that loop for several seeds in one program; ``choice``: whether that is faster.
- ``checkpoints``: save, restore, delete; ``reading``: read only, checksums, format; ``leaves``: a tree as bytes.
- ``files``: whole or not there, lines of metrics; ``console``: progress, tables, warnings, exit status.
"""
