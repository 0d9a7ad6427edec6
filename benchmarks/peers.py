"""K planar layers of other packages, each used as its own documentation says, on the same map as ours.

The packages constrain ``u`` differently (``p = w.u``; all of them ``u_hat = u + (m - 1 - p) w / |w|^2``):

    ours         m = softplus(p + log(e - 1)), also in our PyTorch layers
    normflows    m = log(1 + exp(p))
    Pyro         m = softplus(p)
    FlowJAX      m = log(1 + softplus(p)), a softplus of a softplus

Each ``m`` runs through all of (0, inf), so for our ``u`` there is one ``u`` of theirs with the same ``u_hat``, and with
it the same map and log-determinant: :func:`peer_u`. Gradients by their ``u`` are pulled back to ours by the derivative
of that change of parameters. Equal work is checked, then timed.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from planar_vae_jax.flows import SHIFT, Planar, planar_flow

from benchmarks.torch_models import (
    Unavailable,
    compose,
    import_module,
    planar_layers,
    planar_stack,
    synchronize,
    torch_device,
)

# Of the largest value, of each result. Float32 with K = 128 layers gives 1e-5.
TOLERANCE = 1e-4


class Problem(NamedTuple):
    """K layers and a batch, float64; the same layers for all events, or each event's own (amortised)."""

    u: np.ndarray  # [K, D], or [B, K, D]
    w: np.ndarray  # [K, D], or [B, K, D]
    b: np.ndarray  # [K], or [B, K]
    z0: np.ndarray  # [B, D]

    @property
    def amortized(self) -> bool:
        return self.u.ndim == 3

    @property
    def flow_length(self) -> int:
        return self.u.shape[-2]

    @property
    def dim(self) -> int:
        return self.u.shape[-1]


class Result(NamedTuple):
    """What a contestant computes: the flow, the objective and its gradient."""

    loss: Any  # [], the mean of |zK|^2 / 2 - log_det
    zK: Any  # [B, D]
    log_det: Any  # [B]
    u: Any  # gradients, of the shapes of Problem's
    w: Any
    b: Any
    z0: Any


class Peer(NamedTuple):
    """One contestant, built for one problem."""

    run: Callable[[], Any]  # one value and gradient, finished when it returns
    # What ``run`` returned, with gradients by our parameters; None if it computes no flow.
    result: Callable[[Any], Result] | None
    torch: Any = None  # the module, if its number of threads matters


def draw_problem(rng: np.random.Generator, *, batch_size: int, dim: int, flow_length: int, amortized: bool) -> Problem:
    """``|w|`` between 1/2 and 3/2: where it is 0, other packages divide 0 by 0."""
    lead = (batch_size, flow_length) if amortized else (flow_length,)
    w = rng.standard_normal((*lead, dim))
    w *= rng.uniform(0.5, 1.5, (*lead, 1)) / np.linalg.norm(w, axis=-1, keepdims=True)
    u = rng.standard_normal((*lead, dim)) * (0.5 / dim**0.5)
    return Problem(u, w, rng.standard_normal(lead) * 0.5, rng.standard_normal((batch_size, dim)))


