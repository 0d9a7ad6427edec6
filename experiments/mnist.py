"""A VAE with K planar layers between encoder and decoder, on images (Xu et al. 2023, section 4.2, figures 3 to 6).

    python -m experiments.mnist --flows=5

trains for 30 epochs and writes figures and figures' numbers into ``runs/``. A run that was stopped goes on when the
same command is run again; ``--workdir=DIR --eval_only`` draws the figures of a run again.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.fitting import Course, fit, load
from experiments.flags import UsageError, flag
from experiments.resuming import ResumableRun, RunFlags, data_identity, default_workdir, open_run, parse_run
from experiments.runs import run_main, warn
from planar_vae_jax import objectives, training
from planar_vae_jax.binarization import BINARIZATIONS, binarize
from planar_vae_jax.data import DATASETS, Dataset, check_dataset_name, load_dataset, select_classes
from planar_vae_jax.flows import NONLINEARITIES
from planar_vae_jax.models import VAE, functional

Array = jax.Array | np.ndarray


@dataclass(frozen=True)
class Config(RunFlags):
    """Flags of ``experiments.mnist``."""

    EVALUATION_FLAGS: ClassVar = ("nll_samples",)  # may be others with --eval_only

    flows: int = flag(5, "K, the number of planar layers; 0 is the ordinary VAE", at_least=0, at_most=10_000)
    epochs: int = flag(
        30,
        "passes over the training images; more than before make a run longer",
        at_least=1,
        at_most=1_000_000,
        identity=False,
    )
    seed: int = flag(0, "everything random follows from it", at_least=0, at_most=2**32 - 1)
    workdir: str | None = flag(
        None, "folder for what the run writes; default runs/mnist-..., named after the flags", identity=False
    )
    dataset: str = flag("auto", f"{', '.join(DATASETS)}, or FILE.npz with x_train, x_test: [N, H, W] uint8")
    data_dir: str | None = flag(None, "folder with IDX files or prepared data; default TFDS's own", identity=False)
    classes: tuple[int, ...] | None = flag(None, "train and test on these labels alone, as in 3,8", at_least=0)
    objective: str = flag("elbo", "what is minimised", choices=("elbo", "reconstruction"))
    binarization: str | None = flag(None, "default: dynamic for elbo, none for reconstruction", choices=BINARIZATIONS)
    amortized: bool = flag(False, "the encoder gives each image its own flow")
    h: str = flag("tanh", "the flow's nonlinearity", choices=tuple(NONLINEARITIES))
    latent: int = flag(40, "size of z", at_least=1, at_most=100_000)
    hidden: int = flag(400, "width of the hidden layers", at_least=1, at_most=100_000)
    batch_size: int = flag(128, "images a step", at_least=1)
    learning_rate: float = flag(1e-3, "of Adam", above=0.0, at_most=1e30)
    clip_norm: float = flag(
        0.0, "a gradient whose norm is greater is scaled down to it; 0: none is", at_least=0.0, at_most=1e30
    )
    kl_warmup: int = flag(0, "epochs over which the weight of the KL term grows from 0 to 1", at_least=0)
    energy_annealing: int = flag(
        0,
        "epochs over which the temperature of log p(x, z) grows from 0.01 to 1 (Rezende & Mohamed)",
        at_least=0,
    )
    prng: str = flag(
        "threefry2x32",
        "of all random numbers; threefry2x32: the same on every device; rbg, unsafe_rbg: the device's own generator, "
        "for accelerators where threefry's share of a step shows; unsafe_rbg also splits keys without safeguards",
        choices=("threefry2x32", "rbg", "unsafe_rbg"),
    )
    nll_samples: int = flag(128, "importance samples an image for the test NLL", at_least=1, at_most=100_000)
    checkpoint_every: int = flag(1, "epochs between checkpoints; there is one at the end", at_least=1, identity=False)


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
    config = prepare(parse_run(Config, argv, __doc__))
    with open_run(config, "mnist") as run:
        if not run.finished:
            data = load_data(config)
            run.begin(data_identity(data))
            carry_out(config, data, run)


def prepare(config: Config) -> Config:
    """Checks the flags against each other and fills in the defaults."""
    if config.amortized and config.flows == 0:
        raise UsageError("--amortized needs --flows of at least 1; got --flows=0")
    for name in ("kl_warmup", "energy_annealing"):
        if getattr(config, name) and config.objective != "elbo":
            raise UsageError(f"--{name} anneals the elbo; got --objective={config.objective}")
    check_dataset_name(config.dataset)
    return dataclasses.replace(
        config,
        workdir=config.workdir or default_workdir(config, "mnist", "flows", "seed"),
        binarization=config.binarization or ("dynamic" if config.objective == "elbo" else "none"),
    )


def load_data(config: Config) -> Dataset:
    """The images that are asked for."""
    data = load_dataset(config.dataset, config.data_dir, warn=warn)
    if config.classes is not None:
        data = select_classes(data, config.classes)
    if config.batch_size > len(data.x_train):
        raise UsageError(
            f"--batch_size must be at most the {len(data.x_train)} training images of {data.name}; "
            f"got {config.batch_size}"
        )
    return data


def carry_out(config: Config, data: Dataset, run: ResumableRun) -> None:
    """Trains, or with ``--eval_only`` loads; then evaluates, draws and writes."""
    init_key, train_key, test_key, sample_key = jax.random.split(jax.random.key(config.seed, impl=config.prng), 4)
    model = make_model(config, pixels=data.x_train[0].size)
    train_pixels, test_pixels = (device_pixels(images, config) for images in (data.x_train, data.x_test))
    optimizer = make_optimizer(config)
    epoch = compile_epoch(config, model, optimizer, train_pixels)
    state = training.init_state(jax.jit(model.init)(init_key), optimizer)
    info = epoch.info(state)
    course = make_course(config, model, epoch, state.params, (test_pixels, test_key))
    if config.eval_only:
        fitted = load(course, state, info, train_key, run, config.checkpoint)
        config = dataclasses.replace(config, epochs=len(fitted.lines))
    else:
        fitted = fit(course, state, info, train_key, run)

    print(
        f"test figures over {len(test_pixels)} images ({pixels_as(config)}), "
        f"{config.nll_samples} importance samples each",
        flush=True,
    )
    params, curves = fitted.state.params, loss_curves(fitted.lines)
    evaluation = evaluate(config, model, params, test_pixels, test_key)
    draw(config, model, params, data, test_pixels, evaluation, curves, sample_key, run)
    summary = summarize(config, data, evaluation, curves)
    summary["seconds_per_epoch"] = float(np.median([line["seconds"] for line in fitted.lines]))
    summary["seconds"] = run.seconds()
    run.finish(summary)
    report(summary)


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


def pixels_as(config: Config) -> str:
    """What stands behind every figure, in words."""
    return "grey levels" if config.binarization == "none" else f"{config.binarization} binarisation"


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


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Adam, after clipping if asked for."""
    adam = optax.adam(config.learning_rate)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam) if config.clip_norm else adam


