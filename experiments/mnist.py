"""A VAE with K planar layers between encoder and decoder, on images (Xu et al. 2023, section 4.2, figures 3 to 6).

    python -m experiments.mnist --flows=5

trains for 30 epochs and writes figures and figures' numbers into ``runs/``.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.flags import UsageError, flag, parse
from experiments.runs import Progress, Run, check_workdir, run_main, warn
from planar_vae_jax import objectives, training
from planar_vae_jax.binarization import BINARIZATIONS, binarize
from planar_vae_jax.data import DATASETS, Dataset, check_dataset_name, load_dataset, select_classes
from planar_vae_jax.flows import NONLINEARITIES
from planar_vae_jax.models import VAE, functional

Array = jax.Array | np.ndarray


@dataclass(frozen=True)
class Config:
    """Flags of ``experiments.mnist``."""

    flows: int = flag(5, "K, the number of planar layers; 0 is the ordinary VAE", at_least=0)
    epochs: int = flag(30, "passes over the training images", at_least=1)
    seed: int = flag(0, "everything random follows from it", at_least=0, at_most=2**32 - 1)
    workdir: str | None = flag(None, "folder for what the run writes; default runs/mnist-flows=K-seed=S")
    dataset: str = flag("auto", f"{', '.join(DATASETS)}, or FILE.npz with x_train, x_test: [N, H, W] uint8")
    data_dir: str | None = flag(None, "folder with IDX files or prepared data; default TFDS's own")
    classes: tuple[int, ...] | None = flag(None, "train and test on these labels alone, as in 3,8", at_least=0)
    objective: str = flag("elbo", "what is minimised", choices=("elbo", "reconstruction"))
    binarization: str | None = flag(None, "default: dynamic for elbo, none for reconstruction", choices=BINARIZATIONS)
    amortized: bool = flag(False, "the encoder gives each image its own flow")
    h: str = flag("tanh", "the flow's nonlinearity", choices=tuple(NONLINEARITIES))
    latent: int = flag(40, "size of z", at_least=1)
    hidden: int = flag(400, "width of the hidden layers", at_least=1)
    batch_size: int = flag(128, "images a step", at_least=1)
    learning_rate: float = flag(1e-3, "of Adam", above=0.0)
    kl_warmup: int = flag(0, "epochs over which the weight of the KL term grows from 0 to 1", at_least=0)
    energy_annealing: int = flag(
        0,
        "epochs over which the temperature of log p(x, z) grows from 0.01 to 1 (Rezende & Mohamed)",
        at_least=0,
    )
    nll_samples: int = flag(128, "importance samples an image for the test NLL", at_least=1, at_most=100_000)


class Evaluation(NamedTuple):
    """Test figures of each image, ``[N]`` each; nats but for the last two."""

    free_energy: Array
    nll: Array
    reconstruction: Array
    kl: Array
    squared_error: Array
    effective_sample_size: Array


class Model(NamedTuple):
    """The pure functions that a run is made of."""

    init: Callable[[jax.Array], Any]
    bind: Callable[[Any], VAE]
    loss: training.Loss  # (params, (pixels [B, P] uint8, temperature, kl_weight), key) -> (loss, terms by name)


def main(argv: list[str]) -> None:
    """Trains, evaluates, draws and writes; ``argv`` without the program's name."""
    started = time.perf_counter()
    config = parse(Config, argv, __doc__)
    config, data = prepare(config)
    run = Run(config, "mnist")
    keys = jax.random.split(jax.random.key(config.seed), 4)
    init_key, train_key, test_key, sample_key = keys

    model = make_model(config, pixels=data.x_train[0].size)
    train_pixels, test_pixels = (device_pixels(images, config) for images in (data.x_train, data.x_test))
    optimizer = optax.adam(config.learning_rate)
    state = training.init_state(jax.jit(model.init)(init_key), optimizer)
    state, curves, seconds_per_epoch = fit(
        config, model, optimizer, state, (train_pixels, test_pixels), (train_key, test_key), run
    )

    print(
        f"test figures over {len(test_pixels)} images, {config.nll_samples} importance samples each",
        flush=True,
    )
    evaluation = evaluate(config, model, state.params, test_pixels, test_key)
    draw(config, model, state.params, data, test_pixels, evaluation, curves, sample_key, run)
    summary = summarize(config, data, evaluation, curves)
    summary["seconds_per_epoch"] = seconds_per_epoch
    summary["seconds"] = time.perf_counter() - started
    run.finish(summary)
    report(summary)