def x64() -> contextlib.AbstractContextManager[None]:
    """64-bit types for the time of a check."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return importlib.import_module("jax.experimental").enable_x64()  # before JAX 0.8


def disagreement(result: Mapping[str, Any], truth: Mapping[str, Any]) -> dict[str, float]:
    """Of each result: the largest error over the largest value."""

    def relative(value: Any, true: Any) -> float:
        value, true = np.asarray(value, np.float64), np.asarray(true, np.float64)
        if value.shape != true.shape:
            raise ValueError(f"a result has shape {value.shape}; ours has {true.shape}")
        return float(np.max(np.abs(value - true)) / np.max(np.abs(true)))

    return {name: relative(result[name], truth[name]) for name in truth}


def require_agreement(result: Mapping[str, Any], truth: Mapping[str, Any]) -> dict[str, float]:
    """:func:`disagreement`.

    Raises:
        Unavailable: if it is larger than ``TOLERANCE``.
    """
    errors = disagreement(result, truth)
    for name, error in errors.items():
        if not error <= TOLERANCE:  # nor is NaN
            raise Unavailable(f"its {name} differs from ours by {error:.1e} of the largest value")
    return errors


# --- The change of parameters.


def log_expm1(m: Any) -> Any:
    """``log(exp(m) - 1)``, the inverse of softplus, for ``m > 0``."""
    return m + jnp.log(-jnp.expm1(-m))


# m -> p of each package.
LINKS: dict[str, Callable[[Any], Any]] = {
    "ours": lambda m: log_expm1(m) - SHIFT,
    "softplus": log_expm1,  # m = softplus(p)
    "softplus of softplus": lambda m: log_expm1(jnp.expm1(m)),  # m = log(1 + softplus(p))
}


def peer_u(u: Any, w: Any, link: str) -> Any:
    """The ``u [..., D]`` for which a package with this link has the ``u_hat`` that we have for ours.

    ``u + (m - 1 - p) w / |w|^2`` is the same on both sides, and so is ``m``: only ``p`` differs.
    """
    p = jnp.sum(u * w, -1, keepdims=True)
    m = jax.nn.softplus(p + SHIFT)
    return u + (LINKS[link](m) - p) * w / jnp.sum(jnp.square(w), -1, keepdims=True)


_peer_u = jax.jit(peer_u, static_argnums=2)


@functools.partial(jax.jit, static_argnums=4)
def _pull_back(u: Any, w: Any, u_bar: Any, w_bar: Any, link: str) -> Any:
    _, vjp = jax.vjp(lambda u, w: peer_u(u, w, link), u, w)
    from_u, from_w = vjp(u_bar)
    return from_u, from_w + w_bar


def undone(problem: Problem, link: str) -> np.ndarray:
    """:func:`peer_u` of a problem, in float64."""
    with x64():
        return np.asarray(_peer_u(jnp.asarray(problem.u), jnp.asarray(problem.w), link))


def pulled_back(problem: Problem, result: Result, link: str) -> Result:
    """Gradients by a package's ``u`` and ``w`` turned into gradients by ours, in float64."""
    with x64():
        arrays = (jnp.asarray(np.asarray(array, np.float64)) for array in (problem.u, problem.w, result.u, result.w))
        u, w = _pull_back(*arrays, link)
        return result._replace(u=np.asarray(u), w=np.asarray(w))


# --- JAX: ours and FlowJAX.


def _jax_peer(
    flow: Callable[[Any, Any], tuple[Any, Any]], params: Any, z0: Any, result: Callable[[Any], Result]
) -> Peer:
    """``flow(params, z0 [B, D]) -> (zK [B, D], log_det [B])``, compiled with its gradient."""

    def objective(params: Any, z0: Any) -> Any:
        zK, log_det = flow(params, z0)
        return jnp.mean(0.5 * jnp.sum(jnp.square(zK), -1) - log_det), (zK, log_det)

    step = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
    return Peer(lambda: jax.block_until_ready(step(params, z0)), result)


def ours(problem: Problem, method: str | None) -> Peer:
    """``planar_flow`` with this method; None: the one that its documentation says."""
    if method is None and problem.amortized:
        method = "scan"
    params = Planar(*(jnp.asarray(array, jnp.zeros(()).dtype) for array in problem[:3]))
    in_axes = (0 if problem.amortized else None, 0)
    flow = jax.vmap(lambda params, z0: planar_flow(params, z0, method=method), in_axes=in_axes)

    def result(output: Any) -> Result:
        (loss, (zK, log_det)), ((u, w, b), z0_bar) = output
        return Result(loss, zK, log_det, u, w, b, z0_bar)

    return _jax_peer(flow, params, jnp.asarray(problem.z0, params.u.dtype), result)


def truth(problem: Problem) -> Result:
    """Ours, layer by layer, in float64."""
    with x64():
        peer = ours(problem, "scan")
        assert peer.result is not None
        return jax.tree.map(np.asarray, peer.result(peer.run()))