class Epoch(NamedTuple):
    """The compiled parts of an epoch over the training images."""

    steps: int
    start: Callable[[jax.Array, int], Any]  # (the run's key, the epoch's number) -> what `piece` is given
    piece: Callable[..., tuple[training.TrainState, training.StepInfo, jax.Array]]  # (start(), state, info, from, to)
    means: Callable[[training.StepInfo], training.StepInfo]  # over the steps of the epoch
    info: Callable[[training.TrainState], training.StepInfo]  # of an epoch before its first step
    pixels: Callable[[Any, int], dict[str, Any]]  # (start(), step) -> that step's batch


def compile_epoch(config: Config, model: Model, optimizer: optax.GradientTransformation, pixels: jax.Array) -> Epoch:
    """An epoch over ``pixels [N, P]`` uint8, whose key derives from the run's and the epoch's number."""
    size, batch_size = len(pixels), config.batch_size

    @jax.jit
    def order(key, number):
        return training.epoch_order(jax.random.fold_in(key, number), size, batch_size)

    def start(key: jax.Array, number: int) -> Any:
        temperature = min(1.0, 0.01 + number / config.energy_annealing) if config.energy_annealing else 1.0
        kl_weight = min(1.0, number / config.kl_warmup) if config.kl_warmup else 1.0
        return *order(key, number), (temperature, kl_weight)

    def loss(pixels, weights):
        return training.indexed(lambda params, batch, key: model.loss(params, (batch, *weights), key), pixels)

    # The pixels are an argument: as a constant they would be compiled in. Nothing is donated (see run_pieces).
    @jax.jit
    def piece(pixels, data, state, info, start, stop):
        indices, key, weights = data
        return training.run_piece(loss(pixels, weights), optimizer, state, info, indices, key, start, stop)

    def empty(state: training.TrainState) -> training.StepInfo:
        indices, key, weights = start(jax.random.key(0), 0)
        return training.empty_info(loss(pixels, weights), optimizer, state, indices, key)

    def batch(data: Any, step: int) -> dict[str, Any]:
        indices, key, _ = data
        return {"indices": indices[step], "pixels": pixels[indices[step]], "epoch_key": jax.random.key_data(key)}

    return Epoch(
        size // batch_size,
        start,
        functools.partial(piece, pixels),
        jax.jit(lambda info: jax.tree.map(jnp.mean, info)),
        empty,
        batch,
    )


