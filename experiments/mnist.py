"""A VAE with K planar layers between encoder and decoder, on images (Xu et al. 2023, section 4.2, figures 3 to 6).

    python -m experiments.mnist --flows=5

trains for 30 epochs (on MNIST about two minutes on two CPU cores) and writes figures and their numbers into ``runs/``.
To reach on MNIST, nats an image: free energy 96.0 with K = 5, 96.5 with K = 0. ``--objective=reconstruction
--latent=20`` draws the paper's loss curve: 204 at first, 5.3 at last (the paper: "over 200 ... plateauing around 6").

A run that was stopped goes on with the same command; ``--workdir=DIR --eval_only`` draws the figures of a run again.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments.mnist_flags import Config, check_data, check_flags, with_defaults
from planar_vae_jax import evaluation, latent
from planar_vae_jax.data import Dataset, is_binary
from planar_vae_jax.evaluation import Images
from planar_vae_jax.flagged_data import load_images
from planar_vae_jax.likelihoods import measured
from planar_vae_jax.load import vae_from_flags
from planar_vae_jax.losses import vae_loss
from planar_vae_jax.models import VAE
from planar_vae_jax.optimizers import make_optimizer
from planar_vae_jax.pages import describe, draw_losses, draw_pages
from planar_vae_jax.placement import Placement
from planar_vae_jax.runs.config import parse_run
from planar_vae_jax.runs.console import print_table, run_main, warn
from planar_vae_jax.runs.devices import Devices, choose_devices
from planar_vae_jax.runs.files import read_json
from planar_vae_jax.runs.fit import fit
from planar_vae_jax.runs.folder import open_run
from planar_vae_jax.streaming import Streamed

SHOWN = ("free_energy", "nll", "reconstruction", "kl", "squared_error", "effective_sample_size")
FLAGS = (
    "flows",
    "seed",
    "objective",
    "train_samples",
    "amortized",
    "likelihood",
    "posterior",
    "encoder",
    "classes",
    "nll_samples",
    "patience",
)  # in the summary
# One object for the same arguments: runs in one process share what is compiled.
shared_loss, shared_optimizer = functools.cache(vae_loss), functools.cache(make_optimizer)


def main(argv: list[str]) -> None:
    """Trains, evaluates, draws and writes; ``argv`` without the program's name."""
    config = parse_run(Config, argv, __doc__, "mnist")
    check_flags(config)
    notes: list[str] = []
    data, identity = load_images(config.dataset, config.data_dir, config.classes, config.validation, notes.append)
    train(config, data, identity, notes)


