"""A VAE with K planar layers between encoder and decoder, on images (Xu et al. 2023, section 4.2, figures 3 to 6).

    python -m experiments.mnist --flows=5

trains for 30 epochs (on MNIST about two minutes on two CPU cores) and writes figures and their numbers into ``runs/``.
The free energy on MNIST should reach 96.0 nats per image with K = 5, and 96.5 with K = 0. ``--objective=reconstruction
--latent=20`` draws the paper's loss curve, from 205 to 5.3 (the paper: "over 200 ... plateauing around 6").

The same command resumes a run that was stopped; ``--workdir=DIR --eval_only`` draws the figures of a run again.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from planar_vae_jax import plotting, report
from planar_vae_jax.analysis import evaluation
from planar_vae_jax.data import DATASETS, Dataset, is_binary, load_images
from planar_vae_jax.data.streamed import Streamed
from planar_vae_jax.flows.nonlinearities import NONLINEARITIES
from planar_vae_jax.load import model_from_flags
from planar_vae_jax.runs import as_run_error
from planar_vae_jax.runs.config import UsageError, flag, parse_run
from planar_vae_jax.runs.console import run_main, say, warn
from planar_vae_jax.runs.devices import DeviceFlags, Devices, choose_devices
from planar_vae_jax.runs.fit import fit
from planar_vae_jax.runs.folder import open_run
from planar_vae_jax.train.optimizers import CONVOLUTIONS_LEARNING_RATE, LEARNING_RATES, OPTIMIZERS, make_optimizer
from planar_vae_jax.vae.binarization import BINARIZATIONS
from planar_vae_jax.vae.conv import divisible_by_4
from planar_vae_jax.vae.likelihoods import LIKELIHOODS, default_binarization, measured
from planar_vae_jax.vae.model import POSTERIORS
from planar_vae_jax.vae.objectives import OBJECTIVES, vae_loss
from planar_vae_jax.vae.precision import PRECISIONS

# Flags that titles show.
TITLE = ("flows", "amortized", "h", "encoder", "layers", "posterior", "likelihood", "binarization", "objective")
# Flags that the summary contains.
SUMMARY = ("flows", "seed", "objective", "train_samples", "amortized", "likelihood", "posterior", "encoder", "classes")
SUMMARY += ("nll_samples", "patience", "binarization")  # type: ignore[assignment]
# The same arguments give the same object, so that runs in one process share their programs; older ones are released.
shared_loss, shared_optimizer = functools.lru_cache(2)(vae_loss), functools.lru_cache(2)(make_optimizer)


@dataclass(frozen=True)
class Config(DeviceFlags):
    """Flags of ``experiments.mnist``."""

    usage = """\
import jax
from planar_vae_jax import load_run

run = load_run("WORKDIR", "CHECKPOINT")
pictures = run.sample(jax.random.key(0), 8)  # pixel means in 0..1
nats = run.nll(pictures, jax.random.key(1))  # -log p(x) of each

