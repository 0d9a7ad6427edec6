"""The benchmarks of training: ours and PyTorch's are the same training, their race, and each command in a tiny size."""

import contextlib
import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmark_cases import Clock, summary

from benchmarks import accelerator, device, epoch, time_to_quality
from benchmarks.our_training import OurTraining, Task, by_name, from_names, synthetic_images
from benchmarks.race import Point, race, reached
from benchmarks.torch_models import Unavailable
from benchmarks.torch_training import STYLES, TorchTraining, make_optimizer
from planar_vae_jax import optimizers, training
from planar_vae_jax.models import VAE
from planar_vae_jax.runs.config import UsageError


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax and FlowJAX are written for JAX's own defaults."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# --- Training.


TINY = ("--batch_size=8", "--latent=2", "--hidden=4")


def tiny_task(flow_length=5):
    vae = VAE((28, 28), latent=2, hidden=4, flow_length=flow_length)
    return Task(vae, synthetic_images(0, 16), batch_size=8, seed=0)


@pytest.fixture(scope="module")
def trained():
    """A training before its first step, traced and compiled once for all tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        training = OurTraining(tiny_task(), "schedule_free")
        training.compile()
    return training


@pytest.fixture
def traced_once(trained, monkeypatch):
    """The commands' trainings are that one."""
    for benchmark in (accelerator, epoch, time_to_quality):
        monkeypatch.setattr(benchmark, "OurTraining", lambda task, optimizer: copy.copy(trained))
    for benchmark in (accelerator, time_to_quality):
        monkeypatch.setattr(benchmark, "compiled_anew", contextlib.nullcontext)


def test_our_training_may_be_cut_anywhere(trained):
    task, cut, whole = tiny_task(), copy.copy(trained), copy.copy(trained)
    jax.tree.map(np.testing.assert_array_equal, cut.state.params, task.params())  # compiling took no step
    for steps in (1, 2, 2):  # an epoch has 2 steps
        cut.train(steps)
    whole.train(5)
    assert (cut.epoch, cut.position, int(cut.state.step)) == (2, 1, 5)
    jax.tree.map(np.testing.assert_array_equal, cut.params(), whole.params())
    moved = jax.tree.map(lambda new, old: float(np.max(np.abs(new - old))), cut.params(), task.params())
    assert all(distance > 0.0 for distance in jax.tree.leaves(moved))


def test_names_of_parameters_go_back_and_forth():
    params = tiny_task(flow_length=0).params()
    named = by_name(params)
    assert {"encode.hidden.kernel", "decode.logits.bias"} <= set(named)
    assert not {"encode.u", "encode.w", "encode.b"} & set(named)  # empty
    jax.tree.map(np.testing.assert_array_equal, from_names(named, params), params)


@pytest.mark.parametrize("style", ["eager", "tuned"])
def test_pytorch_trains_the_same_model(style):
    pytest.importorskip("torch")
    task = tiny_task()
    theirs = TorchTraining(task, style, "adam")
    assert max(theirs.errors.values()) < 1e-5
    jax.tree.map(np.testing.assert_array_equal, theirs.params(), task.params())
    theirs.train(4)
    moved = jax.tree.map(lambda new, old: float(np.max(np.abs(new - old))), theirs.params(), task.params())
    assert all(0.0 < distance < 0.01 for distance in jax.tree.leaves(moved))  # a step of Adam is at most about 1e-3
    assert {style for style, chosen in STYLES.items() if chosen.layer_modules} == {"eager"}


def test_another_model_is_refused(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr("benchmarks.torch_models.LOG_STD_RANGE", 0.1)
    with pytest.raises(Unavailable, match="differs from ours"):
        TorchTraining(tiny_task(), "eager", "adam")


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_an_optimizer_is_the_same_in_both(name):
    torch = pytest.importorskip("torch")
    if name == "schedule_free":
        pytest.importorskip("schedulefree")
    gradients = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(4))])
    theirs = make_optimizer(torch, model, name, 0)  # no warm-up
    ours = optimizers.make_optimizer(name, learning_rate=optimizers.LEARNING_RATES[name])
    state = training.init_state(jnp.zeros(4), ours)
    update = jax.jit(ours.update)
    for gradient in gradients:
        model[0].grad = torch.tensor(gradient)
        theirs.step()
        change, opt_state = update(jnp.asarray(gradient), state.opt_state, state.params)
        state = training.TrainState(state.params + change, opt_state, state.step + 1)
        np.testing.assert_allclose(model[0].detach().numpy(), state.params, rtol=1e-4, atol=1e-7)
    if name == "schedule_free":
        theirs.eval()
    average = optimizers.evaluation_params(state)
    np.testing.assert_allclose(model[0].detach().numpy(), average, rtol=1e-4, atol=1e-7)


def test_evaluating_leaves_a_schedule_free_training_alone():
    torch = pytest.importorskip("torch")
    pytest.importorskip("schedulefree")
    theirs = TorchTraining(tiny_task(), "tuned", "schedule_free")
    theirs.train(2)
    before = [parameter.detach().clone() for parameter in theirs.model.parameters()]
    average = theirs.params()["decode"]["logits"]["bias"]
    assert np.max(np.abs(average - theirs.model.logits.bias.detach().numpy())) > 1e-6
    for old, new in zip(before, theirs.model.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-7)
    theirs.train(1)  # it may go on


