"""The optimisers of the experiments, and the parameters that a model is evaluated with.

Schedule-free AdamW (Defazio et al. 2024, arXiv 2405.15682) computes gradients at one point ``y``; the model is
evaluated at another, the average ``x`` of earlier points. Its learning rate does not decay, so the number of epochs is
not fixed in advance: a longer run continues a shorter one.
"""

from typing import Any

import jax
import optax
from optax.contrib import ScheduleFreeState, schedule_free_adamw, schedule_free_eval_params

from planar_vae_jax.train.loop import TrainState

OPTIMIZERS = ("schedule_free", "adam")
LEARNING_RATES = {"schedule_free": 8e-3, "adam": 1e-3}
CONVOLUTIONS_LEARNING_RATE = 1e-3  # gated convolutions on 28 x 28 pixels diverge at 8e-3 (BUILD_NOTES.md)


def make_optimizer(
    name: str,
    *,
    learning_rate: float | optax.Schedule,
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
) -> optax.GradientTransformation:
    """Returns an optax optimiser by its name, one of ``OPTIMIZERS``.

    Args:
        learning_rate: constant after the warm-up; Adam without a warm-up also takes a schedule, a function of the step.
        warmup_steps: steps over which the learning rate grows from 0.
        weight_decay: decoupled from the gradient (AdamW).
        clip_norm: gradients with a greater norm are scaled down to this norm; 0 switches that off.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}; got {name!r}")
    if name == "schedule_free":
        # b1 = 0.95: a little better than 0.9 at every learning rate that was tried (BUILD_NOTES.md).
        optimizer = schedule_free_adamw(learning_rate, warmup_steps or None, b1=0.95, weight_decay=weight_decay)
    else:
        rate = optax.warmup_constant_schedule(0.0, learning_rate, warmup_steps) if warmup_steps else learning_rate
        optimizer = optax.adamw(rate, weight_decay=weight_decay) if weight_decay else optax.adam(rate)
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer) if clip_norm else optimizer


def averaged_params(state: TrainState) -> Any:
    """Returns the averaged parameters of a schedule-free optimiser; None for any other optimiser."""
    nodes = jax.tree.leaves(state.opt_state, is_leaf=lambda node: isinstance(node, ScheduleFreeState))
    averages = [node for node in nodes if isinstance(node, ScheduleFreeState)]
    return schedule_free_eval_params(averages[0], state.params) if averages else None


def evaluation_params(state: TrainState) -> Any:
    """Returns the parameters to evaluate: the average of a schedule-free optimiser, else the newest."""
    average = averaged_params(state)
    return state.params if average is None else average
