"""Training steps and other programs compiled for TPU slices on a machine without a TPU; nothing is run.

    pip install -e '.[experiments,tpu]'          # libtpu, in the version that matches jax
    python -m benchmarks.tpu_compile             # the table of docs/scaling.md
    python -m benchmarks.tpu_compile --slices=v5e:2x4 --programs="train K=5" --json

Each row is a program compiled for a slice and a global batch. Its columns are the operations and the bytes of memory
traffic of one chip in one step, as XLA counts them, the all-reduces of a step with the bytes that they sum, the memory
that a chip needs, and other exchanges between chips. XLA counts the body of the loop over steps once.
"""

import argparse
import functools
import importlib.util
import json
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from planar_vae_jax import PlanarFlow, init_planar
from planar_vae_jax.analysis import evaluation
from planar_vae_jax.analysis.evaluation import Images
from planar_vae_jax.train import loop as training
from planar_vae_jax.train import mesh as meshes
from planar_vae_jax.train.optimizers import make_optimizer
from planar_vae_jax.vae import VAE, vae_loss

SLICES = ("v5e:1x1", "v5e:2x4", "v5e:8x8", "v5e:16x16")
IMAGES, STEPS = 60_000, 8
_SIZES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "u8": 1, "pred": 1, "u16": 2, "s8": 1, "f64": 8}
_EXCHANGES = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter")

# Otherwise libtpu asks a metadata server that is not there.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nobody has a chip of its own here
}

Row = dict[str, Any]


def missing() -> str | None:
    """Why nothing can be compiled for TPUs here, or ``None``."""
    return None if importlib.util.find_spec("libtpu") else "libtpu is not installed (the extra `tpu` brings it)"


@functools.cache
def slice_mesh(name: str) -> Mesh:
    """The chips of a slice that is not there: ``"v5e:2x4"`` has 8, of 2 hosts."""
    from jax.experimental import topologies

    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    options = {"chips_per_host_bounds": (1, 1, 1)} if name.endswith(":1x1") else {}
    return meshes.data_mesh(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)


# --- Programs: each takes the batch and gives a function and the shapes of its arguments.


def make_model(encoder: str = "mlp", **sizes: Any) -> VAE:
    """``VAE.mlp`` or ``VAE.conv`` for MNIST."""
    make = {"mlp": VAE.mlp, "conv": VAE.conv}[encoder]
    return make((28, 28), **sizes, rngs=nnx.Rngs(0))


def train(batch: int, optimizer: str = "schedule_free", **sizes: Any) -> tuple[Callable[..., Any], Any]:
    """The piece of an epoch that ``experiments.mnist`` calls."""
    loss, method = vae_loss("elbo", "dynamic"), make_optimizer(optimizer, learning_rate=8e-3, warmup_steps=9)

    def arguments() -> Any:
        key = jax.random.key(0)
        state = training.init_state(make_model(**sizes), method)
        one = jax.ShapeDtypeStruct((batch, 28, 28), jnp.uint8)
        info = training.empty_info(loss, state, one, key, STEPS)
        images, order = jnp.zeros((IMAGES, 28, 28), jnp.uint8), jnp.zeros((STEPS, batch), jnp.int32)
        return state, info, images, order, key, jnp.int32(0), jnp.int32(STEPS)

    return functools.partial(training.train_steps, loss, method), jax.eval_shape(arguments)


def evaluate(batch: int, samples: int = 0, **sizes: Any) -> tuple[Callable[..., Any], Any]:
    """Figures of ``batch`` test images; with ``samples``, their importance-sampled NLL."""

    def function(model: VAE, images: Images) -> Any:
        if samples:
            return evaluation.marginal_likelihood(model, images, samples=samples)
        return evaluation.free_energy_terms(model, images)

    def arguments() -> Any:
        keys = jax.random.split(jax.random.key(0), batch)
        return make_model(**sizes), Images(jnp.zeros((batch, 28, 28), jnp.uint8), keys)

    return function, jax.eval_shape(arguments)


def inverse(batch: int, flow_length: int, dim: int) -> tuple[Callable[..., Any], Any]:
    """Value and gradient of a log-density, by the inverse."""

    def function(flow: PlanarFlow, points: jax.Array) -> Any:
        return jax.value_and_grad(lambda flow: -jnp.mean(flow.log_prob(meshes.split(points))))(flow)

    def arguments() -> Any:
        flow = PlanarFlow(init_planar(jax.random.key(0), flow_length, dim), jnp.zeros(dim), jnp.zeros(dim))
        return flow, jnp.zeros((batch, dim))

    return function, jax.eval_shape(arguments)