def make_course(
    config: Config, model: Model, epoch: Epoch, initial_params: Any, test: tuple[jax.Array, jax.Array]
) -> Course:
    """The training as epochs, each with its test loss; ``test`` are the test pixels and the key of that loss."""

    @jax.jit
    def compiled(params, pixels, key):
        terms = map_batches(
            lambda pixels, key: batch_terms(model.bind(params), pixels, key, visit_binarization(config)),
            pixels,
            key,
            batch_size=1000,
        )
        return jnp.mean(terms.free_energy if config.objective == "elbo" else terms.squared_error)

    def metrics(number: int, state: training.TrainState, info: training.StepInfo) -> dict[str, Any]:
        means = epoch.means(info)
        line = {
            "epoch": number + 1,
            "train_loss": float(means.loss),
            "test_loss": float(compiled(state.params, *test)),
            **{name: float(value) for name, value in means.aux.items()},
            "gradient_norm": float(means.gradient_norm),
        }
        if number == 0:  # where the curves begin
            line["first_train_loss"] = float(info.loss[0])
            line["first_test_loss"] = float(compiled(initial_params, *test))
        return line

    return Course(
        name="epoch",
        units=config.epochs,
        span=lambda _: (0, epoch.steps),
        data=lambda number, key: epoch.start(key, number),
        piece=epoch.piece,
        batch=epoch.pixels,
        report=metrics,
        score="test_loss",
        shown={"loss": "train_loss", "test": "test_loss"},
        units_per_checkpoint=config.checkpoint_every,
    )


def loss_curves(lines: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The losses by name, each with its value before the first update and after every epoch (``train``: first step,
    then epoch means; ``test``)."""

    def value(number: float | None) -> float:
        return np.nan if number is None else number

    return {
        name: [value(line) for line in (lines[0][f"first_{name}_loss"], *(line[f"{name}_loss"] for line in lines))]
        for name in ("train", "test")
    }


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
    run: ResumableRun,
) -> None:
    """Figures 3 to 6 of the paper, samples from the prior, and the loss by class."""
    from planar_vae_jax import plotting

    setting = f"{data.name}, {pixels_as(config)}, K = {config.flows}, {config.epochs} epoch{'s' * (config.epochs > 1)}"
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
            {
                "train (first step, then mean over each epoch)": np.asarray(curves["train"]),
                "test (before, then after each epoch)": np.asarray(curves["test"]),
            },
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
