"""A VAE with K planar layers between encoder and decoder, on images (Xu et al. 2023, section 4.2, figures 3 to 6).

    python -m experiments.mnist --flows=5

trains for 30 epochs (on MNIST about two minutes on two CPU cores) and writes figures and their numbers into ``runs/``.
To reach on MNIST, nats an image: free energy 96.0 with K = 5, 96.5 with K = 0. ``--objective=reconstruction
--latent=20`` draws the paper's loss curve: 204 at first, 5.3 at last (the paper: "over 200 ... plateauing around 6").

A run that was stopped goes on by the same command; ``--workdir=DIR --eval_only`` draws the figures of a run again.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from planar_vae_jax import evaluation, plotting
from planar_vae_jax.binarization import BINARIZATIONS
from planar_vae_jax.data import (
    DATASETS,
    ArgumentError,
    DataError,
    Dataset,
    dataset_identity,
    examples,
    hold_out,
    load_dataset,
    select_classes,
)
from planar_vae_jax.evaluation import Figures, Images, fixed_images
from planar_vae_jax.load import default_binarization
from planar_vae_jax.losses import vae_loss
from planar_vae_jax.models import VAE
from planar_vae_jax.nonlinearities import NONLINEARITIES
from planar_vae_jax.optimizers import LEARNING_RATES, OPTIMIZERS, make_optimizer
from planar_vae_jax.precision import PRECISIONS
from planar_vae_jax.runs.config import UsageError, flag, parse_run
from planar_vae_jax.runs.console import print_table, run_main, warn
from planar_vae_jax.runs.devices import DeviceFlags, choose_devices
from planar_vae_jax.runs.files import RunError
from planar_vae_jax.runs.fit import fit
from planar_vae_jax.runs.folder import RunFolder, open_run

SHOWN = ("free_energy", "nll", "reconstruction", "kl", "squared_error")
AS_FLAG = (" a data_dir", " --data_dir")  # the library's advice names its argument; of equal length, for boxes


@dataclass(frozen=True)
class Config(DeviceFlags):
    """Flags of ``experiments.mnist``."""

    flows: int = flag(5, "K, the number of planar layers; 0: an ordinary VAE", at_least=0, at_most=10_000, named=True)
    epochs: int = flag(30, "passes over the training images; more go on", at_least=1, at_most=10**6, resumable=True)
    seed: int = flag(0, "everything random follows from it", at_least=0, at_most=2**32 - 1, named=True)
    dataset: str = flag("auto", f"{', '.join(DATASETS)}, or FILE.npz with x_train, x_test: [N, H, W] uint8")
    data_dir: str | None = flag(None, "folder with IDX files or prepared data; default TFDS's own", resumable=True)
    classes: tuple[int, ...] | None = flag(None, "train and test on these labels alone, as in 3,8", at_least=0)
    validation: int = flag(0, "training images held out, by which the best checkpoint is chosen", at_least=0)
    objective: str = flag("elbo", "what is minimised", choices=("elbo", "reconstruction"))
    binarization: str = flag(None, "default: dynamic for elbo, none for reconstruction", choices=BINARIZATIONS)
    amortized: bool = flag(False, "the encoder gives each image its own flow")
    h: str = flag("tanh", "the flow's nonlinearity", choices=tuple(NONLINEARITIES))
    latent: int = flag(40, "size of z", at_least=1, at_most=100_000)
    hidden: int = flag(400, "width of the hidden layers", at_least=1, at_most=100_000)
    batch_size: int = flag(128, "images a step", at_least=1)
    optimizer: str = flag(
        None, "default: schedule_free; adam for reconstruction", choices=OPTIMIZERS, default_before="adam"
    )
    learning_rate: float = flag(
        None, "default: 8e-3 for schedule_free, 1e-3 for adam", above=0.0, at_most=1e30, default_before=1e-3
    )
    warmup_steps: int = flag(
        None, "of the learning rate; default: an epoch for schedule_free, 0 for adam", at_least=0, default_before=0
    )
    weight_decay: float = flag(0.0, "decoupled from the gradient", at_least=0.0, at_most=1e30)
    clip_norm: float = flag(0.0, "scales gradients of a greater norm down to it; 0: none", at_least=0.0, at_most=1e30)
    kl_warmup: int = flag(0, "epochs over which the weight of the KL term grows from 0 to 1", at_least=0)
    energy_annealing: int = flag(
        0, "epochs over which the temperature of log p(x, z) grows from 0.01 to 1 (Rezende & Mohamed)", at_least=0
    )
    prng: str = flag(
        "threefry2x32",
        "of the training's random numbers; threefry2x32: the same anywhere; rbg, unsafe_rbg: the device's generator",
        choices=("threefry2x32", "rbg", "unsafe_rbg"),
    )
    precision: str = flag("float32", "of encoder and decoder; all else is float32", choices=PRECISIONS)
    nll_samples: int = flag(128, "importance samples an image of the NLL", at_least=1, at_most=100_000, evaluation=True)


def main(argv: list[str]) -> None:
    """Trains, evaluates, draws and writes; ``argv`` without the program's name."""
    config = parse_run(Config, argv, __doc__, "mnist")
    check_flags(config)
    notes: list[str] = []
    data, identity = load_images(config.dataset, config.data_dir, config.classes, config.validation, notes.append)
    steps_per_epoch = len(data.x_train) // config.batch_size
    if steps_per_epoch == 0:
        size = f"{len(data.x_train)} training images of {data.name}"
        raise UsageError(f"--batch_size must be at most the {size}; got {config.batch_size}")

    config = with_defaults(config, steps_per_epoch)
    binarization = config.binarization
    devices = choose_devices(config, config.batch_size)
    with open_run(config, "mnist", identity, devices) as run:
        if run.finished:
            return
        for note in notes if run.new else ():
            warn(note)

        vae = VAE(
            data.x_train.shape[1:],
            latent=config.latent,
            hidden=config.hidden,
            flow_length=config.flows,
            amortized=config.amortized,
            h=config.h,
            precision=config.precision,
        )
        init_key, train_key = jax.random.split(jax.random.key(config.seed, impl=config.prng))
        loss = vae_loss(
            vae,
            config.objective,
            binarization,
            kl_warmup_steps=config.kl_warmup * steps_per_epoch,
            annealing_steps=config.energy_annealing * steps_per_epoch,
        )
        optimizer = make_optimizer(
            config.optimizer,
            learning_rate=config.learning_rate,
            warmup_steps=config.warmup_steps,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
        )
        images = data.x_train  # static ones are drawn here, once and for every seed the same
        if binarization == "static":
            images = np.asarray(fixed_images(images, data.train_index, "train", binarization).pixels)
        test = devices.replicate(fixed_images(data.x_test, data.test_index, "test", binarization))
        validation = None
        if data.x_valid is not None and data.valid_index is not None:
            validation = fixed_images(data.x_valid, data.valid_index, "valid", binarization)
        split, watched = ("test", test) if validation is None else ("validation", devices.replicate(validation))

        fitted = fit(
            run,
            loss,
            optimizer,
            vae.init(init_key),
            train_key,
            steps=config.epochs * steps_per_epoch,
            steps_per_epoch=steps_per_epoch,
            data=images,
            batch_size=config.batch_size,
            report=lambda params: evaluation.mean_loss(vae, params, watched, config.objective, split),
            score=None if validation is None else "validation_loss",
            show=("train_loss", f"{split}_loss"),
        )

        params, lines = fitted.params, fitted.lines
        print(f"test figures over {len(data.x_test)} images, {config.nll_samples} importance samples each", flush=True)
        evaluate, everywhere = devices.under(evaluation.evaluate), devices.replicate(params)
        figures = evaluate(vae, everywhere, test, nll_samples=config.nll_samples)
        setting = describe(data.name, binarization, vae, len(lines), config.objective, config.classes)
        draw_images(run, vae, params, data, devices.local(test), setting, config.objective)
        draw_losses(run, data.y_test, figures, lines, split, setting, config.objective)
        summary: dict[str, Any] = {
            "dataset": data.name,
            "source": data.source,
            "binarization": binarization,
            "flows": config.flows,
            "epochs": len(lines),
            "seed": config.seed,
            "objective": config.objective,
            "amortized": config.amortized,
            "classes": config.classes,
            "train_images": len(data.x_train),
            "validation_images": 0 if data.x_valid is None else len(data.x_valid),
            "test_images": len(data.x_test),
            "nll_samples": config.nll_samples,
            "train": {"first_loss": lines[0].get("first_train_loss"), "final_loss": lines[-1].get("train_loss")},
            "test": evaluation.means(figures),
            "per_class": evaluation.means_by_class(figures, data.y_test),
            "seconds_per_epoch": float(np.median([line["seconds"] for line in lines if line])),
            "seconds": run.seconds(),
        }
        run.finish(summary)
        print_table({"all": {"images": len(data.x_test), **summary["test"]}, **summary["per_class"]}, SHOWN)


