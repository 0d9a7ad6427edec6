"""Quality of variational guides in NumPyro: ``AutoPlanar`` beside NumPyro's own, and what each brings to NUTS.

    pip install -e '.[experiments,numpyro]'
    python -m benchmarks.guides

trains each guide on each model with ``SVI`` from the same seeds and with the same optimiser, Adam with an exponentially
decaying rate, prints two tables, and writes ``summary.json`` to ``runs/bench-guides``:

- the negative ELBO after training, on ``--particles_at_end`` draws; the number of parameters, and the median time of a
  step of one seed;
- effective samples per 1,000 gradients of NUTS on the model itself and in the noise of each trained guide
  (``NeuTraReparam``): the least effective sample size of all latent variables over the gradients after the warm-up.
  ``AutoNormal`` is not a guide that ``NeuTraReparam`` takes.

The models: ``banana``, x ~ N(0, 1), y ~ N(x^2, 0.2); ``noncentred`` and ``centred``, the two forms of the eight schools
(Rubin 1981) with mu ~ N(0, 5) and tau ~ HalfCauchy(5); ``funnel``, y ~ N(0, 3), nine variables N(0, exp(y / 2)). Banana
and funnel have no data, so that the negative ELBO is the KL divergence to the model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
from numpyro import distributions as dist
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, autoguide
from numpyro.infer.reparam import NeuTraReparam

from benchmarks.report import Results, load, machine, print_machine
from benchmarks.timing import Contestant, interleave, spread
from planar_vae_jax.clients.numpyro import AutoPlanar
from planar_vae_jax.runs.config import UsageError, flag, parse
from planar_vae_jax.runs.console import run_main

EFFECTS = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def banana() -> None:
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(jnp.square(x), 0.2))


def noncentred() -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", len(EFFECTS)):
        theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
        numpyro.sample("effect", dist.Normal(mu + tau * theta, ERRORS), obs=EFFECTS)


def centred() -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", len(EFFECTS)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("effect", dist.Normal(theta, ERRORS), obs=EFFECTS)


def funnel() -> None:
    y = numpyro.sample("y", dist.Normal(0.0, 3.0))
    with numpyro.plate("variables", 9):
        numpyro.sample("x", dist.Normal(0.0, jnp.exp(0.5 * y)))


MODELS: dict[str, Callable[[], None]] = {
    "banana": banana,
    "noncentred": noncentred,
    "centred": centred,
    "funnel": funnel,
}
GUIDES: dict[str, Any] = {
    "normal": autoguide.AutoNormal,
    "multivariate": autoguide.AutoMultivariateNormal,
    "iaf": autoguide.AutoIAFNormal,
    "bnaf": autoguide.AutoBNAFNormal,
    "planar": AutoPlanar,
}
PLAIN = "NUTS alone"


@dataclass(frozen=True)
class Config:
    """Flags of ``benchmarks.guides``."""

    models: str = flag("all", f"all, or names joined by commas: {', '.join(MODELS)}")
    guides: str = flag("all", f"all, or names joined by commas: {', '.join(GUIDES)}")
    seeds: int = flag(3, "seeds, trained beside each other", at_least=1)
    steps: int = flag(4000, "steps of SVI", at_least=1)
    particles: int = flag(16, "draws of a step", at_least=1)
    learning_rate: float = flag(0.03, "of Adam at the first step", above=0)
    decay: float = flag(0.01, "the rate of the last step over that of the first", above=0, at_most=1)
    particles_at_end: int = flag(100_000, "draws for the negative ELBO after training", at_least=1)
    samples: int = flag(1000, "samples of NUTS for each seed, after as many of warm-up; 0: no NUTS", at_least=0)
    seconds: float = flag(2.0, "seconds for which the steps of a guide are timed", above=0)
    workdir: str = flag("runs/bench-guides", "folder for the results")


class Trained(NamedTuple):
    """One guide, trained on one model from several seeds."""

    guide: Any
    params: Any  # of each seed, with a leading axis
    parameters: int  # of one seed
    negative_elbo: np.ndarray  # [seeds], nats
    steps: Callable[[], Any]  # takes 100 steps of one seed


def main(argv: list[str]) -> None:
    """Measures, prints and writes; ``argv`` without the program's name."""
    config = parse(Config, argv, __doc__)
    models = _chosen("models", config.models, MODELS)
    guides = _chosen("guides", config.guides, GUIDES)
    results = Results(config, "guides")
    facts = machine()
    print_machine(facts)
    summary: dict[str, Any] = {"machine": facts, "rows": [], "nuts": []}
    for model in models:
        trained = {guide: train(MODELS[model], GUIDES[guide], config) for guide in guides}
        times = interleave(
            {guide: Contestant(one.steps) for guide, one in trained.items()}, seconds=config.seconds, rounds=4
        )
        for guide, one in trained.items():
            row = {
                "model": model,
                "guide": GUIDES[guide].__name__,
                "negative_elbo": [float(value) for value in one.negative_elbo],
                "parameters": one.parameters,
                "microseconds_a_step": spread(times[guide], 1e6 / 100)._asdict(),
            }
            summary["rows"].append(row)
            _print_row(row)
        for row in _nuts_rows(model, trained, config):
            summary["nuts"].append(row)
            _print_nuts(row)
    summary["machine"]["load_average_at_end"] = load()
    results.write(summary)