def flowjax(problem: Problem) -> Peer:
    """``Scan`` over stacked ``Planar`` layers: what ``flowjax.flows.planar_flow`` builds, less its permutations.

    Amortised: the documented route, an MLP in each layer, computes more than a flow; so the bijection is batched by
    ``jax.vmap`` over its parameters.
    """
    bijections, eqx = import_module("flowjax.bijections"), import_module("equinox")
    keys = jax.random.split(jax.random.key(0), problem.flow_length)
    layers = eqx.filter_vmap(lambda key: bijections.Planar(key, dim=problem.dim))(keys)
    # One array a layer: w, u, bias (flowjax/bijections/planar.py, get_planar).
    raw = np.concatenate([problem.w, undone(problem, "softplus of softplus"), problem.b[..., None]], axis=-1)
    layers = eqx.tree_at(lambda layers: layers.params, layers, jnp.asarray(raw, jnp.float32))
    params, static = eqx.partition(bijections.Scan(layers), eqx.is_array)

    def flow(params: Any, z0: Any) -> Any:
        def event(params: Any, z0: Any) -> Any:
            return eqx.combine(params, static).transform_and_log_det(z0)

        with jax.default_matmul_precision("highest"):  # as ours; no difference on a CPU
            return jax.vmap(event, in_axes=(0 if problem.amortized else None, 0))(params, z0)

    def result(output: Any) -> Result:
        (loss, (zK, log_det)), (gradient, z0_bar) = output
        bar = np.asarray(gradient.bijection.params)
        dim = problem.dim
        raw = Result(loss, zK, log_det, bar[..., dim : 2 * dim], bar[..., :dim], bar[..., -1], z0_bar)
        return pulled_back(problem, raw, "softplus of softplus")

    return _jax_peer(flow, params, jnp.asarray(problem.z0, jnp.float32), result)


def products(problem: Problem) -> Peer:
    """No contestant but a floor: the products with ``[., D]`` matrices in the Gram form's value and gradient, alone.

    Forward ``z0 w^T``, ``w u_hat^T``, ``h u_hat``; backward two for each. The recursion over ``[K, K]`` is left out.
    """
    if problem.amortized:
        raise Unavailable("with parameters of each event's own there are no products of matrices")
    u, w, z0 = (jnp.asarray(array, jnp.float32) for array in (problem.u, problem.w, problem.z0))

    @jax.jit
    def step(u: Any, w: Any, z0: Any) -> Any:
        def dot(x: Any, y: Any) -> Any:
            return jnp.dot(x, y, precision=jax.lax.Precision.HIGHEST)

        a, gram = dot(z0, w.T), dot(w, u.T)
        zK = dot(a, u)
        h_bar, u_bar = dot(zK, u.T), dot(a.T, zK)
        z0_bar, w_bar = dot(h_bar, w), dot(h_bar.T, z0)
        return zK, z0_bar, u_bar, w_bar, dot(gram, u), dot(gram.T, w)

    return Peer(lambda: jax.block_until_ready(step(u, w, z0)), None)


# --- PyTorch.


def _torch_peer(
    problem: Problem,
    link: str,
    build: Callable[[Any, tuple[Any, Any, Any]], tuple[Callable[[Any], tuple[Any, Any]], tuple[Any, Any, Any]]],
) -> Peer:
    """A contestant of PyTorch.

    Args:
        link: one of ``LINKS``.
        build: ``(torch, (u, w, b)) -> (flow, leaves)``: from tensors in the package's own parameters to
            ``flow(z0 [B, D]) -> (zK, log_det)`` and the leaf tensors that gradients are taken by: for each of u, w, b
            either one tensor or a list of K.
    """
    torch = import_module("torch")
    device = torch_device(torch)

    def tensor(array: np.ndarray) -> Any:
        return torch.tensor(array, dtype=torch.float32, device=device)

    flow, leaves = build(torch, (tensor(undone(problem, link)), tensor(problem.w), tensor(problem.b)))
    z0 = tensor(problem.z0)
    flat = [leaf for part in leaves for leaf in (part if isinstance(part, list) else [part])]

    def run() -> Any:
        for leaf in flat:
            leaf.grad = None
        start = z0.detach().requires_grad_()  # a new tensor each time: Pyro caches by identity
        zK, log_det = flow(start)
        loss = torch.mean(0.5 * zK.square().sum(-1) - log_det)
        loss.backward()
        synchronize(torch, device)
        return loss, zK, log_det, start.grad

    def result(output: Any) -> Result:
        loss, zK, log_det, z0_bar = (value.detach().cpu().numpy() for value in output)
        axis = 1 if problem.amortized else 0

        def gradient(part: Any, shape: tuple[int, ...]) -> np.ndarray:
            if not isinstance(part, list):
                return part.grad.cpu().numpy()
            return np.stack([leaf.grad.cpu().numpy() for leaf in part], axis).reshape(shape)

        u, w, b = (gradient(part, array.shape) for part, array in zip(leaves, problem[:3], strict=True))
        raw = Result(loss, zK, log_det, u, w, b, z0_bar)
        return pulled_back(problem, raw, link)

    return Peer(run, result, torch)


