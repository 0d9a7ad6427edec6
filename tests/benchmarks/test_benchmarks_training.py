"""The training here and the one in PyTorch are the same; the race between trainings; costs of compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmark_cases import Clock, tiny_task, untrained

from benchmarks import device
from benchmarks.our_training import by_name, from_names
from benchmarks.race import Point, race, reached
from benchmarks.torch_models import Unavailable
from benchmarks.torch_training import STYLES, TorchTraining, make_optimizer
from planar_vae_jax.train import loop as training
from planar_vae_jax.train import optimizers

pytestmark = pytest.mark.usefixtures("any_promotion")


def test_our_training_may_be_split_anywhere():
    task, cut, whole = tiny_task(), untrained(), untrained()
    jax.tree.map(np.testing.assert_array_equal, cut.state.params, task.model())  # compiling took no step
    for steps in (1, 2, 2):  # an epoch has 2 steps
        cut.train(steps)
    whole.train(5)
    assert (cut.epoch, cut.position, int(cut.state.step)) == (2, 1, 5)
    jax.tree.map(np.testing.assert_array_equal, cut.params(), whole.params())
    moved = jax.tree.map(lambda new, old: float(np.max(np.abs(new - old))), cut.params(), task.model())
    assert all(distance > 0.0 for distance in jax.tree.leaves(moved))


def test_names_of_parameters_go_back_and_forth():
    model = tiny_task(flow_length=0).model()
    named = by_name(model)
    assert {"encoder.hidden.first.kernel", "decoder.last.bias"} <= set(named)
    assert not {"posterior.u", "posterior.w", "posterior.b"} & set(named)  # empty
    jax.tree.map(np.testing.assert_array_equal, from_names(named, model), model)


@pytest.mark.parametrize("style", ["eager", "tuned"])
def test_pytorch_trains_the_same_model(style):
    pytest.importorskip("torch")
    task = tiny_task()
    theirs = TorchTraining(task, style, "adam")
    assert max(theirs.errors.values()) < 1e-5
    jax.tree.map(np.testing.assert_array_equal, theirs.params(), task.model())
    theirs.train(4)
    moved = jax.tree.map(lambda new, old: float(np.max(np.abs(new - old))), theirs.params(), task.model())
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
    average = theirs.params().decoder.last.bias[...]
    assert np.max(np.abs(average - theirs.model.logits.bias.detach().numpy())) > 1e-6
    for old, new in zip(before, theirs.model.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-7)
    theirs.train(1)  # training continues after an evaluation


class Learner:
    """A training whose free energy falls by one nat in each step."""

    def __init__(self, clock, name, seconds, start):
        self.clock, self.name, self.seconds, self.value = clock, name, seconds, start

    def train(self, steps):
        self.clock.calls.append((self.name, steps))
        self.clock.now += steps * self.seconds
        self.value -= steps

    def params(self):
        self.clock.now += 100.0  # the time of evaluation is not counted
        return self.value


def test_a_race_takes_turns_until_the_target():
    clock = Clock()
    trainings = {"fast": Learner(clock, "fast", 0.5, 110.0), "slow": Learner(clock, "slow", 2.0, 105.5)}
    shown = []
    curves = race(
        trainings,
        lambda value: value,
        target=100.0,
        epoch_steps=5,
        max_epochs=2,
        show=lambda name, point: shown.append((name, point)),
        clock=clock,
    )
    assert curves["slow"] == [(0.0, 0.0, 105.5), (0.5, 4.0, 103.5), (1.0, 10.0, 100.5), (1.5, 14.0, 98.5)]
    assert curves["fast"][-1] == (2.0, 5.0, 100.0)
    assert clock.calls == [
        *(("fast", 2), ("slow", 2), ("slow", 3), ("fast", 3)),
        *(("fast", 2), ("slow", 2), ("fast", 3)),
    ]
    assert [point for name, point in shown if name == "slow"] == curves["slow"][1:]
    assert reached(curves["slow"], 100.0) == Point(1.5, 14.0, 98.5)
    assert reached(curves["slow"], 98.0) is None


def test_a_race_ends_for_a_training_that_is_not_finite():
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


def test_kernels_of_the_entry_computation_are_counted():
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
