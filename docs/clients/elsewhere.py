"""What other libraries' planar layers do: the figures of elsewhere.md. It needs the extra ``bench``.

python docs/clients/elsewhere.py
"""

import importlib.metadata
import importlib.util
from pathlib import Path

import flowjax.bijections
import flowjax.bijections.planar
import jax.numpy as jnp
import normflows
import pyro.distributions.transforms
import torch

from planar_vae_jax import Planar, planar_flow

# A layer of each library in float32: (u [D], w [D], b, z [D]) -> (f(z) [D], log_det).


def ours(u, w, b, z):
    params = Planar(*(jnp.array([leaf], jnp.float32) for leaf in (u, w, b)))
    return planar_flow(params, jnp.array(z, jnp.float32))


def of_flowjax(u, w, b, z):
    u, w, b, z = (jnp.array(leaf, jnp.float32) for leaf in (u, w, b, z))
    return flowjax.bijections.planar._UnconditionalPlanar(w, u, b).transform_and_log_det(z)


def of_normflows(u, w, b, z):
    u, w, z = (torch.tensor([leaf]) for leaf in (u, w, z))
    moved, log_det = normflows.flows.Planar((len(u[0]),), u=u, w=w, b=torch.tensor([b]))(z)
    return moved[0].detach(), log_det[0].detach()


def of_pyro(u, w, b, z):
    layer = pyro.distributions.transforms.Planar(len(u))
    layer.u.data, layer.w.data, layer.bias.data, z = map(torch.tensor, (u, w, [b], z))
    moved = layer(z)
    return moved.detach(), layer.log_abs_det_jacobian(z, moved).detach()


LAYERS = {"ours": ours, "FlowJAX": of_flowjax, "normflows": of_normflows, "Pyro": of_pyro}
WITHOUT = ("numpyro", "distrax", "tensorflow_probability")


def inverse_of(library):
    """What the inverse of a tanh layer says at a point that the layer has not made."""
    try:
        if library == "FlowJAX":
            flowjax.bijections.Planar(jnp.zeros(2, jnp.uint32), dim=2).inverse_and_log_det(jnp.ones(2))
        elif library == "normflows":
            normflows.flows.Planar((2,)).inverse(torch.ones(1, 2))
        else:
            pyro.distributions.transforms.Planar(2).inv(torch.ones(2))
    except (NotImplementedError, KeyError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return "a point"


def main():
    for package in ("flowjax", "normflows", "pyro-ppl", "torch"):
        print(package, importlib.metadata.version(package))
    for library, layer in LAYERS.items():
        _, of_zero = layer([0.0, 0.0], [1.0, 0.5], 0.0, [0.0, 0.0])
        lost = next((-p for p in range(100) if layer([-float(p), 0.0], [1.0, 0.0], 0.0, [0.0, 0.0])[1] < -1e3), None)
        wide, _ = layer([100.0, 0.0], [1.0, 0.0], 0.0, [1.0, 0.0])
        flat, _ = layer([0.3, 0.2], [0.0, 0.0], 0.3, [1.0, 1.0])
        small, _ = layer([0.1, 0.0], [1e-6, 0.0], 0.5, [1.0, 1.0])
        print(f"\n{library}")
        print(f"  log_det of a layer with u = 0, at a = 0: {float(of_zero):.3f}")
        print(f"  log_det at a = 0 is -inf from w.u = {lost}")
        print(f"  w.u = 100 moves z_1 = 1 to {float(wide[0]):.4g}")
        print(f"  w = 0 moves z_1 = 1 to {float(flat[0]):.4g}; w = 1e-6 moves it to {float(small[0]):.4g}")
        if layer is not ours:
            print(f"  inverse: {inverse_of(library)}")
    print()
    for package in WITHOUT:
        if spec := importlib.util.find_spec(package):
            files = list(Path(spec.submodule_search_locations[0]).rglob("*.py"))
            found = sum("planar" in file.read_text(errors="replace").lower() for file in files)
            print(f"{package}: {found} of {len(files)} files hold the word planar")


if __name__ == "__main__":
    main()
