"""Event files of TensorBoard: they hold what metrics.jsonl and the pictures hold, each step once."""

import json
import struct
import sys

import numpy as np
import pytest
import toy
from matplotlib.figure import Figure
from running import Killed, result, start, stop
from tensorboardX.proto.event_pb2 import Event, SessionLog

from planar_vae_jax.runs import _tensorboard, fit, folder, sweep
from planar_vae_jax.runs._files import RunError
from planar_vae_jax.runs.config import UsageError
from planar_vae_jax.runs.devices import one_device

pytestmark = pytest.mark.usefixtures("one_step_at_a_time")


def events(workdir, kind):
    """The events of the one file of its kind; the records of its format: length, checksum, event, checksum."""
    (path,) = (workdir / "tensorboard").glob(f"*tfevents*.{kind}")
    raw, found = path.read_bytes(), []
    while raw:
        (length,) = struct.unpack("<Q", raw[:8])
        assert len(raw) >= length + 16
        found.append(Event.FromString(raw[12 : 12 + length]))
        raw = raw[length + 16 :]
    assert found[0].file_version == "brain.Event:2"
    return found[1:]


def scalars(workdir):
    """{tag: {step: value}}; each step once."""
    first, *rest = events(workdir, "metrics")
    assert first.session_log.status == SessionLog.START  # and so a server forgets what it has shown
    found = {}
    for event in rest:
        for value in event.summary.value:
            steps = found.setdefault(value.tag, {})
            assert event.step not in steps
            steps[event.step] = value.simple_value
    return found


def expected(workdir, unit="epoch"):
    """The same from metrics.jsonl."""
    found = {}
    for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()):
        for name, value in line.items():
            if value is not None and name != unit:
                step = 0 if name.startswith("first_") else line[unit]
                found.setdefault(name.removeprefix("first_"), {})[step] = float(np.float32(value))
    return found


@pytest.mark.parametrize("flags", [(), ("--data=none",)])
def test_every_number_of_the_metrics_is_a_scalar(tmp_path, flags, whole):
    start(tmp_path, "--tensorboard", *flags)
    assert scalars(tmp_path) == expected(tmp_path, "step" if flags else "epoch")
    assert 0 in scalars(tmp_path)["loss"]
    assert result(tmp_path) == whole(*flags)


def test_a_run_that_was_killed_has_each_step_once_and_one_that_was_asked_late_has_all(tmp_path, monkeypatch):
    def append(path, line):
        write(path, line)
        if line["epoch"] == 2:
            raise Killed

    write = fit.append_json_line
    monkeypatch.setattr(fit, "append_json_line", append)
    with pytest.raises(Killed):
        start(tmp_path, "--checkpoint_every=3", "--tensorboard")
    monkeypatch.undo()
    stop(tmp_path, 5, "--checkpoint_every=3")
    start(tmp_path, "--tensorboard")
    assert scalars(tmp_path) == expected(tmp_path)
    assert set(scalars(tmp_path)["loss"]) == {0, 1, 2, 3}
    start(tmp_path, "--tensorboard", "--epochs=4")
    assert set(scalars(tmp_path)["loss"]) == {0, 1, 2, 3, 4}


def test_a_line_is_in_the_file_when_the_epoch_ends(tmp_path):
    stop(tmp_path, 6, "--tensorboard")  # in the second epoch
    assert set(scalars(tmp_path)["loss"]) == {0, 1}


def test_pictures_are_written_at_the_end_and_replaced(tmp_path):
    with folder.open_run(toy.Config(workdir=str(tmp_path), tensorboard=True), "toy") as run:
        figure = Figure(figsize=(3, 2), dpi=100)
        for _ in range(2):
            run.save_figure("loss.png", figure)
            run.trained([{"epoch": 1}, {"epoch": 2, "loss": 1.0}], best=False)
            run.finish({})
    (event,) = events(tmp_path, "pictures")
    (value,) = event.summary.value
    assert (event.step, value.tag, value.image.width, value.image.height) == (2, "loss", 300, 200)
    assert value.image.encoded_image_string == (tmp_path / "loss.png").read_bytes()


def test_seeds_together_have_their_events_in_the_end(tmp_path):
    def train(config):
        with folder.open_run(config, "toy", toy.identity(config)) as run:
            fit.fit(run, **arguments(config))
            return run.finish({})

    def arguments(config):
        return toy.arguments(config) | {"score": None, "patience": 0}

    together = sweep.Together("toy", toy.identity(toy.Config()), one_device(), arguments)
    sweep.sweep(toy.Config(workdir=str(tmp_path), tensorboard=True), {"seed": range(2)}, train, together=together)
    for seed in range(2):
        assert scalars(tmp_path / f"seed={seed}") == expected(tmp_path / f"seed={seed}")


def test_without_the_flag_there_is_no_folder(tmp_path):
    start(tmp_path)
    assert not (tmp_path / "tensorboard").exists()


def test_a_run_without_the_extra_is_refused_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UsageError) as caught:
        start(tmp_path / "run", "--tensorboard")
    assert str(caught.value) == (
        "--tensorboard needs the extra 'tensorboard': pip install 'planar_vae_jax[tensorboard]'"
    )
    assert not any(tmp_path.iterdir())
    start(tmp_path / "run")


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, whole):
    class Full:
        def __init__(self, path):
            pass

        def write(self, data):
            pass

        def flush(self):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    monkeypatch.setattr("tensorboardX.RecordWriter", Full)
    with pytest.raises(RunError, match=r"tfevents\.\S+\.metrics could not be written: No space left on device"):
        start(tmp_path, "--tensorboard")
    monkeypatch.undo()
    start(tmp_path, "--tensorboard")
    assert result(tmp_path) == whole()
    assert scalars(tmp_path) == expected(tmp_path)


def test_a_line_that_was_lost_is_left_out(tmp_path):
    events_file = _tensorboard.Events(tmp_path, [{"epoch": 1, "loss": 1.0}, {}], "epoch")
    events_file.write({"epoch": 3, "loss": None, "kl": 2.0, "kl_se": 0.5})
    events_file.close()
    assert scalars(tmp_path) == {"loss": {1: 1.0}, "kl": {3: 2.0}, "kl_se": {3: 0.5}}
