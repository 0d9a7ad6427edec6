"""Sweeps: one run of an experiment for every combination of the values of some flags, each in a separate folder.

    sweep(config, {"flows": (0, 5), "seed": range(4)}, train)    # train(config) -> summary, one whole run

Every run lies in ``WORKDIR/flows=K-seed=S/`` and can be loaded like any other. A sweep that was stopped is resumed by
the same call; more values add runs to those that are finished.

Runs that differ in their seed alone can train together, as one program with a leading axis of seeds. While they train
they share one folder and one checkpoint; at the end each seed gets a separate folder. The figures of a seed then equal
those of the seed trained alone up to float32 rounding, as products for several seeds may sum in another order.
"""

import dataclasses
import glob
import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from planar_vae_jax.data.streamed import Streamed
from planar_vae_jax.runs import _hosts
from planar_vae_jax.runs._files import read_json_lines, write_json_lines
from planar_vae_jax.runs.checkpoints import Checkpoints, read_checkpoint
from planar_vae_jax.runs.config import RunFlags, UsageError, as_json, check, shown
from planar_vae_jax.runs.console import say
from planar_vae_jax.runs.devices import Devices
from planar_vae_jax.runs.fit import fit
from planar_vae_jax.runs.folder import RunFolder, open_run
from planar_vae_jax.train import mesh

Config = TypeVar("Config", bound=RunFlags)


class Together(NamedTuple):
    """How to train several seeds at once: the arguments of ``open_run``, and those of ``fit`` for one run."""

    experiment: str
    data: dict[str, Any] | None
    devices: Devices  # the devices of one run; the most of them that divide the number of seeds are used
    start: Callable[[Any], dict[str, Any]]  # config -> params, key and the other arguments of fit


def combinations(
    config: Config,
    over: Mapping[str, Sequence[Any]],
    complete: Callable[[Config], Config] = lambda config: config,
) -> list[tuple[dict[str, Any], Config]]:
    """Returns ``({flag: value}, config)`` for every combination of values in ``over``; the last flag varies fastest.

    The folder of a run lies in ``config.workdir`` and is named after its values.

    Args:
        config: the flags that all runs share.
        over: the values of each flag, by its name.
        complete: checks the flags of a run against each other, and fills in defaults that depend on other flags.

    Raises:
        UsageError: a flag does not accept one of its values, or there is no ``workdir``.
    """
    if config.workdir is None:
        raise UsageError("--workdir must be the folder of the sweep; got None")
    runs = []
    for each in itertools.product(*over.values()):
        values = dict(zip(over, each, strict=True))
        folder = Path(config.workdir).expanduser() / folder_name(values)
        one = dataclasses.replace(config, **values, workdir=str(folder), resume="auto", overwrite=False)
        check(one)
        runs.append((values, complete(one)))
    return runs


def check_one_process(config: RunFlags) -> None:
    """Checks that the sweep runs in a single process.

    Raises:
        UsageError: flags, a SLURM step or a TPU slice ask for several processes.
    """
    names = ("coordinator", "num_processes", "process_id")
    if _hosts.are_asked_for(*(getattr(config, name, None) for name in names)):
        raise UsageError("a sweep runs in one process; start it once, outside of a step of several tasks")


def check_together(scored: bool, streamed: bool) -> None:
    """Checks that seeds can train together.

    Args:
        scored: whether the runs choose a best checkpoint.
        streamed: whether their examples are sent in chunks from the host.

    Raises:
        UsageError: they do, or are.
    """
    if scored or streamed:
        raise UsageError(
            "--together=yes needs images on the device and no validation images, as each seed would have its own best "
            "checkpoint; leave --validation, --patience and --images=host away, or take --together=no"
        )


def sweep(
    config: Config,
    over: Mapping[str, Sequence[Any]],
    train: Callable[[Config], Mapping[str, Any]],
    *,
    complete: Callable[[Config], Config] = lambda config: config,
    together: Together | None = None,
) -> list[tuple[dict[str, Any], Mapping[str, Any]]]:
    """Trains every combination of the values in ``over`` (:func:`combinations`).

    Args:
        config: the flags that all runs share; ``config.workdir`` is the sweep's folder.
        over: the values of each flag, by its name.
        train: trains one run to its end and returns its summary; for a finished run, the stored summary.
        complete: see :func:`combinations`.
        together: how the seeds of a combination train at once; None: they train one after the other.

    Returns:
        ``({flag: value}, summary)`` for each run.

    Raises:
        UsageError: the sweep was started in several processes, a flag does not accept one of its values, or the seeds
            cannot train together.
    """
    check_one_process(config)
    runs = combinations(config, over, complete)
    if together is not None:
        for _, group in itertools.groupby(runs, key=lambda run: {**run[0], "seed": None}):
            train_together(list(group), together)
    results = []
    for number, (values, one) in enumerate(runs, 1):
        say(f"\nrun {number} of {len(runs)}: {Path(one.workdir or '').name}")
        results.append((values, train(one)))
    return results