def check_flags(config: Config) -> None:
    """Checks the flags against each other."""
    if config.amortized and config.flows == 0:
        raise UsageError("--amortized needs --flows of at least 1; got --flows=0")
    for name in ("kl_warmup", "energy_annealing"):
        if getattr(config, name) and config.objective != "elbo":
            raise UsageError(f"--{name} anneals the elbo; got --objective={config.objective}")
    try:
        plotting.check_figures()
    except ImportError as error:
        raise RunError(str(error)) from error


def with_defaults(config: Config, steps_per_epoch: int) -> Config:
    """The defaults that depend on other flags."""
    optimizer = config.optimizer or ("adam" if config.objective == "reconstruction" else "schedule_free")
    warmup_steps = steps_per_epoch if optimizer == "schedule_free" else 0
    return dataclasses.replace(
        config,
        binarization=config.binarization or default_binarization(config.objective),
        optimizer=optimizer,
        learning_rate=LEARNING_RATES[optimizer] if config.learning_rate is None else config.learning_rate,
        warmup_steps=warmup_steps if config.warmup_steps is None else config.warmup_steps,
    )


def load_images(
    name: str, data_dir: str | None, classes: tuple[int, ...] | None, validation: int, warn: Callable[[str], None]
) -> tuple[Dataset, dict[str, Any]]:
    """The images that are asked for, and what tells them from others."""
    try:
        data = load_dataset(name, data_dir, warn=lambda text: warn(text.replace(*AS_FLAG)))
        if classes is not None:
            data = select_classes(data, classes)
        return hold_out(data, validation) if validation else data, dataset_identity(data)
    except ArgumentError as error:  # it names the argument, which is the flag
        raise UsageError(f"--{error}") from error
    except DataError as error:
        raise UsageError(str(error).replace(*AS_FLAG)) from error


