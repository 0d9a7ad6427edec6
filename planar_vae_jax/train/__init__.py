"""Training as a pure function of a PRNG key; it knows no model and no data set.

- ``loop``: ``train``, a whole run on arrays in memory; ``train_steps``, some steps of an epoch, which
  :mod:`planar_vae_jax.runs` calls; ``TrainState``, what the next step needs; ``StepInfo``, the figures of a step;
  ``Loss``, the type of a loss function.
- ``optimizers``: ``make_optimizer``, the optimisers of the experiments by name; ``evaluation_params``, the parameters
  that a model is evaluated with, which for a schedule-free optimiser are an average.
- ``mesh``: ``data_mesh``, a mesh of devices with one axis; ``split`` and ``everywhere``, arrays split over the devices
  or whole on each; ``in_shares``, a function that each device calls with its share.
"""

from planar_vae_jax.train.loop import Loss, StepInfo, TrainState, train
from planar_vae_jax.train.optimizers import evaluation_params, make_optimizer

__all__ = ["Loss", "StepInfo", "TrainState", "evaluation_params", "make_optimizer", "train"]
