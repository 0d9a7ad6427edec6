"""The runs that a sweep of flow lengths consists of, each with its flags."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from experiments import mnist_flags
from planar_vae_jax.data import Dataset
from planar_vae_jax.flagged_data import choose_images
from planar_vae_jax.runs.choice import ASKED
from planar_vae_jax.runs.config import UsageError, check, flag

THREEFRY = "threefry2x32"  # under vmap the other generators draw for all seeds by the key of the first


@dataclass(frozen=True)
class Config(mnist_flags.Config):
    """Flags of ``experiments.flow_length``: its own, and those of each run."""

    lengths: tuple[int, ...] = flag(
        (0, 5, 10, 20),
        "K of each model, as in 0,5; differences are to the first",
        at_least=0,
        at_most=10_000,
        resumable=True,
    )
    seeds: int = flag(4, "of each model: --seed, --seed + 1, ...", at_least=1, at_most=10_000, resumable=True)
    each_class: bool = flag(False, "train on each class alone (those of --classes, if given)")
    together: str = flag(
        "auto",
        "train the seeds of a length at once; auto: where that is measured to be faster",
        choices=ASKED,
        resumable=True,
        default_before="no",
    )
    drawn_again: ClassVar[bool] = False
    flows: int = flag(None, "of experiments.mnist alone; here: --lengths")


class Run(NamedTuple):
    """A run of the sweep."""

    flows: int
    seed: int
    label: int | None  # the class that it is of alone
    config: mnist_flags.Config
    data: Dataset
    identity: dict[str, Any]

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{'' if self.label is None else f'class={self.label}-'}flows={self.flows}-seed={self.seed}"


def check_flags(config: Config) -> None:
    """Checks the sweep's own flags."""
    if config.flows is not None:
        raise UsageError(f"--flows is given by --lengths here; got --flows={config.flows}")
    if config.eval_only:
        single = "python -m experiments.mnist --workdir=WORKDIR/flows=K-seed=S --eval_only"
        raise UsageError(f"--eval_only is of a single run: {single}")
    if config.coordinator is not None:
        raise UsageError(f"--coordinator is of a single run, a sweep is one process; got {config.coordinator!r}")
    if config.together == "yes" and config.prng != THREEFRY:
        raise UsageError(f"--together=yes needs --prng={THREEFRY}; got --prng={config.prng}")
    if not config.lengths or len(set(config.lengths)) < len(config.lengths):
        given = ",".join(map(str, config.lengths))
        raise UsageError(f"--lengths must be at least one number, and none twice; got {given!r}")


def plan(config: Config, data: Dataset, identity: dict[str, Any]) -> list[Run]:
    """All runs of the sweep, each with its flags checked before the first begins."""
    images: dict[int | None, tuple[Dataset, dict[str, Any]]] = {None: (data, identity)}
    if config.each_class:
        if data.y_train is None or data.y_test is None:
            raise UsageError(f"--each_class needs labels of training and test images; {data.name} has none")
        labels = [int(label) for label in np.unique(data.y_test)]
        images = {c: choose_images(data, (c,), config.validation) for c in labels}
    runs = []
    for label, of_label in images.items():
        for flows in config.lengths:
            for seed in range(config.seed, config.seed + config.seeds):
                one = config_of_run(config, flows, seed, label)
                one = mnist_flags.with_defaults(one, mnist_flags.check_data(one, of_label[0]))
                runs.append(Run(flows, seed, label, one, *of_label))
    return runs


def config_of_run(config: Config, flows: int, seed: int, label: int | None) -> mnist_flags.Config:
    """The flags of one run, but for its folder."""
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(mnist_flags.Config)}
    given |= {"flows": flows, "seed": seed, "amortized": config.amortized and flows > 0}
    given |= {"resume": "auto", "overwrite": False, "classes": config.classes if label is None else (label,)}
    one = mnist_flags.Config(**given)
    check(one)
    mnist_flags.check_flags(one)
    return one
