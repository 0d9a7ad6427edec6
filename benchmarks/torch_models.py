"""Planar layers and the planar-flow VAE in PyTorch, written by us; nothing here is imported unless PyTorch is."""

import importlib
from typing import Any

import jax
import numpy as np

from planar_vae_jax.flows._constraint import SHIFT
from planar_vae_jax.vae.model import LOG_STD_RANGE


class Unavailable(Exception):
    """A contestant that cannot take part; the message says why."""


def import_module(name: str) -> Any:
    """A package of the extra ``bench``.

    Raises:
        Unavailable: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"not installed ({error})") from None


def torch_device(torch: Any) -> Any:
    """JAX's kind of device.

    Raises:
        Unavailable: if JAX runs on an accelerator that this PyTorch cannot use.
    """
    platform = jax.devices()[0].platform
    if platform == "cpu":
        return torch.device("cpu")
    if platform in ("gpu", "cuda", "rocm") and torch.cuda.is_available():
        return torch.device("cuda")
    raise Unavailable(f"JAX runs on {platform}, which this PyTorch cannot use")


def synchronize(torch: Any, device: Any) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def planar_layers(torch: Any, u: Any, w: Any, b: Any) -> Any:
    """K modules as papers' and tutorials' code has them: each constrains its ``u`` and returns ``(z, log_det)``."""

    class Layer(torch.nn.Module):
        def __init__(self, u: Any, w: Any, b: Any) -> None:
            super().__init__()
            self.u, self.w, self.b = (torch.nn.Parameter(value.clone()) for value in (u, w, b))

        def forward(self, z: Any) -> Any:
            p = (self.w * self.u).sum(-1, keepdim=True)  # [1], or [B, 1]
            m = torch.nn.functional.softplus(p + SHIFT)
            u_hat = self.u + (m - 1 - p) * self.w / self.w.square().sum(-1, keepdim=True)
            linear = z @ self.w if self.w.ndim == 1 else (z * self.w).sum(-1)
            h = torch.tanh(linear + self.b)
            log_det = torch.log1p((1 - h.square()) * (m.squeeze(-1) - 1))
            return z + h[:, None] * u_hat, log_det

    rows = zip(*(part.unbind(-2) for part in (u, w)), b.unbind(-1), strict=True)
    return torch.nn.ModuleList(Layer(*row) for row in rows)


def compose(layers: Any, z: Any) -> Any:
    """``(zK, log_det)`` of modules that return such pairs."""
    total: Any = 0.0
    for layer in layers:
        z, log_det = layer(z)
        total = total + log_det
    return z, total


def planar_stack(torch: Any, u: Any, w: Any, b: Any, z: Any) -> Any:
    """K >= 1 layers in eager PyTorch with as few operations as we found.

    The constraint and the log-determinant are taken for all layers at once, and a layer is three calls. ``unbind``:
    the derivative of ``w[k]`` would be a tensor of zeros of the size of all ``w``, K times.
    """
    p = (w * u).sum(-1, keepdim=True)
    m = torch.nn.functional.softplus(p + SHIFT)
    u_hat = u + (m - 1 - p) * w / w.square().sum(-1, keepdim=True)
    values = []
    for u_k, w_k, b_k in zip(u_hat.unbind(-2), w.unbind(-2), b.unbind(-1), strict=True):
        if w.ndim == 2:
            h = torch.tanh(torch.addmv(b_k, z, w_k))
            z = torch.addr(z, h, u_k)
        else:
            h = torch.tanh((z * w_k).sum(-1) + b_k)
            z = torch.addcmul(z, h[:, None], u_k)
        values.append(h)
    slope = 1 - torch.stack(values, -1).square()
    return z, torch.log1p(slope * (m.squeeze(-1) - 1)).sum(-1)


LINEAR = ("encoder.hidden.first", "posterior.mean", "posterior.log_std", "decoder.hidden.first", "decoder.last")


def vae(torch: Any, weights: dict[str, Any], layer_modules: bool) -> Any:
    """The VAE of ``planar_vae_jax.vae.model`` and its free energy as one module.

    Args:
        weights: by the names of :func:`benchmarks.our_training.by_name`, in our layout; u, w, b are missing if K = 0.
        layer_modules: whether the flow is :func:`planar_layers`, otherwise :func:`planar_stack`.

    Returns:
        A module ``(x [B, P], noise [B, L]) -> free energies [B]`` with a method ``arrays``.
    """
    functional = torch.nn.functional
    flow = [weights[f"posterior.{part}"] for part in "uwb" if f"posterior.{part}" in weights]

    def linear(part: str) -> Any:
        kernel, bias = weights[f"{part}.kernel"], weights[f"{part}.bias"]
        layer = torch.nn.Linear(*kernel.shape, device=kernel.device)
        layer.weight.data.copy_(kernel.T)
        layer.bias.data.copy_(bias)
        return layer

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.mean, self.log_std, self.decode, self.logits = map(linear, LINEAR)
            if flow and layer_modules:
                self.layers = planar_layers(torch, *flow)
            elif flow:
                self.u, self.w, self.b = map(torch.nn.Parameter, flow)

        def forward(self, x: Any, noise: Any) -> Any:
            features = functional.relu(self.hidden(x))
            mean, raw = self.mean(features), self.log_std(features)
            log_std = LOG_STD_RANGE * torch.tanh(raw / LOG_STD_RANGE)
            z0 = mean + torch.exp(log_std) * noise
            zK, log_det = self.flow(z0)
            logits = self.logits(functional.relu(self.decode(zK)))
            # The constants of log q_0 and of log p(z_K) cancel.
            log_q0 = (-0.5 * noise.square() - log_std).sum(-1)
            log_prior = -0.5 * zK.square().sum(-1)
            cross_entropy = functional.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)
            return log_q0 - log_det - log_prior + cross_entropy

        def flow(self, z0: Any) -> Any:
            if not flow:
                return z0, 0.0
            if layer_modules:
                return compose(self.layers, z0)
            return planar_stack(torch, self.u, self.w, self.b, z0)

        def arrays(self, read: Any) -> dict[str, np.ndarray]:
            """``read`` of each parameter (its values, its gradient), as ``weights`` are."""
            found = {}
            layers = (self.hidden, self.mean, self.log_std, self.decode, self.logits)
            for name, layer in zip(LINEAR, layers, strict=True):
                found[f"{name}.kernel"], found[f"{name}.bias"] = read(layer.weight).T, read(layer.bias)
            for part in "uwb" if flow else "":
                if layer_modules:
                    found[f"posterior.{part}"] = torch.stack([read(getattr(layer, part)) for layer in self.layers])
                else:
                    found[f"posterior.{part}"] = read(getattr(self, part))
            return {name: value.detach().cpu().numpy().copy() for name, value in found.items()}

    return Model()
