"""Compiled for TPU slices on a machine without one: batches are split, and one exchange a step sums gradients.

Compiled with XLA's least effort: other schedules and fusions than in docs/scaling.md, the same operations and sums.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks.tpu_compile import MODELS, PROGRAMS, make_model, missing

ROOT = Path(__file__).parents[2]
ONE, EIGHT, MANY = "v5e:1x1", "v5e:2x4", "v5e:16x16"
EACH = (16, 32)  # examples of a step on each chip
TRAINING = [name for name in PROGRAMS if name.startswith("train ")]
OTHERS = [name for name in PROGRAMS if name not in TRAINING]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=str(missing()))]


def compiled(program, slices, each):
    """Rows of ``benchmarks.tpu_compile``."""
    command = [sys.executable, "-m", "benchmarks.tpu_compile", "--json", "--effort=-1", f"--programs={program}"]
    command += [f"--slices={','.join(slices)}", f"--batches={','.join(map(str, each))}"]
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=plain)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def rows(request):
    """A program for one chip, for eight of two hosts and for 256 of 64, by slice and examples on a chip."""
    found = compiled(request.param, (ONE, EIGHT), EACH) + compiled(request.param, (MANY,), EACH[:1])
    return {(row["slice"], row["batch"] // row["chips"]): row for row in found}


def of_several_chips(rows):
    return [row for row in rows.values() if row["chips"] > 1]


@pytest.mark.parametrize("rows", TRAINING, indirect=True)
def test_a_step_is_split_and_sums_its_gradients_in_one_exchange(rows):
    name = rows[EIGHT, EACH[0]]["program"].removeprefix("train ")
    low = name.endswith(" bfloat16")
    model = jax.eval_shape(lambda: make_model(**MODELS[name.removesuffix(" bfloat16")]))
    count = sum(leaf.size for leaf in jax.tree.leaves(model))
    for row in of_several_chips(rows):
        assert row["other_exchanges"] == {}
        # Gradients of weights are bfloat16 where the products are, and summed as such; those of a shared flow (by way
        # of u_hat and of w, so some twice) and figures beside them.
        assert row["all_reduces"] == (2 if low else 1)
        least = (2 if low else 4) * count
        assert least <= row["all_reduce_bytes"] <= 1.03 * least
    # The same number of examples on a chip: the same operations a chip, for each further example as for the rest
    # (optimiser, norm of the gradient, constraint of a shared flow), which every chip does whole.
    one, eight = ([rows[where, each]["operations"] for each in EACH] for where in (ONE, EIGHT))
    assert eight[1] - eight[0] == pytest.approx(one[1] - one[0], rel=0.05)
    for row in of_several_chips(rows):
        assert row["operations"] == pytest.approx(rows[ONE, row["batch"] // row["chips"]]["operations"], rel=0.05)
    check_size(rows)


@pytest.mark.parametrize("rows", OTHERS, indirect=True)
def test_figures_and_densities_are_split(rows):
    one, eight = ([rows[where, each]["operations"] for each in EACH] for where in (ONE, EIGHT))
    assert eight[1] - eight[0] == pytest.approx(one[1] - one[0], rel=0.05)
    check_size(rows)


def check_size(rows):
    assert not any(row["float64"] for row in rows.values())
    assert max(row["memory"] for row in rows.values()) < 1e9  # of a chip's 16 GB