def train(
    config: Config, data: Dataset, identity: dict[str, Any], notes: Sequence[str] = (), devices: Devices | None = None
) -> dict[str, Any]:
    """One run, to its end; returns its summary. ``notes``: said of its data; ``devices``: instead of ``--devices``."""
    config = with_defaults(config, check_data(config, data))
    binarization = config.binarization
    devices = devices or choose_devices(config, config.batch_size)
    placed = Placement(data, binarization, devices, config.batch_size, config.device_memory)
    with open_run(config, "mnist", identity, devices) as run:
        if run.finished:
            return read_json(run.workdir / "summary.json") or {}
        for note in notes if run.new else ():
            warn(note)

        print(f"images on each device: {placed}", flush=True)
        vae, training, test, split = prepare(config, data, placed)
        fitted = fit(run, **begin(vae, config), **training)
        params, lines = fitted.params, fitted.lines
        print(f"test figures over {len(data.x_test)} images, {config.nll_samples} importance samples each", flush=True)
        print(f"nats are of {measured(config.likelihood, binarization)}", flush=True)
        evaluate, everywhere = devices.under(evaluation.evaluate), devices.replicate(params)
        figures = evaluate(vae, everywhere, test, nll_samples=config.nll_samples)
        test = devices.local(test)
        overall, by_class = evaluation.means(figures), evaluation.means_by_class(figures, data.y_test)
        if config.likelihood == "logistic":
            dims = math.prod(vae.image_shape)
            overall = evaluation.with_bits_per_dim(overall, dims)
            by_class = {label: evaluation.with_bits_per_dim(row, dims) for label, row in by_class.items()}
        units = latent.active_units(latent.latent_units(vae, params, test))
        setting = describe(
            data.name, binarization, vae, fitted.epoch, config.objective, config.classes, binary=is_binary(data)
        )
        draw_pages(run.save_figure, vae, params, data, test, setting, config.objective)
        draw_losses(run.save_figure, data.y_test, figures, lines, split, setting, config.objective)
        summary: dict[str, Any] = {
            "dataset": data.name,
            "source": data.source,
            "binarization": binarization,
            "nats_of": measured(config.likelihood, binarization),
            "epochs": len(lines),
            **({"stopped_early": fitted.stopped_early, "best_epoch": fitted.epoch} if config.patience else {}),
            **{name: getattr(config, name) for name in FLAGS},
            "train_images": len(data.x_train),
            "validation_images": 0 if data.x_valid is None else len(data.x_valid),
            "test_images": len(data.x_test),
            "train": {"first_loss": lines[0].get("first_train_loss"), "final_loss": lines[-1].get("train_loss")},
            "test": overall,
            "nll_by_samples": evaluation.nll_by_samples(figures, config.nll_samples),
            "per_class": by_class,
            "active_units": units,
            "seconds_per_epoch": float(np.median([line["seconds"] for line in lines if line])),
            "seconds": run.seconds(),
        }
        run.finish(summary)
        print_table({"all": {"images": len(data.x_test), **overall}, **by_class}, shown(config.likelihood))
        by_samples = (f"{nll:.2f} by {count}" for count, nll in summary["nll_by_samples"].items())
        print(f"nll by importance samples: {', '.join(by_samples)}")
        print(
            f"active units: {units['count']} of {vae.latent} (the mean of z_K varies by more than {units['threshold']})"
        )
        return summary


def prepare(config: Config, data: Dataset, placed: Placement) -> tuple[VAE, dict[str, Any], Images | Streamed, str]:
    """What runs with other seeds have in common: the architecture, arguments of :func:`fit`, the test images, and the
    split whose loss is shown while learning."""
    steps_per_epoch, binarization = check_data(config, data), config.binarization
    vae = vae_from_flags(dataclasses.asdict(config), data.x_train.shape[1:])
    loss = shared_loss(
        vae,
        config.objective,
        binarization,
        train_samples=config.train_samples,
        kl_warmup_steps=config.kl_warmup * steps_per_epoch,
        annealing_steps=config.energy_annealing * steps_per_epoch,
    )
    optimizer = shared_optimizer(
        config.optimizer,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )
    test, validation = placed.test(), placed.valid()
    split, watched = ("test", test) if validation is None else ("validation", validation)
    training = {
        "loss": loss,
        "optimizer": optimizer,
        "steps": config.epochs * steps_per_epoch,
        "steps_per_epoch": steps_per_epoch,
        "data": placed.train(),
        "batch_size": config.batch_size,
        "report": lambda params: evaluation.mean_loss(
            vae, params, watched, config.objective, split, config.train_samples
        ),
        "score": None if split == "test" else "validation_loss",
        "patience": config.patience,
        "show": ("train_loss", f"{split}_loss"),
    }
    return vae, training, test, split


def shown(likelihood: str) -> tuple[str, ...]:
    """Names of the figures in tables."""
    return (*SHOWN, "bits_per_dim") if likelihood == "logistic" else SHOWN


def begin(vae: VAE, config: Config) -> dict[str, Any]:
    """What follows from the seed: the arguments of :func:`fit` that :func:`prepare` leaves open."""
    init_key, train_key = jax.random.split(jax.random.key(config.seed, impl=config.prng))
    return {"params": vae.init(init_key), "key": train_key}


if __name__ == "__main__":
    run_main(main)