def prepare(config: Config) -> tuple[Config, Dataset]:
    """Everything that can refuse a run, before any long work: flags, folder, data.

    Returns the config with its defaults filled in.
    """
    workdir = config.workdir or f"runs/mnist-flows={config.flows}-seed={config.seed}"
    config = dataclasses.replace(
        config,
        workdir=workdir,
        binarization=config.binarization or ("dynamic" if config.objective == "elbo" else "none"),
    )
    if config.amortized and config.flows == 0:
        raise UsageError("--amortized needs --flows of at least 1; got --flows=0")
    for name in ("kl_warmup", "energy_annealing"):
        if getattr(config, name) and config.objective != "elbo":
            raise UsageError(f"--{name} anneals the elbo; got --objective={config.objective}")
    check_dataset_name(config.dataset)
    check_workdir(workdir)
    data = load_dataset(config.dataset, config.data_dir, warn=warn)
    if config.classes is not None:
        data = select_classes(data, config.classes)
    if config.batch_size > len(data.x_train):
        raise UsageError(
            f"--batch_size must be at most the {len(data.x_train)} training images of {data.name}; "
            f"got {config.batch_size}"
        )
    return config, data


def make_model(config: Config, pixels: int) -> Model:
    """The VAE and its loss for images of ``pixels`` pixels."""
    init, bind = functional(
        lambda rngs: VAE(
            pixels,
            hidden=config.hidden,
            latent=config.latent,
            flow_length=config.flows,
            amortized=config.amortized,
            h=config.h,
            rngs=rngs,
        )
    )
    binarization = visit_binarization(config)

    def loss(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        pixels, temperature, kl_weight = batch
        terms = batch_terms(bind(params), pixels, key, binarization)
        value = terms.squared_error if config.objective == "reconstruction" else terms.annealed(temperature, kl_weight)
        shown = {"free_energy": terms.free_energy, "reconstruction": terms.reconstruction, "kl": terms.kl}
        return jnp.mean(value), jax.tree.map(jnp.mean, shown)

    return Model(init, bind, loss)


def visit_binarization(config: Config) -> str:
    """Static pixels are drawn once by :func:`device_pixels`: at a visit they are 0 or 255 already."""
    assert config.binarization is not None
    return "threshold" if config.binarization == "static" else config.binarization


def batch_terms(model: VAE, pixels: jax.Array, key: jax.Array, binarization: str) -> objectives.Terms:
    """Terms of ``pixels [B, P]`` uint8, each ``[B]``."""
    binarize_key, noise_key = jax.random.split(key)
    x = binarize(binarize_key, pixels, binarization)
    noise_keys = jax.random.split(noise_key, len(x))
    return jax.vmap(lambda x, key: objectives.free_energy(model, x, key))(x, noise_keys)


def device_pixels(images: np.ndarray, config: Config) -> jax.Array:
    """``[N, H, W]`` to ``[N, P]`` uint8 on the device; ``static`` is drawn here, the same for every seed."""
    pixels = jnp.asarray(images.reshape(len(images), -1))
    if config.binarization == "static":
        return (binarize(jax.random.key(0), pixels, "static") * 255.0).astype(jnp.uint8)
    return pixels


def fit(
    config: Config,
    model: Model,
    optimizer: optax.GradientTransformation,
    state: training.TrainState,
    pixels: tuple[jax.Array, jax.Array],
    keys: tuple[jax.Array, jax.Array],
    run: Run,
) -> tuple[training.TrainState, dict[str, list[float]], float]:
    """Trains for all epochs; each is one compiled call whose key derives from the seed and the epoch.

    Returns:
        The state; the losses by name, each with its value before the first update and after every epoch
        (``train``: first step, then epoch means; ``test``); and the median seconds of an epoch.
    """
    (train_pixels, test_pixels), (train_key, test_key) = pixels, keys

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(state, pixels, temperature, kl_weight, key):
        def loss(params, batch, key):
            return model.loss(params, (batch, temperature, kl_weight), key)

        state, info = training.run_epoch(loss, optimizer, state, pixels, key, batch_size=config.batch_size)
        return state, info.loss[0], jax.tree.map(jnp.mean, info)

    @jax.jit
    def test_loss(params, pixels, key):
        terms = map_batches(
            lambda pixels, key: batch_terms(model.bind(params), pixels, key, visit_binarization(config)),
            pixels,
            key,
            batch_size=1000,
        )
        return jnp.mean(terms.free_energy if config.objective == "elbo" else terms.squared_error)

    curves: dict[str, list[float]] = {
        "train": [],
        "test": [float(test_loss(state.params, test_pixels, test_key))],
    }
    seconds: list[float] = []
    progress = Progress(config.epochs, "epoch")
    for number in range(config.epochs):
        started = time.perf_counter()
        temperature = min(1.0, 0.01 + number / config.energy_annealing) if config.energy_annealing else 1.0
        kl_weight = min(1.0, number / config.kl_warmup) if config.kl_warmup else 1.0
        state, first_loss, info = epoch(
            state, train_pixels, temperature, kl_weight, jax.random.fold_in(train_key, number)
        )
        if number == 0:
            curves["train"].append(float(first_loss))
        curves["train"].append(float(info.loss))
        seconds.append(time.perf_counter() - started)
        curves["test"].append(float(test_loss(state.params, test_pixels, test_key)))
        train, test = curves["train"][-1], curves["test"][-1]
        run.log(
            epoch=number + 1,
            train_loss=train,
            test_loss=test,
            **{name: float(value) for name, value in info.aux.items()},
            gradient_norm=float(info.gradient_norm),
            seconds=seconds[-1],
        )
        progress.update(1, loss=train, test=test)
    progress.close()
    return state, curves, float(np.median(seconds))


def map_batches(
    function: Callable[[jax.Array, jax.Array], Any], pixels: jax.Array, key: jax.Array, *, batch_size: int
) -> Any:
    """``function(pixels [B, P], key)`` over batches of ``pixels [N, P]``, one after the other on the device.

    The last batch is filled up with images seen before, whose results are dropped: each leaf is ``[N, ...]``.
    """
    size = len(pixels)
    batch_size = min(batch_size, size)
    batches = -(-size // batch_size)
    indices = (jnp.arange(batches * batch_size) % size).reshape(batches, batch_size)
    results = jax.lax.map(lambda both: function(pixels[both[0]], both[1]), (indices, jax.random.split(key, batches)))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:size], results)