def _chosen(name: str, text: str, known: Mapping[str, Any]) -> list[str]:
    names = list(known) if text == "all" else [one.strip() for one in text.split(",")]
    for one in names:
        if one not in known:
            raise UsageError(f"--{name} must be all, or of {', '.join(known)}; got {one!r}")
    return names


def train(model: Callable[[], None], make: Callable[[Any], Any], config: Config) -> Trained:
    """Trains the guide on the model from each seed."""
    guide = make(model)
    schedule = optax.exponential_decay(config.learning_rate, config.steps, config.decay)
    optimizer = numpyro.optim.optax_to_numpyro(optax.adam(schedule))
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=config.particles))
    first = svi.init(jax.random.key(0))  # also looks at the model, which the guide remembers
    at_end = Trace_ELBO(num_particles=config.particles_at_end)

    def steps(state: Any, number: int) -> Any:
        return jax.lax.scan(lambda state, _: (svi.update(state)[0], None), state, None, number)[0]

    @jax.jit
    @jax.vmap
    def run(seed: jax.Array) -> tuple[Any, jax.Array]:
        params = svi.get_params(steps(svi.init(jax.random.key(seed)), config.steps))
        return params, at_end.loss(jax.random.key(2**31), params, model, guide)

    params, negative_elbo = run(jnp.arange(config.seeds))
    hundred = jax.jit(steps, static_argnums=1)
    jax.block_until_ready(hundred(first, 100))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params)) // config.seeds
    return Trained(
        guide, params, parameters, np.asarray(negative_elbo), lambda: jax.block_until_ready(hundred(first, 100))
    )


# --- NUTS


def _nuts_rows(model: str, trained: Mapping[str, Trained], config: Config) -> list[dict[str, Any]]:
    """A row for NUTS alone, and one for each guide that ``NeuTraReparam`` takes."""
    if not config.samples:
        return []
    rows = [_nuts_row(model, PLAIN, [MODELS[model]] * config.seeds, config)]
    for one in trained.values():
        if isinstance(one.guide, autoguide.AutoContinuous):
            each = [jax.tree.map(lambda leaf, i=i: leaf[i], one.params) for i in range(config.seeds)]
            moved = [NeuTraReparam(one.guide, params) for params in each]
            models = [neutra.reparam(MODELS[model]) for neutra in moved]
            rows.append(_nuts_row(model, type(one.guide).__name__, models, config))
    return rows


def _nuts_row(model: str, name: str, models: list[Any], config: Config) -> dict[str, Any]:
    found = [nuts(one, seed, config.samples) for seed, one in enumerate(models)]
    return {"model": model, "guide": name, **{key: [one[key] for one in found] for key in found[0]}}


def nuts(model: Callable[[], None], seed: int, samples: int) -> dict[str, Any]:
    """Runs NUTS: ``{"per_1000_gradients", "effective", "gradients", "diverging"}``, after the warm-up.

    The effective sample size is the least of all latent variables of the original model.
    """
    mcmc = MCMC(NUTS(model), num_warmup=samples, num_samples=samples, progress_bar=False)
    mcmc.run(jax.random.key(seed), extra_fields=("num_steps", "diverging"))
    extra = mcmc.get_extra_fields()
    of_model = {name: value for name, value in mcmc.get_samples(True).items() if not name.startswith("auto_")}
    effective = min(float(np.min(effective_sample_size(np.asarray(value)))) for value in of_model.values())
    gradients = int(np.sum(extra["num_steps"]))
    return {
        "per_1000_gradients": 1e3 * effective / gradients,
        "effective": effective,
        "gradients": gradients,
        "diverging": int(np.sum(extra["diverging"])),
    }


# --- Tables


def _print_row(row: Mapping[str, Any]) -> None:
    values = " ".join(f"{value:8.3f}" for value in row["negative_elbo"])
    time = f"{row['microseconds_a_step']['median']:7.0f} us a step"
    mean = f"negative ELBO {np.mean(row['negative_elbo']):8.3f} by seed {values}"
    print(f"{row['model']:<11} {row['guide']:<23} {row['parameters']:6d} parameters {mean} {time}", flush=True)


def _print_nuts(row: Mapping[str, Any]) -> None:
    values = " ".join(f"{value:8.2f}" for value in row["per_1000_gradients"])
    mean = f"{np.mean(row['per_1000_gradients']):8.2f} by seed {values}"
    diverging = sum(row["diverging"])
    print(
        f"{row['model']:<11} {row['guide']:<23} effective per 1,000 gradients {mean} ({diverging} diverging)",
        flush=True,
    )


if __name__ == "__main__":
    run_main(main)
