"""The steps of a run: in epochs, for people, and in calls, for the machine."""

from dataclasses import dataclass
from typing import NamedTuple

SECONDS = 1.0  # of a call


class Epochs(NamedTuple):
    """The steps of a run, in epochs of which the last may be shorter."""

    steps: int  # of the whole run
    steps_per_epoch: int
    unit: str  # in which people count: "epoch" or "step"

    @property
    def number(self) -> int:
        """How many epochs there are."""
        return -(-self.steps // self.steps_per_epoch)

    def check_size(self, size: int | None, batch_size: int | None) -> None:
        """Checks that there are examples enough for an epoch; ``None``: none are needed.

        Raises:
            ValueError: it is to take more than there are.
        """
        if size is not None and not 1 <= self.steps_per_epoch * (batch_size or size + 1) <= size:
            raise ValueError(
                f"an epoch takes each of the {size} examples of data at most once; got "
                f"steps_per_epoch={self.steps_per_epoch} of batch_size={batch_size}"
            )

    def length(self, epoch: int) -> int:
        """Steps of an epoch."""
        return min(self.steps_per_epoch, self.steps - epoch * self.steps_per_epoch)

    def end(self, epochs: int) -> int:
        """Steps done when so many epochs are."""
        return min(self.steps, epochs * self.steps_per_epoch)

    def done(self, epochs: int) -> int:
        """How many epochs or steps people count when so many epochs are done."""
        return epochs if self.unit == "epoch" else self.end(epochs)

    def name(self, step: int) -> str:
        """What people call the state after so many steps: ``epoch 3 (step 1404)``, ``step 1404``."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        if self.unit == "step":
            return f"step {step}"
        return f"epoch {epochs}{f' and {rest} steps' if rest else ''} (step {step})"

    def folder(self, step: int) -> str:
        """The name of a folder for the figures of that state."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        return f"step-{step}" if rest or self.unit == "step" else f"epoch-{epochs}"


@dataclass
class Done:
    """How far a run is; what its checkpoint holds beside its arrays."""

    epoch: int = 0  # epochs done, and so many lines of metrics
    position: int = 0  # steps done of the next
    epoch_seconds: float = 0.0  # spent on it
    seconds: float = 0.0  # spent on the run


class Pace:
    """How many steps a call takes, so that it lasts about a second; nothing that is computed depends on it."""

    def __init__(self) -> None:
        self._steps = 8

    def end(self, start: int, stop: int) -> int:
        """Where a call that starts at ``start`` is to end; a small rest is taken along."""
        end = start + self._steps
        return stop if stop - end < self._steps // 2 else end

    def took(self, steps: int, seconds: float) -> None:
        """Learns from a call. Slowly upwards: the first calls are short, or spent on compilation."""
        self._steps = max(1, min(8 * self._steps, int(steps * SECONDS / max(seconds, 1e-9))))