def folder_name(values: Mapping[str, Any]) -> str:
    """Returns the name of the folder of the run with these values of flags: ``flows=5-seed=0``."""
    return "-".join(map(_named, values.items()))


def _named(flag: tuple[str, Any]) -> str:
    """Returns ``flows=5``, the form in which a flag appears in the name of a folder."""
    return f"{flag[0]}={shown(as_json(flag[1]))}"


def train_together(runs: Sequence[tuple[dict[str, Any], RunFlags]], together: Together) -> None:
    """Trains runs that differ in their seed alone; a later ``fit`` in the folder of each finds nothing left to train.

    A run whose folder exists is left out, because it was trained or begun alone. A group that was stopped is resumed,
    even if more seeds are now asked for.

    Args:
        runs: as :func:`combinations` returns them.
        together: how they train.

    Raises:
        UsageError: the runs choose a best checkpoint (``score``), or their examples are streamed.
        RunError, CheckpointError, _signals.Stopped: as :func:`planar_vae_jax.runs.fit.fit` raises them.
    """
    values = {name: value for name, value in runs[0][0].items() if name != "seed"}
    prefix = "-".join([*map(_named, values.items()), "seeds="])
    configs = {each["seed"]: config for each, config in runs}
    parent = Path(runs[0][1].workdir or "").parent
    begun = [tuple(map(int, path.name[len(prefix) :].split("+"))) for path in parent.glob(glob.escape(prefix) + "*")]
    alone = {seed for seed, config in configs.items() if Path(config.workdir or "").exists()}
    fresh = tuple(seed for seed in configs if seed not in alone.union(*begun))
    for seeds in (*begun, fresh):
        if len(seeds) > 1 and set(seeds) <= set(configs):
            folder = parent / (prefix + "+".join(map(str, seeds)))
            _train_group(folder, [configs[seed] for seed in seeds], together)


def _train_group(folder: Path, configs: Sequence[RunFlags], together: Together) -> None:
    """Trains seeds as one program in ``folder``, which is removed once each seed has a separate folder."""
    devices = _divided(together.devices, len(configs))
    starts = [together.start(config) for config in configs]
    arguments = {name: value for name, value in starts[0].items() if name not in ("params", "key")}
    check_together(arguments.get("score") is not None, isinstance(arguments.get("data"), Streamed))
    params, keys = (mesh.stack([start[name] for start in starts], None) for name in ("params", "key"))
    say(f"\n{len(configs)} seeds together in {folder.name}; figures shown while training are means over them")
    config = dataclasses.replace(configs[0], workdir=str(folder), tensorboard=False)  # each seed's files follow
    with open_run(config, together.experiment, together.data, devices) as group:
        if devices.mesh is not None:
            say(f"{len(configs) // len(devices.used)} of the {len(configs)} seeds on each device")
        fit(group, params=params, key=keys, **arguments)
        _hand_out(group, configs, together)
    shutil.rmtree(folder)


def _divided(devices: Devices, seeds: int) -> Devices:
    """Returns the greatest number of the devices that divides the number of seeds."""
    count = next(number for number in range(min(len(devices.used), seeds), 0, -1) if seeds % number == 0)
    used = devices.used[:count]
    return Devices(used, mesh.data_mesh(used) if count > 1 else None)


def _hand_out(group: RunFolder, configs: Sequence[RunFlags], together: Together) -> None:
    """Writes the metrics and the newest checkpoint of each seed into the folder of that seed."""
    stored = read_checkpoint(group.workdir / "checkpoints")
    lines = read_json_lines(group.workdir / "metrics.jsonl", stored.meta["epoch"])
    share = {"seconds": stored.meta["seconds"] / len(configs)}
    for number, config in enumerate(configs):
        own = [{name: _entry(name, value, number, len(configs)) for name, value in line.items()} for line in lines]
        leaves = {name: leaf[number] for name, leaf in stored.leaves.items()}
        with (
            open_run(config, together.experiment, together.data, together.devices) as run,
            Checkpoints(run.workdir / "checkpoints", keep=config.keep) as checkpoints,
        ):
            if checkpoints.newest != stored.step:  # if equal, a process that was killed later has written both
                write_json_lines(run.workdir / "metrics.jsonl", own)
                checkpoints.save(stored.step, leaves, stored.meta | share)


def _entry(name: str, value: Any, number: int, seeds: int) -> Any:
    """Returns one seed's part of an entry in a line of metrics."""
    if isinstance(value, list):
        return value[number]
    return value / seeds if name == "seconds" else value
