"""Sets flags of XLA for the suite, most of whose time is spent on compiling, before JAX is imported.

Machine code that is not optimised has the same arithmetic, and XLA's older generator makes it in a quarter of the time,
as one module (pytest-xdist has the other cores). ``.ci/run`` runs the numerics again as users have them: with
``XLA_FLAGS=`` in the environment nothing is set.
"""

import mmap
import os
from pathlib import Path

import jaxlib

if "XLA_FLAGS" not in os.environ:  # as pytest's own workers have it from pytest
    flags = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    for library in Path(jaxlib.__file__).parent.glob("libjax_common.*"):
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            # A flag that a later XLA does not know would end the process. XLA keeps the names of removed flags, but not
            # between null bytes.
            for flag in ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"):
                if content.find(f"\0{flag[2:].split('=')[0]}\0".encode()) >= 0:
                    flags.append(flag)
    os.environ["XLA_FLAGS"] = " ".join(flags)