class Learner:
    """A training whose free energy falls by a nat a step."""

    def __init__(self, clock, name, seconds, start):
        self.clock, self.name, self.seconds, self.value = clock, name, seconds, start

    def train(self, steps):
        self.clock.calls.append((self.name, steps))
        self.clock.now += steps * self.seconds
        self.value -= steps

    def params(self):
        self.clock.now += 100.0  # evaluation is not on the clock
        return self.value


def test_a_race_takes_turns_until_the_target():
    clock = Clock()
    trainings = {"fast": Learner(clock, "fast", 0.5, 110.0), "slow": Learner(clock, "slow", 2.0, 105.5)}
    told = []
    curves = race(
        trainings,
        lambda value: value,
        target=100.0,
        epoch_steps=5,
        max_epochs=2,
        show=lambda name, point: told.append((name, point)),
        clock=clock,
    )
    assert curves["slow"] == [(0.0, 0.0, 105.5), (0.5, 4.0, 103.5), (1.0, 10.0, 100.5), (1.5, 14.0, 98.5)]
    assert curves["fast"][-1] == (2.0, 5.0, 100.0)
    assert clock.calls == [
        *(("fast", 2), ("slow", 2), ("slow", 3), ("fast", 3)),
        *(("fast", 2), ("slow", 2), ("fast", 3)),
    ]
    assert [point for name, point in told if name == "slow"] == curves["slow"][1:]
    assert reached(curves["slow"], 100.0) == Point(1.5, 14.0, 98.5)
    assert reached(curves["slow"], 98.0) is None


def test_a_race_does_not_go_on_with_what_is_not_finite():
    clock = Clock()
    curves = race({"": Learner(clock, "", 1.0, np.nan)}, float, target=1.0, epoch_steps=2, max_epochs=9, clock=clock)
    assert len(curves[""]) == 1


# --- The device.

HLO = """\
%fused (p: f32[3]) -> f32[3] {
  %p = f32[3]{0} parameter(0)
  ROOT %neg = f32[3]{0} negate(f32[3]{0} %p)
}

ENTRY %main (x: f32[3]) -> (f32[3], f32[3]) {
  %x = f32[3]{0} parameter(0)
  %one = f32[3]{0} fusion(f32[3]{0} %x), kind=kLoop, calls=%fused
  %two = (f32[3]{0}, s8[0]{0}) custom-call(f32[3]{0} %one), custom_call_target="a"
  %got = f32[3]{0} get-tuple-element((f32[3]{0}, s8[0]{0}) %two), index=0
  ROOT %both = (f32[3]{0}, f32[3]{0}) tuple(f32[3]{0} %one, f32[3]{0} %got)
}
"""


def test_kernels_are_those_of_the_entry():
    assert device.kernels(HLO) == 2


def test_costs_and_their_share_of_the_peak():
    compiled = jax.jit(lambda x: x @ x).lower(jnp.ones((8, 8))).compile()
    found = device.costs(compiled)
    assert found["operations"] == 2 * 8**3
    assert found["bytes"] >= 2 * 4 * 64
    assert found["kernels"] >= 1
    assert device.limits("NVIDIA H100 80GB HBM3") == (67e12, 3.35e12)
    assert device.limits("NVIDIA H100 PCIe") == (51e12, 2.0e12)
    assert device.limits("cpu") is None
    assert device.share(5e9, 1e12, 10.0) == 0.5
    assert device.share(None, 1e12, 10.0) is None
    assert device.share(5e9, None, 10.0) is None


# --- The commands.


def test_epoch(tmp_path, capsys, traced_once):
    epoch.main(["--flows=5", "--images=24", "--steps=2", "--rounds=1", "--peers=none", *TINY, f"--workdir={tmp_path}"])
    found = summary(tmp_path)
    assert [row["name"] for row in found["rows"]] == [epoch.PRODUCTS, "ours, schedule_free", "ours, adam"]
    assert all(row["median_ms"] > 0.0 for row in found["rows"])
    assert found["left_out"] == [{"name": "PyTorch", "why": "--peers=none"}]
    assert (found["steps_an_epoch"], found["extrapolated"]) == (3, True)
    assert found["ratios"]["K=5: ours, adam / products alone"] > 0.0
    assert "ours, schedule_free, K=5" in capsys.readouterr().out


