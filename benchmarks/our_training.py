"""Our training of a VAE as a contestant: keys, defaults and compiled functions of ``experiments.mnist``."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from planar_vae_jax.train import loop
from planar_vae_jax.train.optimizers import LEARNING_RATES, evaluation_params, make_optimizer
from planar_vae_jax.vae import VAE, vae_loss


class Task(NamedTuple):
    """What all contestants train, from the same weights."""

    pixels: np.ndarray  # [N, H, W] uint8, binarised anew at each visit
    batch_size: int
    seed: int
    flow_length: int = 5
    latent: int = 40
    hidden: int = 400
    prng: str = "threefry2x32"

    @property
    def epoch_steps(self) -> int:
        return len(self.pixels) // self.batch_size

    def keys(self) -> tuple[jax.Array, jax.Array]:
        """The keys of the weights and of the training."""
        init_key, train_key = jax.random.split(jax.random.key(self.seed, impl=self.prng))
        return init_key, train_key

    def model(self, key: jax.Array | None = None) -> VAE:
        """The model before the first step; ``key``: other weights than those of the task."""
        sizes: dict[str, Any] = {"latent": self.latent, "hidden": self.hidden, "flow_length": self.flow_length}
        return VAE.mlp(self.pixels.shape[1:], **sizes, rngs=nnx.Rngs(self.keys()[0] if key is None else key))


def warmup_steps(optimizer: str, epoch_steps: int) -> int:
    """The default of ``experiments.mnist``."""
    return epoch_steps if optimizer == "schedule_free" else 0


def default_optimizer(name: str, epoch_steps: int) -> optax.GradientTransformation:
    """``experiments.mnist --optimizer=NAME``."""
    return make_optimizer(name, learning_rate=LEARNING_RATES[name], warmup_steps=warmup_steps(name, epoch_steps))


class OurTraining:
    """A training that is taken a number of steps at a time; each call is over when its work is done."""

    def __init__(self, task: Task, optimizer: str):
        self.task = task
        self.loss = vae_loss("elbo", "dynamic")
        self.optimizer = default_optimizer(optimizer, task.epoch_steps)
        self.data = jnp.asarray(task.pixels)
        self.key = task.keys()[1]
        self.state = jax.jit(functools.partial(loop.init_state, optimizer=self.optimizer))(task.model())
        self._train_steps = jax.jit(functools.partial(loop.train_steps, self.loss, self.optimizer))
        self.epoch = self.position = 0
        self._begin_epoch()
        batch = jax.ShapeDtypeStruct((task.batch_size, *self.data.shape[1:]), self.data.dtype)
        self.info = loop.empty_info(self.loss, self.state, batch, self.key, task.epoch_steps)

    def compile(self) -> None:
        """Makes everything ready by taking no step."""
        self._steps(0)

    def train(self, steps: int) -> None:
        """Takes the next steps."""
        while steps:
            taken = min(steps, self.task.epoch_steps - self.position)
            self._steps(taken)
            steps -= taken
            if self.position == self.task.epoch_steps:
                self.epoch, self.position = self.epoch + 1, 0
                self._begin_epoch()
        jax.block_until_ready((self.state, self.order))

    def params(self) -> Any:
        """The model that is judged: with averaged parameters if the optimiser averages them."""
        return jax.jit(evaluation_params)(self.state)

    def _begin_epoch(self) -> None:
        self.order, self.steps_key = _begin_epoch(len(self.data), self.task.batch_size, self.key, self.epoch)

    def _steps(self, steps: int) -> None:
        stop = self.position + steps
        rest = (self.data, self.order, self.steps_key, self.position, stop)
        self.state, self.info = self._train_steps(self.state, self.info, *rest)
        self.position = stop
        jax.block_until_ready(self.state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin_epoch(size: int, batch_size: int, key: jax.Array, epoch: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """The order of an epoch and the key of its steps."""
    order_key, steps_key = loop.epoch_keys(key, epoch)
    return loop.epoch_order(order_key, size, batch_size), steps_key


def by_name(params: Any) -> dict[str, np.ndarray]:
    """Arrays of a model as ``{"decoder.last.kernel": ...}``, without those that have no entries (K = 0)."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    named = {_name(path): np.array(leaf) for path, leaf in leaves}
    return {name: array for name, array in named.items() if array.size}


def from_names(arrays: Mapping[str, np.ndarray], like: Any) -> Any:
    """The inverse of :func:`by_name`; ``like`` is a model of the same shapes."""

    def leaf(path: Any, old: Any) -> Any:
        return jnp.asarray(arrays[_name(path)], old.dtype) if old.size else old

    return jax.tree_util.tree_map_with_path(leaf, like)


def _name(path: Any) -> str:
    # Flax's variables are nodes with one array, their value.
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def synthetic_images(seed: int, count: int) -> np.ndarray:
    """``[count, 28, 28]`` uint8; a fifth of the pixels is inked, as in MNIST."""
    rng = np.random.default_rng(seed)
    ink = rng.random((count, 28, 28), np.float32) < 0.2
    return rng.integers(1, 256, (count, 28, 28), dtype=np.uint8) * ink
