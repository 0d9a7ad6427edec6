"""Training as a pure function of a PRNG key; it knows no model and no data set.

- ``loop``: ``train``, a whole run on arrays in memory; ``train_steps``, the piece of it that :mod:`planar_vae_jax.runs`
  calls; ``TrainState``, what the next step needs, and ``StepInfo``, what people read of a step; ``Loss``, the type of
  what is minimised.
- ``optimizers``: ``make_optimizer``, the optimisers of the experiments by name; ``evaluation_params``, the parameters
  that a model is evaluated with, which for a schedule-free optimiser are an average.
- ``mesh``: ``data_mesh``, devices in a row; ``split`` and ``everywhere``, arrays split over them or whole on each;
  ``in_shares``, a function called by each device with its share.
"""

from planar_vae_jax.train.loop import Loss, StepInfo, TrainState, train
from planar_vae_jax.train.optimizers import evaluation_params, make_optimizer

__all__ = ["Loss", "StepInfo", "TrainState", "evaluation_params", "make_optimizer", "train"]