# from a shell: python -m experiments.use --workdir=WORKDIR --samples=64"""
    flows: int = flag(5, "K, the number of planar layers; 0: an ordinary VAE", at_least=0, at_most=10_000, named=True)
    epochs: int = flag(
        30,
        "passes over the training images; a greater number continues a run",
        at_least=1,
        at_most=10**6,
        resumable=True,
    )
    seed: int = flag(0, "seed of everything random", at_least=0, at_most=2**32 - 1, named=True)
    dataset: str = flag(
        "auto",
        f"{', '.join(DATASETS)}, or FILE.npz with x_train, x_test: [N, H, W] or [N, H, W, 3] uint8; or a folder with "
        "x_train.npy, x_test.npy",
    )
    data_dir: str | None = flag(None, "folder with the files of the data set; downloads go there", resumable=True)
    classes: tuple[int, ...] | None = flag(None, "train and test on these labels alone, as in 3,8")
    validation: int = flag(0, "how many training images to hold out, to choose the best checkpoint by", at_least=0)
    patience: int = flag(
        0, "end the run after this many epochs without a better validation loss; 0: never", at_least=0, resumable=True
    )
    objective: str = flag("elbo", "what is minimised", choices=OBJECTIVES)
    train_samples: int = flag(1, "k, samples per image for iwae; 1 gives the elbo", at_least=1, at_most=100_000)
    binarization: str = flag(
        None,
        "how grey levels become 0 or 1; default: dynamic; none for reconstruction, logistic and gaussian",
        choices=BINARIZATIONS,
    )
    likelihood: str = flag(
        "bernoulli",
        f"p(x|z); its nats are of {', '.join(f'{v.measures} ({k})' for k, v in LIKELIHOODS.items())}",
        choices=tuple(LIKELIHOODS),
    )
    posterior: str = flag("diagonal", "covariance of q(z|x) before the planar layers", choices=tuple(POSTERIORS))
    amortized: bool = flag(False, "the encoder gives each image its own flow")
    h: str = flag("tanh", "the flow's nonlinearity", choices=tuple(NONLINEARITIES))
    latent: int = flag(40, "size of z", at_least=1, at_most=100_000)
    encoder: str = flag("mlp", "conv: gated convolutions in encoder and decoder", choices=("mlp", "conv"))
    layers: int = flag(1, "hidden layers of an mlp", at_least=1, at_most=2)
    hidden: int = flag(400, "width of the hidden layers of an mlp", at_least=1, at_most=100_000)
    batch_size: int = flag(128, "images per step", at_least=1)
    optimizer: str = flag(None, "default: schedule_free; adam for reconstruction", choices=OPTIMIZERS)
    learning_rate: float = flag(
        None,
        "default: 8e-3 for schedule_free, 1e-3 for adam and for conv",
        above=0.0,
        at_most=1e30,
    )
    warmup_steps: int = flag(
        None, "steps of learning-rate warm-up; default: an epoch for schedule_free, 0 for adam", at_least=0
    )
    weight_decay: float = flag(0.0, "decoupled from the gradient", at_least=0.0, at_most=1e30)
    clip_norm: float = flag(
        0.0, "scales gradients of a greater norm down to this norm; 0: no clipping", at_least=0.0, at_most=1e30
    )
    kl_warmup: int = flag(0, "epochs over which the weight of the KL term grows from 0 to 1", at_least=0)
    energy_annealing: int = flag(
        0, "epochs over which the temperature of log p(x, z) grows from 0.01 to 1 (Rezende & Mohamed)", at_least=0
    )
    prng: str = flag(
        "threefry2x32",
        "generator of the training's random numbers: threefry2x32, equal on all devices; or that of the device",
        choices=("threefry2x32", "rbg", "unsafe_rbg"),
    )
    precision: str = flag(
        "float32", "dtype in which encoder and decoder compute; all else is float32", choices=PRECISIONS
    )
    nll_samples: int = flag(
        128, "importance samples per image for the NLL", at_least=1, at_most=100_000, evaluation=True
    )


class Splits(NamedTuple):
    """The images of a run, whole on the devices or streamed from the host, by split."""

    train: Any  # uint8, as ``fit`` takes them
    test: Any  # as ``evaluation`` takes them
    valid: Any  # as ``evaluation`` takes them, or None


def main(argv: list[str], *, pictures: bool = True) -> None:
    """Trains a VAE and writes its figures.

    Args:
        argv: the flags, without the program's name.
        pictures: whether to draw the figures.
    """
    config = parse_run(Config, argv, __doc__, "mnist")
    check_flags(config)
    notes: list[str] = []
    data, identity = load_images(config.dataset, config.data_dir, config.classes, config.validation, notes.append)
    train(config, data, identity, notes, pictures=pictures)


