"""Compiled for TPU slices on a machine without one: batches are split, and one exchange a step sums gradients."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAINING = ("train K=0", "train K=5", "train K=80", "train K=5 amortised", "train K=80 amortised", "train K=5 bfloat16")
EACH = (16, 32)  # examples of a step on each chip
PARAMETERS = 784 * 400 + 400 + 2 * (400 * 40 + 40) + 40 * 400 + 400 + 400 * 784 + 784  # of encoder and decoder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra `tpu`)"),
]


def compiled(*arguments):
    """Rows of ``benchmarks.tpu_compile``, by slice, program and examples on a chip."""
    command = [sys.executable, "-m", "benchmarks.tpu_compile", "--json", f"--batches={','.join(map(str, EACH))}"]
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, env=plain)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {(row["slice"], row["program"], row["batch"] // row["chips"]): row for row in rows}


@pytest.fixture(scope="module")
def rows():
    """Everything for one chip and for eight, and two training steps for 256 on 64 hosts."""
    large = compiled("--slices=v5e:16x16", "--programs=train K=5,train K=80 amortised")
    return compiled("--slices=v5e:1x1,v5e:2x4") | large


def test_no_program_has_float64_or_exchanges_anything_but_sums(rows):
    for name, row in rows.items():
        assert not row["float64"], name
        if row["program"] in TRAINING:
            assert row["other_exchanges"] == {}, name


@pytest.mark.parametrize("program", TRAINING)
def test_a_step_sums_its_gradients_in_one_exchange(rows, program):
    for (_, name, _), row in rows.items():
        if name != program or row["chips"] == 1:
            continue
        # Gradients of weights are bfloat16 where the products are, and summed as such; biases and figures beside them.
        low = "bfloat16" in name
        assert row["all_reduces"] == (2 if low else 1)
        assert row["all_reduce_bytes"] >= (2 if low else 4) * PARAMETERS


@pytest.mark.parametrize("program", TRAINING)
def test_what_grows_with_the_batch_is_the_chips_share(rows, program):
    for (slice_name, name, _), row in rows.items():
        if name != program or row["chips"] == 1:
            continue
        one, many = ([rows[where, name, each]["operations"] for each in EACH] for where in ("v5e:1x1", slice_name))
        # The same number of examples on a chip: the same operations a chip, for each further example as for the rest
        # (optimiser, norm of the gradient, constraint of a shared flow), which every chip does whole.
        assert many[1] - many[0] == pytest.approx(one[1] - one[0], rel=0.05)
        assert many[0] == pytest.approx(one[0], rel=0.05)


def test_memory_fits_a_chip(rows):
    assert all(row["memory"] < 1e9 for row in rows.values())  # of 16 GB
