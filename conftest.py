"""The python blocks of README and docs are run by Sybil: those of a page in order, in one namespace and one folder."""

import contextlib
import importlib
import importlib.util
import re
import sys
import tempfile
from pathlib import Path
from unittest import SkipTest

import fast_compilation  # noqa: F401  before JAX is imported
import pytest
from sybil import Document, Sybil
from sybil.example import NotEvaluated
from sybil.integration.pytest import SybilItem
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

# Libraries that a page is about; its blocks are skipped where one is missing.
NEEDED = {
    "guide.md": ["blackjax", "numpyro"],
    "numpyro.md": ["numpyro"],
    "flowjax.md": ["flowjax"],
    "distrax.md": ["distrax"],
    "others.md": ["blackjax", "distrax", "equinox"],
}

filter_traceback = SybilItem._traceback_filter


def filter_or_keep(item, raised):
    """Sybil's filter fails on the cause of an exception that was raised from another one, and would end pytest."""
    try:
        return filter_traceback(item, raised)
    except IndexError:
        return raised.traceback


SybilItem._traceback_filter = filter_or_keep


class Page(Document):
    """A page whose blocks build on each other: a block that is run alone (-k, pytest-xdist) runs earlier ones first."""

    def __init__(self, text, path):
        super().__init__(text, path)
        self.namespace |= {"__file__": path, "__name__": "page"}
        self.run = set()
        self.push_evaluator(self.run_earlier)

    def run_earlier(self, example):
        missing = [name for name in NEEDED.get(Path(self.path).name, ()) if importlib.util.find_spec(name) is None]
        if missing:
            raise SkipTest(f"needs {', '.join(missing)}, which the extra clients installs")
        if "_stack" not in self.namespace:
            begin(self.namespace)
        self.run.add(example.start)
        for earlier in self.examples():
            if earlier.start < example.start and earlier.start not in self.run:
                earlier.evaluate()
        raise NotEvaluated  # here; by the parser's evaluator


# --- What a page finds in its folder


def write_images(side, classes):
    """``images.npz``, in place of a data set that is downloaded."""
    import numpy as np

    def images(number):
        return np.random.default_rng(number).integers(0, 256, (number, side, side), np.uint8)

    arrays = {f"x_{split}": images(number) for split, number in (("train", 64), ("test", 8))}
    np.savez("images.npz", **arrays, **{f"y{name[1:]}": np.arange(len(x)) % classes for name, x in arrays.items()})


def train_by_the_first_command(page):
    """The run of README's first command, with tiny sizes, stopped before its figures."""
    from running import stopped_after

    from experiments import mnist
    from planar_vae_jax.runs._signals import Stopped

    write_images(28, 10)
    sizes = ["--epochs=1", "--hidden=8", "--latent=2", "--batch_size=16", "--dataset=images.npz"]
    with stopped_after(1), pytest.raises(Stopped):
        mnist.main(["--flows=5", *sizes, "--workdir=runs/mnist-flows=5-seed=0"], pictures=False)


def train_own_experiment(page):
    """``own.py``, which is the page's first block, and one of its runs."""
    (program,) = re.findall(r"```python\n(.*?def main\(.*?)```", page.read_text(), re.DOTALL)
    Path("own.py").write_text(program)
    write_images(8, 2)
    own = importlib.import_module("own")
    flags = ["--dataset=images.npz", "--epochs=1", "--features=8", "--workdir=runs/own/flows=5-seed=0"]
    config = own.parse_run(own.Config, flags, own.__doc__, "own")
    own.train(config, own.load_dataset(config.dataset))


def export_a_model(page):
    """The files of ``--export``."""
    from flax import nnx

    from planar_vae_jax import VAE
    from planar_vae_jax.export import export_run
    from planar_vae_jax.load import Run

    model = VAE.mlp((28, 28), latent=2, hidden=8, flow_length=2, rngs=nnx.Rngs(0))
    export_run(Run({"nll_samples": 2}, model, 0, "dynamic"), ".")


PREPARED = {
    "README.md": train_by_the_first_command,
    "experiment.md": train_own_experiment,
    "experiments.md": export_a_model,
}


def check_readme(namespace):
    """What README's comments promise of the arrays, and that what is trained learns; of the blocks that were run."""
    shapes = {"zK": (1000, 2), "pictures": (8, 28, 28), "nats": (8,), "codes": (8, 2)}
    for name in shapes.keys() & namespace.keys():
        assert namespace[name].shape == shapes[name], name
    if "info" in namespace:
        losses = namespace["info"].loss
        assert losses[-1].mean() < losses[0].mean()


CHECKED = {"README.md": check_readme}


def begin(namespace):
    """JAX as users have it, where tests are stricter; an empty folder, on Python's path."""
    import jax

    page = Path(namespace["__file__"])
    namespace["_stack"] = stack = contextlib.ExitStack()
    stack.enter_context(jax.numpy_dtype_promotion("standard"))
    stack.enter_context(jax.numpy_rank_promotion("allow"))
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    stack.enter_context(contextlib.chdir(folder))
    patch = stack.enter_context(pytest.MonkeyPatch.context())
    patch.syspath_prepend(folder)
    stack.callback(sys.modules.pop, "own", None)
    if page.name in PREPARED:
        PREPARED[page.name](page)


def end(namespace):
    if "_stack" in namespace:
        with namespace.pop("_stack"):
            CHECKED.get(Path(namespace["__file__"]).name, lambda namespace: None)(namespace)


pytest_collect_file = Sybil(
    [PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md", "docs/*/*.md"],
    document_types={".md": Page},
    teardown=end,
).pytest()