def test_epoch_against_pytorch(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(epoch, "our_slice", lambda task, optimizer: (lambda: None, None))
    sizes = ("--images=24", "--steps=2", "--rounds=1", "--threads=1", "--compiled=0")
    epoch.main(["--flows=5", *sizes, *TINY, f"--workdir={tmp_path}"])
    found = summary(tmp_path)
    peers_of_ours = [row for row in found["rows"] if row["name"].startswith("PyTorch")]
    assert [row["title"] for row in peers_of_ours] == [
        f"PyTorch {style}, K=5, threads=1" for style in ("eager", "tuned")
    ]
    assert all(max(row["errors"].values()) < 1e-5 for row in peers_of_ours)
    assert found["left_out"] == [{"name": "PyTorch compiled, K=5", "why": "--compiled does not name 5"}]
    assert found["ratios"]["K=5: PyTorch eager / ours, adam"] > 0.0


def test_epoch_names_a_wrong_flag(tmp_path):
    with pytest.raises(UsageError, match="--steps must be at most the 3 batches"):
        epoch.main(["--images=24", "--batch_size=8", "--steps=4", f"--workdir={tmp_path}"])


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A small data set in a file."""
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    images = synthetic_images(0, 24)
    np.savez(path, x_train=images[:16], x_test=images[16:])
    return path


def test_time_to_quality(digits, tmp_path, capsys, monkeypatch, traced_once):
    def absent(task):
        raise Unavailable("not installed")

    monkeypatch.setitem(time_to_quality.BUILDERS, "PyTorch compiled, Adam", absent)
    chosen = "--contestants=ours,pytorch-eager-adam,pytorch-compiled-adam"
    flags = (f"--dataset={digits}", "--target=1", "--max_epochs=1", chosen, "--threads=1", *TINY)
    time_to_quality.main([*flags, f"--workdir={tmp_path}"])
    found = summary(tmp_path)
    assert [point["epochs"] for point in found["curves"]["ours"]] == [0.0, 0.5, 1.0]
    row = found["rows"][0]
    assert (row["name"], row["seconds"], row["epochs"]) == ("ours", None, None)
    assert row["ms_a_step"] > 0.0
    assert row["last_free_energy"] == found["curves"]["ours"][-1]["free_energy"] > 300.0
    assert "PyTorch compiled, Adam" in {one["name"] for one in found["left_out"]}
    for curve in found["curves"].values():  # all from the same weights, judged by one function
        assert curve[0] == found["curves"]["ours"][0]
    assert "PyTorch compiled, Adam left out: not installed" in capsys.readouterr().out


def test_what_a_curve_comes_to():
    curve = [Point(0.0, 0.0, 500.0), Point(0.5, 2.0, 101.0), Point(1.0, 4.0, 99.0)]
    rows = [time_to_quality.row(name, curve, 100.0, 8, 3.0) for name in ("ours", "PyTorch eager, Adam")]
    assert rows[0] == {
        "name": "ours",
        "seconds": 4.0,
        "epochs": 1.0,
        "last_free_energy": 99.0,
        "seconds_an_epoch": 4.0,
        "ms_a_step": 500.0,
        "compile_seconds": 3.0,
    }
    assert time_to_quality.compare(rows) == {
        "seconds: PyTorch eager, Adam / ours": 1.0,
        "seconds: PyTorch eager, Adam / ours, Adam": None,
    }


@pytest.mark.parametrize("argument", ["--contestants=nobody", "--batch_size=9", "--dataset=nothing"])
def test_time_to_quality_names_a_wrong_flag(argument, digits, tmp_path):
    with pytest.raises(UsageError, match=argument.split("=")[0]):
        time_to_quality.main([f"--dataset={digits}", argument, f"--workdir={tmp_path}"])


def test_accelerator(digits, tmp_path, capsys, traced_once):
    sizes = ("--cases=3x2x2", "--parameters=shared", "--flows=5", "--prng=threefry2x32", "--seeds=2", "--steps=2")
    times = ("--seconds=0.001", "--rounds=1", f"--dataset={digits}", f"--data_dir={digits.parent}")
    accelerator.main([*sizes, *times, "--target=1", "--max_epochs=1", *TINY, f"--workdir={tmp_path}"])
    found = json.loads((tmp_path / "summary.json").read_text())
    (step,), (seeds,), (flow,), (quality,) = (found[name] for name in ("steps", "seeds", "flows", "quality"))
    assert step["products"] == 2 * 8 * (3 * (2 * 784 * 4 + 4 * 4 + 2 * 4) - 784 * 4)
    assert step["operations"] > step["products"]
    assert step["steps_a_second"] == pytest.approx(1e3 / step["median_ms"])
    assert seeds["ms_a_seed"] == pytest.approx(seeds["median_ms"] / 2)
    assert flow["name"] == "(3, 2, 2) shared"
    assert flow["operations"] > 0.0
    assert [point["epochs"] for point in quality["curve"]] == [0.0, 0.5, 1.0]
    assert found["left_out"] == []
    assert "K=5, threefry2x32" in capsys.readouterr().out


def test_accelerator_names_what_it_did_not_come_to(tmp_path, capsys):
    accelerator.main(["--minutes=1e-9", "--cases=3x2x2", "--flows=0", "--seeds=1", *TINY, f"--workdir={tmp_path}"])
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["left_out"] == [
        *("steps: K=0, threefry2x32", "steps: K=0, rbg", "seeds: 1 at once"),
        *("flows: (3, 2, 2) shared", "flows: (3, 2, 2) amortized"),
    ]
    assert "left out after --minutes=1e-09" in capsys.readouterr().out
