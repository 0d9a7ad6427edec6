"""K planar layers of other packages, used as their documentation recommends, with parameters that give the same map.

:mod:`benchmarks.problems` converts the parameters.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.problems import Problem, Result, pulled_back, undone, x64
from benchmarks.torch_models import (
    Unavailable,
    compose,
    import_module,
    planar_layers,
    planar_stack,
    synchronize,
    torch_device,
)
from planar_vae_jax import Planar, planar_flow


class Peer(NamedTuple):
    """One contestant, built for one problem."""

    run: Callable[[], Any]  # computes value and gradient and returns when they are finished
    # Converts the output of ``run`` to gradients with respect to our parameters; None if ``run`` computes no flow.
    result: Callable[[Any], Result] | None
    torch: Any = None  # the module torch, if the number of threads matters


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
    """``planar_flow`` on the batch with this method; None is its default."""
    return _ours(problem, functools.partial(planar_flow, method=method))


def ours_under_vmap(problem: Problem) -> Peer:
    """``planar_flow`` of one event, batched by ``jax.vmap``."""
    return _ours(problem, jax.vmap(planar_flow, in_axes=(0 if problem.amortized else None, 0)))


def _ours(problem: Problem, flow: Callable[[Any, Any], tuple[Any, Any]]) -> Peer:
    params = Planar(*(jnp.asarray(array, jnp.zeros(()).dtype) for array in problem[:3]))

    def result(output: Any) -> Result:
        (loss, (zK, log_det)), ((u, w, b), z0_bar) = output
        return Result(loss, zK, log_det, u, w, b, z0_bar)

    return _jax_peer(flow, params, jnp.asarray(problem.z0, params.u.dtype), result)


def truth(problem: Problem) -> Result:
    """Returns the result of our layer scan in float64, with which all others are compared."""
    with x64():
        peer = ours(problem, "scan")
        assert peer.result is not None
        return jax.tree.map(np.asarray, peer.result(peer.run()))


def flowjax(problem: Problem) -> Peer:
    """``Scan`` over stacked ``Planar`` layers: what ``flowjax.flows.planar_flow`` builds, without its permutations.

    FlowJAX's documented way to an amortised flow, an MLP in each layer, computes more than a flow. So an amortised
    problem maps the bijection over its parameters by ``jax.vmap``.
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

        with jax.default_matmul_precision("highest"):  # as in our flows; no difference on a CPU
            return jax.vmap(event, in_axes=(0 if problem.amortized else None, 0))(params, z0)

    def result(output: Any) -> Result:
        (loss, (zK, log_det)), (gradient, z0_bar) = output
        bar = np.asarray(gradient.bijection.params)
        dim = problem.dim
        raw = Result(loss, zK, log_det, bar[..., dim : 2 * dim], bar[..., :dim], bar[..., -1], z0_bar)
        return pulled_back(problem, raw, "softplus of softplus")

    return _jax_peer(flow, params, jnp.asarray(problem.z0, jnp.float32), result)


def floor(problem: Problem) -> Peer:
    """The work that every implementation has to do; computes no flow.

    For a shared flow, the matrix products of the Gram form's value and gradient: ``z0 w^T``, ``w u_hat^T`` and
    ``h u_hat`` forward, and two products for each backward, without the recursion over ``[K, K]``. For an amortised
    flow, ``u`` and ``w`` are read once (summed) and arrays of their sizes are written (the gradient of the sum).
    """
    if problem.amortized:
        return _read_once(problem)
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


def _read_once(problem: Problem) -> Peer:
    u, w = (jnp.asarray(array, jnp.float32) for array in (problem.u, problem.w))
    step = jax.jit(jax.value_and_grad(lambda u, w: jnp.sum(u) + jnp.sum(1.5 * w), argnums=(0, 1)))
    return Peer(lambda: jax.block_until_ready(step(u, w)), None)


# --- PyTorch.


def _torch_peer(
    problem: Problem,
    link: str,
    build: Callable[[Any, tuple[Any, Any, Any]], tuple[Callable[[Any], tuple[Any, Any]], tuple[Any, Any, Any]]],
) -> Peer:
    """Returns a contestant in PyTorch.

    Args:
        problem: the flow and the batch.
        link: the package's constraint, one of ``LINKS``.
        build: ``(torch, (u, w, b)) -> (flow, leaves)``, where ``u, w, b`` are tensors in the package's parameters,
            ``flow(z0 [B, D])`` returns ``(zK, log_det)``, and ``leaves`` holds the tensors whose gradients are wanted:
            for each of u, w and b one tensor or a list of K.
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
        start = z0.detach().requires_grad_()  # a new tensor for each call, as Pyro caches by identity
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
    """A ``NormalizingFlow`` of K ``Planar`` flows. Its ``Planar`` also sums ``w * u`` over a batch: never amortised."""
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
    """A ``ComposeTransformModule`` of K ``Planar``; amortised: ``ConditionalPlanar`` with constant networks."""
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
    """K modules as papers and tutorials write them: :func:`planar_layers`."""

    def build(torch: Any, params: tuple[Any, Any, Any]) -> Any:
        layers = planar_layers(torch, *params)
        flow = functools.partial(compose, layers)
        return flow, tuple([getattr(layer, name) for layer in layers] for name in "uwb")

    return _torch_peer(problem, "ours", build)


def torch_tuned(problem: Problem) -> Peer:
    """Eager PyTorch with as few operations as we could find: :func:`planar_stack`."""

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
