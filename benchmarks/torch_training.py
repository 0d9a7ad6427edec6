"""The training of :mod:`benchmarks.our_training` in PyTorch, checked against ours before it is timed."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.our_training import Task, by_name, from_names, synthetic_images, warmup_steps
from benchmarks.problems import require_agreement
from benchmarks.torch_models import import_module, synchronize, torch_device, vae
from planar_vae_jax.train.optimizers import LEARNING_RATES
from planar_vae_jax.vae import objectives


class Style(NamedTuple):
    """How the model is written."""

    layer_modules: bool  # a module a planar layer, as usually written; else as few operations as we found
    compiled: bool


STYLES = {"eager": Style(True, False), "tuned": Style(False, False), "compiled": Style(False, True)}


class TorchTraining:
    """A training that is taken a number of steps at a time; each call is over when its work is done.

    Images lie on the device and are drawn anew at each visit; Adam is the fused one.

    Args:
        task: what is trained.
        style: one of ``STYLES``.
        optimizer: ``"adam"``, or ``"schedule_free"``: AdamW of the package ``schedulefree``, set as ours is.

    Raises:
        Unavailable: a package is not installed, or free energy or gradient are not ours.
    """

    def __init__(self, task: Task, style: str, optimizer: str):
        self.torch = torch = import_module("torch")
        self.task, self.device = task, torch_device(torch)
        ours = task.model()
        weights = {name: torch.tensor(array, device=self.device) for name, array in by_name(ours).items()}
        self.like = ours
        self.model = vae(torch, weights, STYLES[style].layer_modules)
        self.errors = check(torch, self.device, self.model, task, ours)
        self.model.zero_grad()
        self.optimizer = make_optimizer(torch, self.model, optimizer, task.epoch_steps)
        self.averages = optimizer == "schedule_free"
        self.data = torch.tensor(task.pixels.reshape(len(task.pixels), -1), device=self.device)
        torch.manual_seed(task.seed)
        self.loss = torch.compile(self._loss, dynamic=False) if STYLES[style].compiled else self._loss
        self.batches: list[Any] = []

    def compile(self) -> None:
        """Makes everything ready by taking no step; ``torch.compile`` takes nothing from its cache."""
        with import_module("torch._inductor.config").patch(force_disable_caches=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing is taken from the cache
            self.loss(self.data[: self.task.batch_size]).backward()
        self.model.zero_grad()
        synchronize(self.torch, self.device)

    def train(self, steps: int) -> None:
        """Takes the next steps."""
        for _ in range(steps):
            if not self.batches:
                self._begin_epoch()
            self.optimizer.zero_grad()
            self.loss(self.data[self.batches.pop()]).backward()
            self.optimizer.step()
        synchronize(self.torch, self.device)

    def params(self) -> Any:
        """The model that is judged, in the form of ours."""
        if self.averages:
            self.optimizer.eval()
        arrays = self.model.arrays(lambda parameter: parameter.data)
        if self.averages:
            self.optimizer.train()
        return from_names(arrays, self.like)

    def _begin_epoch(self) -> None:
        order = self.torch.randperm(len(self.data), device=self.device)
        self.batches = list(order.split(self.task.batch_size)[: self.task.epoch_steps])

    def _loss(self, pixels: Any) -> Any:
        x = self.torch.bernoulli(pixels.float() / 255.0)
        noise = self.torch.randn(len(pixels), self.task.latent, device=self.device)
        return self.model(x, noise).mean()


def make_optimizer(torch: Any, model: Any, name: str, epoch_steps: int) -> Any:
    """An optimiser of ``experiments.mnist`` at its defaults, ready to train."""
    rate = LEARNING_RATES[name]
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    optimizer = import_module("schedulefree").AdamWScheduleFree(
        model.parameters(), lr=rate, betas=(0.95, 0.999), warmup_steps=warmup_steps(name, epoch_steps)
    )
    optimizer.train()
    return optimizer


def check(torch: Any, device: Any, model: Any, task: Task, ours: Any) -> dict[str, float]:
    """Free energies of eight images and the gradient of their mean, against ours from the same weights and noise.

    Raises:
        Unavailable: if they are not the same.
    """
    key = jax.random.key(1)
    images = (synthetic_images(1, 8) > 0).astype(np.float32)
    noise = jax.random.normal(key, (8, task.latent))  # as free_energy draws it

    def mean_free_energy(ours: Any) -> Any:
        terms = objectives.free_energy(ours, jnp.asarray(images), key)
        return jnp.mean(terms.free_energy), terms.free_energy

    gradient, free_energies = jax.jit(jax.grad(mean_free_energy, has_aux=True))(ours)
    theirs = model(torch.tensor(images.reshape(8, -1), device=device), torch.tensor(np.asarray(noise), device=device))
    theirs.mean().backward()
    result = {"free_energy": theirs.detach().cpu().numpy(), **model.arrays(lambda parameter: parameter.grad)}
    return require_agreement(result, {"free_energy": np.asarray(free_energies), **by_name(gradient)})
