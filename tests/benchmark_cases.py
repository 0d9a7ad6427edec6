"""Helpers of the tests in tests/benchmarks."""

import copy
import functools
import json

from benchmarks.our_training import OurTraining, Task, synthetic_images
from benchmarks.timing import Contestant


class Clock:
    """A clock that advances only while a contestant runs."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def contestant(self, name, seconds):
        def run():
            self.calls.append(name)
            self.now += seconds

        return Contestant(run, lambda: self.calls.append(f"prepare {name}"))


def tiny_task(flow_length=5):
    return Task(synthetic_images(0, 16), batch_size=8, seed=0, flow_length=flow_length, latent=2, hidden=4)


@functools.cache
def _compiled():
    training = OurTraining(tiny_task(), "schedule_free")
    training.compile()
    return training


def untrained():
    """A training before its first step; all tests share one that is compiled once."""
    return copy.copy(_compiled())


def summary(workdir):
    names = {path.name for path in workdir.iterdir()}
    assert {"config.json", "summary.json"} <= names
    assert [name for name in names if name.endswith(".png")]
    return json.loads((workdir / "summary.json").read_text())
