"""What every benchmark says beside its own figures: the machine, and each goal beside what was reached."""

import importlib.metadata
import os
from typing import Any, NamedTuple

import jax

PACKAGES = ("jax", "jaxlib", "flowjax", "equinox", "normflows", "pyro-ppl", "torch")


class Goal(NamedTuple):
    """A ratio to reach."""

    name: str
    at_least: bool  # otherwise at most
    goal: float | None  # None: shown without a goal
    reached: float | None  # None: not measured in this run

    @property
    def met(self) -> bool | None:
        if self.reached is None or self.goal is None:
            return None
        return self.reached >= self.goal if self.at_least else self.reached <= self.goal


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """None where either is missing."""
    if numerator is None or denominator is None or denominator == 0:
        return None
    return numerator / denominator


def print_goals(goals: list[Goal]) -> None:
    """A line a goal: what it is, the goal, what was reached."""
    width = max(len(goal.name) for goal in goals)
    print(f"\n{'ratio':<{width}}  {'goal':>9}  {'reached':>8}")
    for goal in goals:
        wish = "" if goal.goal is None else f"{'>=' if goal.at_least else '<='} {goal.goal:.3g}"
        reached = "not measured" if goal.reached is None else f"{goal.reached:.3g}"
        verdict = {None: "", True: "met", False: "MISSED"}[goal.met]
        print(f"{goal.name:<{width}}  {wish:>9}  {reached:>8}  {verdict}".rstrip())


def goals_json(goals: list[Goal]) -> list[dict[str, Any]]:
    return [{**goal._asdict(), "met": goal.met} for goal in goals]


def machine() -> dict[str, Any]:
    """The device, the processors and the versions of whatever is installed."""
    device = jax.devices()[0]
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "cpus": os.cpu_count(),
        "cpu": _cpu_name(),
        "load_average": load(),
        "versions": versions,
    }


def load() -> float | None:
    """Processes that wanted a CPU over the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _cpu_name() -> str | None:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        return None
    return names[0] if names else None


def print_machine(facts: dict[str, Any]) -> None:
    """One line, and a warning where something else is running."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    print(f"device: {facts['device']} ({facts['platform']}); {facts['cpus']} x {facts['cpu']}; {versions}", flush=True)
    average = facts["load_average"]
    if average is not None and average > 0.5:
        print(f"the load average is {average:.1f}: something else runs here, and these times will show it", flush=True)