def describe(
    name: str, binarization: str, vae: VAE, epochs: int, objective: str, classes: tuple[int, ...] | None
) -> str:
    """What tells this run's figures from another's."""
    parts = [
        f"{name} classes {','.join(map(str, classes))}" if classes else name,
        "grey levels" if binarization == "none" else f"{binarization} binarisation",
        f"K = {vae.flow_length}{' amortised' * vae.amortized}{f' {vae.h}' * (vae.h != 'tanh')}",
        *(["squared error, no KL"] if objective == "reconstruction" else []),
        f"{epochs} epoch{'s' * (epochs > 1)}",
    ]
    return ", ".join(parts)


def draw_images(
    run: RunFolder, vae: VAE, params: Any, data: Dataset, test: Images, setting: str, objective: str
) -> None:
    """Figures 3 and 4 of the paper, and samples from the prior."""
    chosen, captions = examples(data)
    rows = {
        "original": data.x_test[chosen] / 255.0,
        "reconstruction": np.asarray(evaluation.reconstruct(vae, params, test.pixels[chosen])),
    }
    title = f"Test images and their reconstructions\n({setting})"
    run.save_figure("reconstructions.png", plotting.image_rows(rows, title=title, columns=captions))
    samples = evaluation.sample_prior(vae, params, jax.random.key(0), 100)
    title = f"Pixel means decoded from the prior\n({setting})"
    if objective == "reconstruction":
        title += "\nno KL term was trained, so the prior is not where the codes are"
    run.save_figure("samples.png", plotting.image_grid(np.asarray(samples), columns=10, title=title))


def draw_losses(
    run: RunFolder,
    labels: np.ndarray | None,
    figures: Figures,
    lines: list[dict[str, Any]],
    split: str,
    setting: str,
    objective: str,
) -> None:
    """Figures 5 and 6 of the paper (loss curves with the first iteration and without), and the test loss by class."""
    label = "squared error per image" if objective == "reconstruction" else "free energy (nats per image)"
    curves = {
        f"{name} {when}": np.array(
            [lines[0].get(f"first_{name}_loss"), *(line.get(f"{name}_loss") for line in lines)], np.float64
        )
        for name, when in (
            ("train", "(first step, then mean over each epoch)"),
            (split, "(before, then after each epoch)"),
        )
    }
    figure = plotting.loss_curves(np.arange(len(lines) + 1), curves, title=f"Loss ({setting})", ylabel=label)
    run.save_figure("loss.png", figure)
    if labels is not None:
        name = "squared_error" if objective == "reconstruction" else "free_energy"
        rows = evaluation.means_by_class(figures, labels)
        figure = plotting.class_losses(
            {key: row[name] for key, row in rows.items()},
            title=f"Test loss by class\n({setting})",
            label=label,
            errors={key: np.nan if row[f"{name}_se"] is None else row[f"{name}_se"] for key, row in rows.items()},
        )
        run.save_figure("classes.png", figure)


if __name__ == "__main__":
    run_main(main)