def evaluate(config: Config, model: Model, params: Any, pixels: jax.Array, key: jax.Array) -> Evaluation:
    """Test figures of every image, with a fixed key and ``config.nll_samples`` importance samples."""

    def batch(pixels: jax.Array, key: jax.Array) -> Evaluation:
        binarize_key, noise_key, nll_key = jax.random.split(key, 3)
        vae = model.bind(params)
        x = binarize(binarize_key, pixels, visit_binarization(config))
        terms = jax.vmap(lambda x, key: objectives.free_energy(vae, x, key))(x, jax.random.split(noise_key, len(x)))
        nll, effective = jax.vmap(lambda x, key: objectives.importance_nll(vae, x, key, samples=config.nll_samples))(
            x, jax.random.split(nll_key, len(x))
        )
        return Evaluation(terms.free_energy, nll, terms.reconstruction, terms.kl, terms.squared_error, effective)

    # About 16,000 decoder outputs at a time.
    batch_size = max(1, 16_000 // config.nll_samples)
    compiled = jax.jit(functools.partial(map_batches, batch, batch_size=batch_size))
    return jax.tree.map(np.asarray, compiled(pixels, key))


def summarize(config: Config, data: Dataset, evaluation: Evaluation, curves: dict[str, list[float]]) -> dict[str, Any]:
    """The contents of ``summary.json``; losses in nats an image."""

    def means(rows: Any = slice(None)) -> dict[str, float]:
        return {name: float(np.mean(values[rows], dtype=np.float64)) for name, values in evaluation._asdict().items()}

    labels = np.zeros(0) if data.y_test is None else data.y_test
    return {
        "dataset": data.name,
        "source": data.source,
        "binarization": config.binarization,
        "flows": config.flows,
        "epochs": config.epochs,
        "seed": config.seed,
        "objective": config.objective,
        "amortized": config.amortized,
        "classes": config.classes,
        "train_images": len(data.x_train),
        "test_images": len(data.x_test),
        "nll_samples": config.nll_samples,
        "train": {"first_loss": curves["train"][0], "final_loss": curves["train"][-1]},
        "test": means(),
        "per_class": {
            str(label): {"images": int(np.sum(labels == label)), **means(labels == label)}
            for label in np.unique(labels)
        },
    }


def draw(
    config: Config,
    model: Model,
    params: Any,
    data: Dataset,
    test_pixels: jax.Array,
    evaluation: Evaluation,
    curves: dict[str, list[float]],
    key: jax.Array,
    run: Run,
) -> None:
    """Figures 3 to 6 of the paper, samples from the prior, and the loss by class."""
    from planar_vae_jax import plotting

    setting = f"{data.name}, K = {config.flows}, {config.epochs} epochs"
    loss_name = "free energy (nats per image)" if config.objective == "elbo" else "squared error per image"
    shape = data.x_test.shape[1:]
    choice, captions = choose_images(data)
    originals = data.x_test[choice] / 255.0
    run.save_figure(
        "reconstructions.png",
        plotting.image_rows(
            {
                "original": originals,
                "reconstruction": reconstruct(config, model, params, test_pixels[choice]).reshape(-1, *shape),
            },
            title=f"Test images and their reconstructions\n({setting})",
            columns=captions,
        ),
    )
    run.save_figure(
        "loss.png",
        plotting.loss_curves(
            np.arange(config.epochs + 1),
            {name: np.asarray(values) for name, values in curves.items()},
            title=f"Loss ({setting})",
            ylabel=loss_name,
        ),
    )
    run.save_figure(
        "samples.png",
        plotting.image_grid(
            np.asarray(sample_prior(config, model, params, key, 100)).reshape(-1, *shape),
            columns=10,
            title=f"Pixel means decoded from the prior\n({setting})",
        ),
    )
    if data.y_test is not None:
        values = evaluation.free_energy if config.objective == "elbo" else evaluation.squared_error
        by_class = {str(label): float(np.mean(values[data.y_test == label])) for label in np.unique(data.y_test)}
        run.save_figure(
            "classes.png",
            plotting.class_losses(by_class, title=f"Test loss by class\n({setting})", label=loss_name),
        )


def choose_images(data: Dataset) -> tuple[np.ndarray, list[str]]:
    """Indices into the test images, one of each class (at most 20); ten spread evenly where there are no labels."""
    if data.y_test is None:
        return np.linspace(0, len(data.x_test) - 1, min(10, len(data.x_test))).astype(int), []
    labels, indices = np.unique(data.y_test, return_index=True)
    return indices[:20], [str(label) for label in labels[:20]]


def reconstruct(config: Config, model: Model, params: Any, pixels: jax.Array) -> np.ndarray:
    """Pixel means ``[B, P]`` decoded from the posterior's mean sent through the flow; ``pixels [B, P]`` uint8."""

    @jax.jit
    def decode(params, pixels):
        vae = model.bind(params)
        x = binarize(jax.random.key(0), pixels, visit_binarization(config))

        def one(x):
            mean, _, flow = vae.encode(x)
            zK, _ = objectives.planar_flow(flow, mean, h=vae.h)
            return jax.nn.sigmoid(vae.decode(zK))

        return jax.vmap(one)(x)

    return np.asarray(decode(params, pixels))


def sample_prior(config: Config, model: Model, params: Any, key: jax.Array, count: int) -> jax.Array:
    """Pixel means ``[count, P]`` decoded from ``z_K ~ N(0, I)``."""
    z = jax.random.normal(key, (count, config.latent))
    return jax.jit(lambda params: jax.nn.sigmoid(jax.vmap(model.bind(params).decode)(z)))(params)


def report(summary: dict[str, Any]) -> None:
    """Prints the test figures, over all and by class."""
    names = ("free_energy", "nll", "reconstruction", "kl", "squared_error")
    print(f"{'test':>8} {'images':>7} " + " ".join(f"{name:>15}" for name in names))
    rows = {"all": {"images": summary["test_images"], **summary["test"]}, **summary["per_class"]}
    for label, row in rows.items():
        print(f"{label:>8} {row['images']:>7} " + " ".join(f"{row[name]:>15.3f}" for name in names))


if __name__ == "__main__":
    run_main(main)