def train(
    config: Config, data: Dataset, identity: dict[str, Any], notes: Sequence[str] = (), *, pictures: bool = True
) -> dict[str, Any]:
    """Trains one run to its end and returns its summary.

    Args:
        config: the flags.
        data: the images.
        identity: what identifies the data in ``config.json``.
        notes: remarks on the data, shown when a run begins.
        pictures: whether to draw the figures.
    """
    config = with_defaults(config, data)
    devices = run_devices(config)
    with open_run(config, "mnist", identity, devices, defaults=dependent_defaults(config, data)) as run:
        if run.finished:
            return run.summary()
        for note in notes if run.new else ():
            warn(note)
        binarised = report.binarization_note(config.binarization, is_binary(data))
        if binarised is not None:
            say(binarised)

        images = place(config, data)
        where = "sent in chunks from the host" if isinstance(images.train, Streamed) else "whole on each device"
        say(f"{data.x_train.nbytes / 1e6:.3g} MB of training images, {where}")
        fitted = fit(run, **start(config, data, images, devices))
        model, lines = fitted.params, fitted.lines

        say(f"test figures over {len(data.x_test)} images, {config.nll_samples} importance samples each")
        nats_of = measured(model.likelihood, config.binarization)
        say(f"nats are of {nats_of}")
        with devices.active():
            everywhere = devices.replicate(model), devices.replicate(images.test)
            figures = evaluation.evaluate(*everywhere, nll_samples=config.nll_samples)
        image_shape = data.x_train.shape[1:]
        results = report.collect_results(
            model,
            figures,
            images.test,
            data.y_test,
            nll_samples=config.nll_samples,
            bits_of=math.prod(image_shape) if model.likelihood.of_levels else None,
        )
        if pictures:
            title = report.describe(
                data.name,
                channels=image_shape[2] if len(image_shape) == 3 else 1,
                epochs=fitted.epoch,
                binary=is_binary(data),
                classes=config.classes,
                **{name: getattr(config, name) for name in TITLE},
            )
            report.draw_run(
                run.save_figure,
                model,
                data,
                images.test,
                results,
                lines,
                split=watched_split(data),
                title=title,
                objective=config.objective,
            )
        facts = {name: getattr(config, name) for name in SUMMARY} | {"nats_of": nats_of}
        if config.patience:
            facts |= {"stopped_early": fitted.stopped_early, "best_epoch": fitted.epoch}
        summary = run.finish(report.summary(results, lines, data, facts, seconds=run.seconds()))
        report.print_results(results)
        return summary


def run_devices(config: Config) -> Devices:
    """Returns the devices that the run computes on."""
    return choose_devices(
        config.batch_size,
        config.devices,
        coordinator=config.coordinator,
        num_processes=config.num_processes,
        process_id=config.process_id,
    )


def on_host(config: Config, data: Dataset) -> bool:
    """Returns whether the images stay on the host, which is the default for images mapped from npy files."""
    return (config.images or ("host" if isinstance(data.x_train, np.memmap) else "device")) == "host"


def place(config: Config, data: Dataset) -> Splits:
    """Returns the images as they are trained on and evaluated, on the devices or on the host (``--images``)."""
    host = on_host(config, data)

    def evaluated(x: Any, index: Any, split: str) -> Any:
        return evaluation.evaluated_images(x, index, split, config.binarization, on_host=host)

    return Splits(
        evaluation.training_images(data.x_train, data.train_index, config.binarization, on_host=host),
        evaluated(data.x_test, data.test_index, "test"),
        None if data.x_valid is None else evaluated(data.x_valid, data.valid_index, "valid"),
    )


def watched_split(data: Dataset) -> str:
    """Returns the split whose loss is computed after each epoch: validation images if there are any."""
    return "test" if data.x_valid is None else "validation"


