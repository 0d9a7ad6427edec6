"""Whether seeds are trained together or one after the other: as asked, as before, or as is faster where they are."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from planar_vae_jax.runs import chunks, compiled, processes
from planar_vae_jax.runs.config import UsageError
from planar_vae_jax.runs.devices import Devices
from planar_vae_jax.runs.files import read_json, write_json
from planar_vae_jax.train import loop as training

ASKED = ("auto", "yes", "no")
SECONDS = 0.3  # of a call that is timed
ROUNDS = 3
GAIN = 1.05  # below it seeds stay alone, with the bits of a run by itself


class Timing(NamedTuple):
    """Seconds a step and seed."""

    alone: float
    together: float


class Choices:
    """What has been chosen for each group of runs, kept in a file: a sweep that goes on goes on in the same way.

    Args:
        path: of the file, which may be missing, or damaged.
        asked: one of ``ASKED``.
    """

    def __init__(self, path: Path, asked: str):
        self._path, self._asked = path, asked
        try:
            self.made = read_json(path) or {}
        except (OSError, ValueError):
            self.made = {}

    def together(
        self,
        name: str,
        alone: Devices,
        together: Devices,
        measure: Callable[[], Timing],
        obstacle: str | None = None,
    ) -> bool:
        """Whether the seeds of a group are trained together; says so where that was not asked for.

        Args:
            name: of the group.
            alone, together: the devices that either way would use; the latter are split over by the seeds.
            measure: is called where neither the flag nor an earlier choice on such devices decides.
            obstacle: why this group cannot be together, if it cannot.

        Raises:
            UsageError: they were to be, and cannot.
        """
        if processes.count() > 1:
            obstacle = "a run in several processes has them to itself"
        if obstacle is not None and self._asked == "yes":
            raise UsageError(f"--together=yes is not possible: {obstacle}")
        if obstacle is not None:
            print(f"\n{name}: {_way(False)}: {obstacle}", flush=True)
            return False
        where = {"kind": together.used[0].device_kind, "devices": [len(alone.used), len(together.used)]}
        before = self.made.get(name)
        if self._asked != "auto":
            made = {"together": self._asked == "yes", **where}
        elif isinstance(before, dict) and all(before.get(key) == value for key, value in where.items()):
            made = before
            print(f"\n{name}: {_way(made['together'])}, as before", flush=True)
        else:
            timing = measure()
            faster = timing.together * GAIN < timing.alone
            figures = {f"milliseconds_{way}": 1e3 * value for way, value in timing._asdict().items()}
            made = {"together": faster, **where, "seeds": together.size, **figures}
            print(f"\n{name}: {_told(made, alone, together)}: {_way(faster)}", flush=True)
        if made != before:
            self.made[name] = made
            write_json(self._path, self.made)
        return made["together"] is True


def _way(together: bool) -> str:
    return "seeds together" if together else "one seed after the other"


def _told(made: Mapping[str, Any], alone: Devices, together: Devices) -> str:
    """``1.83 ms a step and seed alone, 2.03 for 4 seeds together``."""
    over = [f" (over {len(used)} devices)" if len(used) > 1 else "" for used in (alone.used, together.used)]
    return (
        f"{made['milliseconds_alone']:.3g} ms a step and seed alone{over[0]}, "
        f"{made['milliseconds_together']:.3g} for {made['seeds']} seeds together{over[1]}"
    )


def time_seeds(
    arguments: Mapping[str, Any], starts: Sequence[Mapping[str, Any]], alone: Devices, together: Devices
) -> Timing:
    """Times some steps of the first seed by itself and of all together: a few seconds, and what compilation takes.

    Args:
        arguments: of :func:`planar_vae_jax.runs.together.fit_together`.
        starts: ``params`` and ``key`` of each seed.
        alone: that the batches of one seed are split over.
        together: that the seeds are split over.
    """
    loss, optimizer, steps_per_epoch = (arguments[name] for name in ("loss", "optimizer", "steps_per_epoch"))
    data, batch_size = arguments.get("data"), arguments.get("batch_size")
    size = chunks.size_of(data)

    def begin(params: Any, key: jax.Array) -> tuple[Any, ...]:
        state = compiled.init_state(params, optimizer)
        order, steps_key = compiled.begin_epoch(size, batch_size, steps_per_epoch, key, 0)
        batch = jax.eval_shape(lambda: compiled.take_batch(data, order, 0))
        info = training.empty_info(loss, state, batch, key, steps_per_epoch)
        return state, info, order, steps_key

    def timed(devices: Devices, steps: Callable[..., Any], begun: tuple[Any, ...]) -> Callable[[int], float]:
        state, info, order, key = begun
        call, there = devices.under(functools.partial(steps, loss, optimizer)), devices.replicate(data)

        def seconds(count: int) -> float:
            began = time.perf_counter()
            jax.block_until_ready(call(state, info, there, order, key, 0, count))
            return time.perf_counter() - began

        return seconds

    begun = [begin(**start) for start in starts]
    calls = (
        timed(alone, compiled.train_steps, alone.replicate(begun[0])),
        timed(together, compiled.train_together, together.stack(begun)),
    )
    one, all_of_them = _seconds_a_step(calls, steps_per_epoch)
    return Timing(one, all_of_them / len(starts))


def _seconds_a_step(calls: Sequence[Callable[[int], float]], most: int) -> list[float]:
    """The shortest of several rounds, in which they take turns."""
    counts = [_steps_to_time(call, most) for call in calls]
    rounds = [[call(count) / count for call, count in zip(calls, counts, strict=True)] for _ in range(ROUNDS)]
    return [min(times) for times in zip(*rounds, strict=True)]


def _steps_to_time(call: Callable[[int], float], most: int) -> int:
    """How many take about ``SECONDS``, at most an epoch."""
    call(1)  # compiles
    count = 1
    while count < most and (seconds := call(count)) < SECONDS / 2:
        count = min(most, max(2 * count, min(8 * count, int(count * SECONDS / max(seconds, 1e-9)))))
    return count
