"""What the tests of the benchmarks share."""

import json

from benchmarks.timing import Contestant


class Clock:
    """Time that passes only in contestants."""

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


def summary(workdir):
    names = {path.name for path in workdir.iterdir()}
    assert {"config.json", "summary.json"} <= names
    assert [name for name in names if name.endswith(".png")]
    return json.loads((workdir / "summary.json").read_text())
