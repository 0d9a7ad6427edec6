"""The flow benchmark: statistics of timings, the check that contestants do equal work, and the command itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmark_cases import Clock, summary

from benchmarks import flows, peers, problems
from benchmarks.report import print_ratios, ratio
from benchmarks.timing import interleave, spread
from benchmarks.torch_models import Unavailable
from planar_vae_jax.flows._constraint import constrain
from planar_vae_jax.runs.config import UsageError

pytestmark = pytest.mark.usefixtures("any_promotion")


# --- Timing.


def test_spread_is_the_median_and_the_quartiles():
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0], 1e3) == (3000.0, 2000.0, 4000.0, 5)
    with pytest.raises(ValueError, match="at least one"):
        spread([])


def test_contestants_take_turns_in_an_order_that_is_reversed():
    clock = Clock()
    contestants = {"fast": clock.contestant("fast", 0.25), "slow": clock.contestant("slow", 5.0)}
    times = interleave(contestants, seconds=1.0, rounds=2, clock=clock)
    assert times == {"fast": [0.25] * 4, "slow": [5.0] * 2}
    fast = ["prepare fast", *["fast"] * 3]  # the first call is not timed
    # A contestant whose last call took longer than a turn gets no untimed call.
    assert clock.calls == [*fast, "prepare slow", "slow", "slow", "prepare slow", "slow", *fast]


def test_a_slow_contestant_sits_out_once_it_has_had_its_calls():
    clock = Clock()
    contestants = {"slow": clock.contestant("slow", 5.0)}
    assert interleave(contestants, seconds=1.0, rounds=9, clock=clock) == {"slow": [5.0] * 3}
    assert interleave(contestants, seconds=1.0, rounds=9, most_seconds=5.0, clock=clock) == {"slow": [5.0]}
    times = interleave(contestants, seconds=0.0, rounds=9, least_calls=9, warm_up=False, clock=clock)
    assert times == {"slow": [5.0] * 9}


def test_a_ratio_of_what_was_not_measured_is_none():
    assert (ratio(6.0, 2.0), ratio(None, 2.0), ratio(6.0, None), ratio(6.0, 0.0)) == (3.0, None, None, None)


def test_ratios_are_printed(capsys):
    print_ratios({"a / b": 2.0, "a / cc": None})
    assert capsys.readouterr().out == "\na / b   2\na / cc  not measured\n"
    print_ratios({})  # a single contestant has no ratios


def test_the_best_number_of_threads_counts():
    times = {"lower_quartile_ms": 0.0, "upper_quartile_ms": 0.0, "calls": 1}
    rows = [{"name": "a", "threads": threads, "median_ms": 1.0 / threads, **times} for threads in (1, 2)]
    (row,) = flows.best_threads(rows)
    assert (row["threads"], row["median_ms"]) == (2, 0.5)
    assert row["other_threads"] == [{"threads": 1, "median_ms": 1.0, **times}]


# --- Equal work.

CONSTRAINTS = {  # p -> m, as in the source of each package
    "ours": lambda p: jnp.log1p((jnp.e - 1.0) * jnp.exp(p)),
    "softplus": lambda p: jnp.log(1 + jnp.exp(p)),
    "softplus of softplus": lambda p: jnp.log(1 + jax.nn.softplus(p)),
}


@pytest.mark.parametrize("link", problems.LINKS)
def test_undoing_a_constraint_gives_our_u_hat(link, x64):
    generator = np.random.default_rng(0)
    u, w = generator.standard_normal((2, 5, 3, 4))
    theirs = problems.peer_u(jnp.asarray(u), jnp.asarray(w), link)
    p = np.sum(theirs * w, -1, keepdims=True)
    u_hat = theirs + (CONSTRAINTS[link](p) - 1 - p) * w / np.sum(w**2, -1, keepdims=True)
    truth = constrain(jnp.asarray(u), jnp.asarray(w)).u_hat
    np.testing.assert_allclose(u_hat, truth, rtol=1e-10, atol=1e-12)


@pytest.fixture(scope="module", params=[False, True], ids=["shared", "amortized"])
def problem(request):
    """A small problem and our result in float64."""
    generator = np.random.default_rng(0)
    drawn = problems.draw_problem(generator, batch_size=6, dim=5, flow_length=3, amortized=request.param)
    return drawn, peers.truth(drawn)


def test_ours_under_vmap_is_ours(problem):
    drawn, truth = problem
    peer = peers.ours_under_vmap(drawn)
    assert max(problems.disagreement(peer.result(peer.run())._asdict(), truth._asdict()).values()) < 1e-5


@pytest.mark.parametrize("name", peers.PEERS)
def test_every_peer_agrees_with_ours(name, problem):
    drawn, truth = problem
    try:
        peer = peers.PEERS[name](drawn)
    except Unavailable as error:
        pytest.skip(str(error))
    assert peer.result is not None
    errors = problems.disagreement(peer.result(peer.run())._asdict(), truth._asdict())
    assert max(errors.values()) < 1e-5


def test_a_wrong_result_is_refused():
    truth = {"loss": np.float64(1.0), "zK": np.array([1.0, 10.0])}
    assert problems.disagreement({"loss": 1.0, "zK": np.array([1.5, 10.0])}, truth) == {"loss": 0.0, "zK": 0.05}
    for wrong in (np.array([1.5, 10.0]), np.array([np.nan, 10.0])):
        with pytest.raises(Unavailable, match="zK differs"):
            problems.require_agreement({"loss": 1.0, "zK": wrong}, truth)


# --- The commands.


def test_flows(tmp_path, capsys, monkeypatch):
    def wrong(problem):
        peer = peers.ours(problem, "scan")
        return peer._replace(result=lambda output: peer.result(output)._replace(log_det=np.ones(3)))

    def absent(problem):
        raise Unavailable("not installed")

    def broken(problem):
        raise AttributeError("no such\nname")

    monkeypatch.setattr(flows, "PEERS", {"FlowJAX": wrong, "Pyro": absent, "normflows": broken})
    flows.main(["--cases=3x2x2", "--parameters=shared", "--seconds=0.001", "--rounds=1", f"--workdir={tmp_path}"])
    found = summary(tmp_path)
    assert {row["name"] for row in found["rows"]} == {*flows.OURS, flows.FLOOR}
    assert all(row["lower_quartile_ms"] <= row["median_ms"] <= row["upper_quartile_ms"] for row in found["rows"])
    why = {one["name"]: one["why"] for one in found["left_out"]}
    assert set(why) == {"FlowJAX", "Pyro", "normflows"}
    assert why["FlowJAX"].startswith("its log_det differs from ours")
    assert (why["Pyro"], why["normflows"]) == ("not installed", "AttributeError: no such name")
    assert "(3, 2, 2) shared: ours, scan / ours" in capsys.readouterr().out


@pytest.mark.parametrize("argument", ["--cases=3x2", "--cases=3x2x0", "--cases=axbxc", "--peers=nobody", "--rounds=0"])
def test_flows_names_a_wrong_flag(argument, tmp_path):
    with pytest.raises(UsageError, match=argument.split("=")[0]):
        flows.main([argument, f"--workdir={tmp_path}"])
