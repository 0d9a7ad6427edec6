"""Runs a module whose writes to files the kernel refuses from the Nth time on that it begins to write FILE.

    python limited.py FILE N MODULE ARGUMENT...

FILE: "checkpoint", or the stem of a file in the run's folder. Used by test_disk.py.
"""

import resource
import runpy
import sys
from pathlib import Path

FILE, N, MODULE = sys.argv[1], int(sys.argv[2]), sys.argv[3]
sys.path.insert(0, str(Path(__file__).parents[2]))

from planar_vae_jax.runs import _files as files  # noqa: E402  alone: modules that import from it later get these

times = 0


def seen(file):
    global times
    times += file == FILE
    if times >= N:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def watched(function):
    def call(path, *args):
        seen(path.stem)
        return function(path, *args)

    return call


def save(self, *args, **kwargs):
    seen("checkpoint")
    begin(self, *args, **kwargs)
    if FILE == "checkpoint" and times >= N:
        self.wait()  # before the next file fails


files.replacing, files.append_json_line = watched(files.replacing), watched(files.append_json_line)

from planar_vae_jax.runs.checkpoints import Checkpoints  # noqa: E402

begin, Checkpoints.save = Checkpoints.save, save
sys.argv = ["-m", *sys.argv[4:]]
runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