def start(config: Config, data: Dataset, images: Splits, devices: Devices) -> dict[str, Any]:
    """Returns the arguments of ``fit``: model, key, loss, optimiser, images and sizes."""
    init_key, train_key = jax.random.split(jax.random.key(config.seed, impl=config.prng))
    steps_per_epoch, split = len(data.x_train) // config.batch_size, watched_split(data)
    watched = devices.replicate(images.test if images.valid is None else images.valid)

    def report_loss(model: Any) -> dict[str, float | None]:
        return evaluation.mean_loss(model, watched, config.objective, split, config.train_samples)

    return {
        "params": model_from_flags(vars(config), data.x_train.shape[1:], init_key),
        "key": train_key,
        "loss": shared_loss(
            config.objective,
            config.binarization,
            train_samples=config.train_samples,
            kl_warmup_steps=config.kl_warmup * steps_per_epoch,
            annealing_steps=config.energy_annealing * steps_per_epoch,
        ),
        "optimizer": shared_optimizer(
            config.optimizer,
            learning_rate=config.learning_rate,
            warmup_steps=config.warmup_steps,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
        ),
        "data": images.train,
        "batch_size": config.batch_size,
        "steps": config.epochs * steps_per_epoch,
        "steps_per_epoch": steps_per_epoch,
        "report": report_loss,
        "score": None if split == "test" else "validation_loss",
        "patience": config.patience,
        "show": ("train_loss", f"{split}_loss"),
    }


def check_flags(config: Config) -> None:
    """Checks the flags against each other; raises UsageError."""
    if config.amortized and config.flows == 0:
        raise UsageError("--amortized needs --flows of at least 1; got --flows=0")
    if config.train_samples > 1 and config.objective != "iwae":
        raise UsageError(f"--train_samples={config.train_samples} needs --objective=iwae; got {config.objective}")
    for name in ("kl_warmup", "energy_annealing"):
        if getattr(config, name) and config.objective != "elbo":
            raise UsageError(f"--{name} anneals the elbo; got --objective={config.objective}")
    if not LIKELIHOODS[config.likelihood].binary:
        if config.objective == "reconstruction":
            raise UsageError(f"--likelihood={config.likelihood} needs the elbo; got --objective=reconstruction")
        if config.binarization not in (None, "none"):
            levels = f"--likelihood={config.likelihood} is of grey levels: --binarization must be none"
            raise UsageError(f"{levels}; got --binarization={config.binarization}")
    if config.encoder == "conv":
        for name in ("hidden", "layers"):
            if getattr(config, name) != getattr(Config, name):
                raise UsageError(f"--{name} is of --encoder=mlp; got --{name}={getattr(config, name)} with conv")
    with as_run_error(ImportError):
        plotting.check_figures()


def with_defaults(config: Config, data: Dataset) -> Config:
    """Returns the flags with the defaults that depend on other flags and on the data.

    Raises:
        UsageError: the flags do not fit the data.
    """
    if config.batch_size > len(data.x_train):
        size = f"{len(data.x_train)} training images of {data.name}"
        raise UsageError(f"--batch_size must be at most the {size}; got {config.batch_size}")
    if config.patience and data.x_valid is None:
        raise UsageError(
            f"--patience={config.patience} needs validation images: --validation=N, or x_valid in FILE.npz or DIR"
        )
    if config.encoder == "conv" and not divisible_by_4(data.x_train.shape[1:]):
        size = " x ".join(map(str, data.x_train.shape[1:3]))
        raise UsageError(f"--encoder=conv needs images whose sides are divisible by 4; got {size} of {data.name}")
    optimizer = config.optimizer or ("adam" if config.objective == "reconstruction" else "schedule_free")
    learning_rate = CONVOLUTIONS_LEARNING_RATE if config.encoder == "conv" else LEARNING_RATES[optimizer]
    warmup_steps = len(data.x_train) // config.batch_size if optimizer == "schedule_free" else 0
    return replace(
        config,
        binarization=config.binarization or default_binarization(LIKELIHOODS[config.likelihood], config.objective),
        optimizer=optimizer,
        learning_rate=learning_rate if config.learning_rate is None else config.learning_rate,
        warmup_steps=warmup_steps if config.warmup_steps is None else config.warmup_steps,
    )


def dependent_defaults(config: Config, data: Dataset) -> dict[str, Any]:
    """Returns by name the defaults that depend on other flags and on the data, whatever values ``config`` has."""
    found = {}
    for name in ("binarization", "optimizer", "learning_rate", "warmup_steps"):
        none: dict[str, Any] = {name: None}
        found[name] = getattr(with_defaults(replace(config, **none), data), name)
    return found


if __name__ == "__main__":
    run_main(main)
