"""Event files for TensorBoard (``--tensorboard``), which the extra ``tensorboard`` writes.

The event files repeat what ``metrics.jsonl`` and the pictures hold. A process that resumes a run writes them anew from
``metrics.jsonl``, so no step is in them twice. tensorboardX's ``RecordWriter`` writes in this thread; its
``SummaryWriter`` would write in another, where a full disk goes unnoticed.
"""

import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from planar_vae_jax.runs._files import writing
from planar_vae_jax.runs.page import Picture

_SCALARS, _PICTURES = "metrics", "pictures"
_COLOUR_SPACES = {0: 1, 2: 3, 4: 2, 6: 4}  # TensorBoard's number for a colour type of PNG


class Events:
    """The event file of a run's metrics."""

    def __init__(self, workdir: Path, lines: Sequence[Mapping[str, Any]], unit: str):
        """Removes all event files of the run and writes those lines.

        Raises:
            RunError: a file could not be written.
        """
        from tensorboardX.proto.event_pb2 import SessionLog

        self._unit = unit
        self._file = _File(workdir, _SCALARS, replaced="*")
        # A server that has shown an earlier file forgets its steps.
        self._file.write(step=0, session_log=SessionLog(status=SessionLog.START))
        for line in lines:
            self._add(line)
        self._file.flush()

    def write(self, line: Mapping[str, Any]) -> None:
        """Writes a line of metrics, and returns when it is on the disk; ``first_NAME`` is NAME at step 0."""
        self._add(line)
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _add(self, line: Mapping[str, Any]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        if self._unit not in line:  # a line that was lost is {}
            return
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and name != self._unit}
        first = {name: value for name, value in numbers.items() if name.startswith("first_")}
        rest = {name: value for name, value in numbers.items() if name not in first}
        for step, values, prefix in ((0, first, "first_"), (line[self._unit], rest, "")):
            if values:
                tags = {name.removeprefix(prefix): value for name, value in values.items()}
                scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in tags.items()]
                self._file.write(step=step, summary=Summary(value=scalars))


def write_pictures(workdir: Path, pictures: Sequence[Picture], step: int) -> None:
    """Writes the event file of a run's pictures.

    Raises:
        RunError: it could not be written.
    """
    from tensorboardX.proto.summary_pb2 import Summary

    file = _File(workdir, _PICTURES, replaced=_PICTURES)
    for picture in pictures:
        width, height, _, colours = struct.unpack(">IIBB", picture.png[16:26])
        image = Summary.Image(
            width=width, height=height, colorspace=_COLOUR_SPACES[colours], encoded_image_string=picture.png
        )
        value = Summary.Value(tag=picture.name.removesuffix(".png"), image=image)
        file.write(step=step, summary=Summary(value=[value]))
    file.close()


class _File:
    """An event file, in place of earlier ones."""

    def __init__(self, workdir: Path, kind: str, replaced: str):
        from tensorboardX import RecordWriter

        folder = workdir.absolute() / "tensorboard"
        self._path = folder / f"events.out.tfevents.{time.time():.6f}.{kind}"  # TensorBoard wants the middle of it
        with writing(self._path):
            folder.mkdir(exist_ok=True)
            for path in folder.glob(f"events.out.tfevents.*.{replaced}"):
                path.unlink()
            self._writer = RecordWriter(str(self._path))
        self.write(file_version="brain.Event:2")

    def write(self, **event: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        with writing(self._path):
            self._writer.write(Event(wall_time=time.time(), **event).SerializeToString())

    def flush(self) -> None:
        with writing(self._path):
            self._writer.flush()

    def close(self) -> None:
        with writing(self._path):
            try:
                self._writer.flush()
            finally:
                self._writer.close()