MODELS: dict[str, dict[str, Any]] = {
    "K=0": {"flow_length": 0},
    "K=5": {"flow_length": 5},
    "K=80": {"flow_length": 80},
    "K=5 amortised": {"flow_length": 5, "amortized": True},
    "K=80 amortised": {"flow_length": 80, "amortized": True},
    "conv": {"encoder": "conv", "latent": 64, "flow_length": 16, "amortized": True},
}
PROGRAMS: dict[str, Callable[[int], tuple[Callable[..., Any], Any]]] = {
    f"train {name}{suffix}": functools.partial(train, precision=precision, **sizes)
    for suffix, precision in (("", "float32"), (" bfloat16", "bfloat16"))
    for name, sizes in MODELS.items()
} | {
    "evaluation K=5": functools.partial(evaluate, flow_length=5),
    "evaluation conv": functools.partial(evaluate, **MODELS["conv"]),
    "NLL K=5": functools.partial(evaluate, flow_length=5, samples=128),
    "inverse K=15 D=2": functools.partial(inverse, flow_length=15, dim=2),
    "inverse K=5 D=40": functools.partial(inverse, flow_length=5, dim=40),
}


# --- Compiling


def compile_for(slice_name: str, program: str, batch: int, effort: float = 0.0) -> Any:
    """A program, compiled for all chips of a slice; ``effort``: XLA's ``exec_time_optimization_effort``, -1 to 1."""
    mesh = slice_mesh(slice_name)
    function, shapes = PROGRAMS[program](batch)
    sharding = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)
    with jax.set_mesh(mesh):
        lowered = jax.jit(function).lower(*placed)
    options: dict[str, Any] = {"exec_time_optimization_effort": effort} if effort else {}
    return lowered.compile(compiler_options=options)


def measure(slice_name: str, program: str, batch: int, effort: float = 0.0) -> Row:
    """A row: see the module's text."""
    done = compile_for(slice_name, program, batch, effort)
    text, cost, memory = done.as_text(), done.cost_analysis(), done.memory_analysis()
    reduced = exchanges(text, "all-reduce")
    return {
        "slice": slice_name,
        "chips": slice_mesh(slice_name).size,
        "program": program,
        "batch": batch,
        "operations": cost["flops"],
        "bytes": cost.get("bytes accessed", 0.0),
        "all_reduces": len(reduced),
        "all_reduce_bytes": sum(reduced),
        "other_exchanges": {kind: found for kind in _EXCHANGES if (found := exchanges(text, kind))},
        "memory": memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes,
        "float64": "f64[" in text,
    }


def exchanges(text: str, kind: str) -> list[int]:
    """The bytes of each exchange of a kind in compiled text."""
    found = re.findall(rf"= (.*?) {kind}(?:-start)?\(", text)
    return [sum(_bytes(*shape) for shape in re.findall(r"(\w+)\[([\d,]*)\]", one)) for one in found]


def _bytes(dtype: str, shape: str) -> int:
    return _SIZES.get(dtype, 4) * int(np.prod([int(size) for size in shape.split(",") if size], dtype=np.int64))


def main() -> None:
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", default=",".join(SLICES), help="TPU slices joined by commas")
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="programs joined by commas")
    parser.add_argument("--batches", default="16,32", help="examples of a step on each chip")
    parser.add_argument("--effort", type=float, default=0.0, help="XLA's exec_time_optimization_effort, -1 to 1")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each row")
    options = parser.parse_args()
    reason = missing()
    if reason:
        raise SystemExit(reason)
    jax.config.update("jax_platforms", "cpu")  # what runs here; TPUs are only compiled for
    for slice_name in options.slices.split(","):
        for program in options.programs.split(","):
            for each in map(int, options.batches.split(",")):
                row = measure(slice_name, program, each * slice_mesh(slice_name).size, options.effort)
                print(json.dumps(row) if options.json else _text(row), flush=True)


def _text(row: Row) -> str:
    cells = (
        row["slice"],
        row["program"],
        f"{row['batch']}",
        f"{row['operations'] / 1e6:.1f}",
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['all_reduces']} ({row['all_reduce_bytes'] / 1e6:.2f} MB)",
        f"{row['memory'] / 1e6:.0f} MB",
        ", ".join(f"{kind} {sum(found) / 1e6:.2f} MB" for kind, found in row["other_exchanges"].items()) or "-",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
