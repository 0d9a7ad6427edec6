"""The flags of ``experiments.mnist``: each alone, against each other and against the data."""

import dataclasses
from dataclasses import dataclass

from planar_vae_jax import plotting
from planar_vae_jax.binarization import BINARIZATIONS
from planar_vae_jax.convolutions import divisible_by_4
from planar_vae_jax.data import DATASETS, Dataset
from planar_vae_jax.likelihoods import LIKELIHOODS, default_binarization
from planar_vae_jax.nonlinearities import NONLINEARITIES
from planar_vae_jax.optimizers import CONVOLUTIONS_LEARNING_RATE, LEARNING_RATES, OPTIMIZERS
from planar_vae_jax.precision import PRECISIONS
from planar_vae_jax.runs.config import UsageError, flag
from planar_vae_jax.runs.devices import DeviceFlags
from planar_vae_jax.runs.files import as_run_error
from planar_vae_jax.runs.memory import parse_bytes


@dataclass(frozen=True)
class Config(DeviceFlags):
    """Flags of ``experiments.mnist``."""

    flows: int = flag(5, "K, the number of planar layers; 0: an ordinary VAE", at_least=0, at_most=10_000, named=True)
    epochs: int = flag(30, "passes over the training images; more go on", at_least=1, at_most=10**6, resumable=True)
    seed: int = flag(0, "everything random follows from it", at_least=0, at_most=2**32 - 1, named=True)
    dataset: str = flag(
        "auto",
        f"{', '.join(DATASETS)}, or FILE.npz with x_train, x_test: [N, H, W] or [N, H, W, 3] uint8; or a folder with "
        "x_train.npy, x_test.npy",
    )
    data_dir: str | None = flag(None, "folder with IDX files or prepared data; default TFDS's own", resumable=True)
    classes: tuple[int, ...] | None = flag(None, "train and test on these labels alone, as in 3,8", at_least=0)
    validation: int = flag(0, "training images held out, by which the best checkpoint is chosen", at_least=0)
    patience: int = flag(
        0, "the run ends after so many epochs without a better validation loss; 0: never", at_least=0, resumable=True
    )
    objective: str = flag("elbo", "what is minimised", choices=("elbo", "iwae", "reconstruction"))
    train_samples: int = flag(1, "k, samples an image of iwae; 1: the elbo", at_least=1, at_most=100_000)
    binarization: str = flag(
        None, "default: dynamic; none for reconstruction, logistic and gaussian", choices=BINARIZATIONS
    )
    likelihood: str = flag(
        "bernoulli",
        "of binary pixels; logistic: discretised, of uint8 ones; gaussian: a density; both with a scale a pixel",
        choices=tuple(LIKELIHOODS),
    )
    posterior: str = flag("diagonal", "covariance of q_0; full: a Cholesky factor", choices=("diagonal", "full"))
    amortized: bool = flag(False, "the encoder gives each image its own flow")
    h: str = flag("tanh", "the flow's nonlinearity", choices=tuple(NONLINEARITIES))
    latent: int = flag(40, "size of z", at_least=1, at_most=100_000)
    encoder: str = flag("mlp", "conv: gated convolutions, also of the decoder", choices=("mlp", "conv"))
    layers: int = flag(1, "hidden layers of an mlp", at_least=1, at_most=2)
    hidden: int = flag(400, "width of the hidden layers of an mlp", at_least=1, at_most=100_000)
    batch_size: int = flag(128, "images a step", at_least=1)
    optimizer: str = flag(
        None, "default: schedule_free; adam for reconstruction", choices=OPTIMIZERS, default_before="adam"
    )
    learning_rate: float = flag(
        None,
        "default: 8e-3 for schedule_free, 1e-3 for adam and for conv",
        above=0.0,
        at_most=1e30,
        default_before=1e-3,
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


def check_flags(config: Config) -> None:
    """Checks the flags against each other."""
    if config.amortized and config.flows == 0:
        raise UsageError("--amortized needs --flows of at least 1; got --flows=0")
    if config.train_samples > 1 and config.objective != "iwae":
        raise UsageError(f"--train_samples={config.train_samples} needs --objective=iwae; got {config.objective}")
    for name in ("kl_warmup", "energy_annealing"):
        if getattr(config, name) and config.objective != "elbo":
            raise UsageError(f"--{name} anneals the elbo; got --objective={config.objective}")
    if config.likelihood != "bernoulli":
        if config.objective == "reconstruction":
            raise UsageError(f"--likelihood={config.likelihood} needs the elbo; got --objective=reconstruction")
        if config.binarization not in (None, "none"):
            levels = f"--likelihood={config.likelihood} is of grey levels: --binarization must be none"
            raise UsageError(f"{levels}; got --binarization={config.binarization}")
    if config.encoder == "conv":
        for name in ("hidden", "layers"):
            if getattr(config, name) != getattr(Config, name):
                raise UsageError(f"--{name} is of --encoder=mlp; got --{name}={getattr(config, name)} with conv")
    if config.device_memory is not None:
        parse_bytes(config.device_memory)
    with as_run_error(ImportError):
        plotting.check_figures()


def check_data(config: Config, data: Dataset) -> int:
    """Checks the flags against the data; returns the steps of an epoch."""
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
    return len(data.x_train) // config.batch_size


def with_defaults(config: Config, steps_per_epoch: int) -> Config:
    """The defaults that depend on other flags."""
    optimizer = config.optimizer or ("adam" if config.objective == "reconstruction" else "schedule_free")
    learning_rate = CONVOLUTIONS_LEARNING_RATE if config.encoder == "conv" else LEARNING_RATES[optimizer]
    warmup_steps = steps_per_epoch if optimizer == "schedule_free" else 0
    return dataclasses.replace(
        config,
        binarization=config.binarization or default_binarization(config.likelihood, config.objective),
        optimizer=optimizer,
        learning_rate=learning_rate if config.learning_rate is None else config.learning_rate,
        warmup_steps=warmup_steps if config.warmup_steps is None else config.warmup_steps,
    )