def normflows(problem: Problem) -> Peer:
    """A ``NormalizingFlow`` of K ``Planar`` flows. Its ``Planar`` sums ``w * u`` over a batch too: not amortisable."""
    nf = import_module("normflows")
    if problem.amortized:
        raise Unavailable("its Planar holds one set of parameters")

    def build(torch: Any, params: tuple[Any, Any, Any]) -> Any:
        rows = zip(*(part.unbind(0) for part in params), strict=True)
        flows = [nf.flows.Planar((problem.dim,), u=u[None], w=w[None], b=b[None]) for u, w, b in rows]
        model = nf.NormalizingFlow(nf.distributions.DiagGaussian(problem.dim, trainable=False), flows)
        model = model.to(params[0].device)
        return model.forward_and_log_det, tuple([getattr(flow, name) for flow in flows] for name in "uwb")

    return _torch_peer(problem, "softplus", build)


def pyro(problem: Problem) -> Peer:
    """A ``ComposeTransformModule`` of K ``Planar``; amortised: ``ConditionalPlanar`` whose network returns tensors."""
    transforms = import_module("pyro.distributions.transforms")
    modules = import_module("pyro.distributions.torch_transform")
    conditional = import_module("pyro.distributions.conditional")

    def shared(torch: Any, params: tuple[Any, Any, Any]) -> Any:
        layers = []
        for u, w, b in zip(*params, strict=True):
            layer = transforms.Planar(problem.dim).to(u.device)
            for parameter, value in ((layer.u, u), (layer.w, w), (layer.bias, b[None])):
                parameter.data.copy_(value)
            layers.append(layer)
        stack = modules.ComposeTransformModule(layers)

        def flow(z0: Any) -> Any:
            zK = stack(z0)
            return zK, stack.log_abs_det_jacobian(z0, zK)

        return flow, tuple([getattr(layer, name) for layer in layers] for name in ("u", "w", "bias"))

    def amortized(torch: Any, params: tuple[Any, Any, Any]) -> Any:
        u, w, b = ([leaf.clone().requires_grad_() for leaf in part.unbind(1)] for part in params)
        b = [leaf.detach()[:, None].clone().requires_grad_() for leaf in b]  # [B, 1], as its networks return it
        rows = zip(b, u, w, strict=True)
        networks = [lambda context, row=row: row for row in rows]
        stack = conditional.ConditionalComposeTransformModule(
            [transforms.ConditionalPlanar(network) for network in networks]
        )

        def flow(z0: Any) -> Any:
            conditioned = stack.condition(z0.detach())
            zK = conditioned(z0)
            return zK, conditioned.log_abs_det_jacobian(z0, zK)

        return flow, (u, w, b)

    return _torch_peer(problem, "softplus", amortized if problem.amortized else shared)


def torch_layer(problem: Problem) -> Peer:
    """K modules, see :func:`planar_layers`."""

    def build(torch: Any, params: tuple[Any, Any, Any]) -> Any:
        layers = planar_layers(torch, *params)
        flow = functools.partial(compose, layers)
        return flow, tuple([getattr(layer, name) for layer in layers] for name in "uwb")

    return _torch_peer(problem, "ours", build)


def torch_tuned(problem: Problem) -> Peer:
    """Eager PyTorch as fast as we could write it, see :func:`planar_stack`."""

    def build(torch: Any, params: tuple[Any, Any, Any]) -> Any:
        u, w, b = (part.clone().requires_grad_() for part in params)
        return (lambda z0: planar_stack(torch, u, w, b, z0)), (u, w, b)

    return _torch_peer(problem, "ours", build)


PEERS: dict[str, Callable[[Problem], Peer]] = {
    "FlowJAX": flowjax,
    "normflows": normflows,
    "Pyro": pyro,
    "PyTorch layer": torch_layer,
    "PyTorch tuned": torch_tuned,
}
