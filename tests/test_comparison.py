"""Comparison of runs over seeds: statistics, and tables of them."""

import csv
import io

import numpy as np
import pytest

from planar_vae_jax.plotting.lengths import against_length
from planar_vae_jax.statistics import ONE_SEED, comma_separated, compare, markdown, pooled, tables

# Four seeds that differ much among themselves; the second model is better by about 1 with each of them.
FIRST = [90.0, 100.0, 110.0, 96.0]
SECOND = [89.0, 98.9, 109.1, 95.0]


def runs(values):
    return [{"all": {"loss": value}, "3": {"loss": value + 1.0}} for value in values]


def test_paired_differences_are_known_better_than_the_means():
    first, second = compare({0: runs(FIRST), 5: runs(SECOND)}, ["loss"])
    assert (first["flows"], second["flows"]) == (0, 5)
    assert first["loss"] == {"mean": 99.0, "std": pytest.approx(np.std(FIRST, ddof=1)), "by_seed": FIRST}
    minus = second["minus_first"]["loss"]
    assert minus["mean"] == pytest.approx(-1.0)
    assert minus["high"] - minus["low"] == pytest.approx(2 * 3.182446 * np.std([1.0, 1.1, 0.9, 1.0], ddof=1) / 2)
    assert second["loss"]["std"] > 10 * (minus["high"] - minus["low"])
    assert second["per_class"]["3"]["loss"]["mean"] == pytest.approx(99.0)
    assert second["per_class"]["3"]["minus_first"]["loss"] == pytest.approx(minus)


def test_one_seed_and_figures_that_are_not_finite_have_no_interval():
    (row,) = compare({5: runs([3.0])}, ["loss"])
    assert row["loss"] == {"mean": 3.0, "std": None, "by_seed": [3.0]}
    assert row["minus_first"]["loss"] == {"mean": 0.0, "low": None, "high": None}
    assert ONE_SEED in markdown(tables([row], ["loss"]))
    broken = compare({0: runs(FIRST), 5: [*runs(SECOND[:3]), {"all": {"loss": None}, "3": {}}]}, ["loss"])
    assert broken[1]["loss"] == {"mean": None, "std": None, "by_seed": [*SECOND[:3], None]}
    assert broken[1]["minus_first"]["loss"] == {"mean": None, "low": None, "high": None}


def test_classes_are_pooled_by_their_numbers_of_images():
    classes = {"0": {"images": 1, "loss": 4.0, "kl": None}, "1": {"images": 3, "loss": 8.0, "kl": 1.0}}
    assert pooled(classes, ["loss", "kl"]) == {"loss": 7.0, "kl": None}


def test_tables_show_each_figure_once_for_all_and_once_for_each_class():
    rows = compare({0: runs(FIRST), 5: runs(SECOND)}, ["loss"])
    lines = markdown(tables(rows, ["loss"])).splitlines()
    assert "| 0 | 99.0 ± 8.4 |" in lines
    assert "| 5 | -1.00 [-1.13, -0.87] |" in lines
    assert "| 3 | 100.0 ± 8.4 | 99.0 ± 8.4 | -1.00 [-1.13, -0.87] |" in lines
    read = list(csv.DictReader(io.StringIO(comma_separated(rows, ["loss"], [7, 8, 9, 10]))))
    assert [(line["class"], line["flows"]) for line in read] == [("all", "0"), ("all", "5"), ("3", "0"), ("3", "5")]
    assert [float(read[1][f"seed={seed}"]) for seed in (7, 8, 9, 10)] == SECOND
    assert float(read[1]["low"]) == rows[1]["minus_first"]["loss"]["low"]


def test_figures_are_drawn_against_k_with_published_ones_beside():
    rows = compare({0: runs(FIRST), 5: runs(SECOND)}, ["loss"])
    panels = {"loss": [row["loss"] for row in rows], "other": [row["loss"] | {"std": None} for row in rows]}
    published = {"theirs": {"loss": {0: 95.0, 10: 94.0}}}
    figure = against_length([0, 5], panels, title="$what K buys", published=published)
    left, right = figure.axes
    drawn = {line.get_label(): line for line in left.lines}
    assert drawn["theirs"].get_xydata().tolist() == [[0, 95.0], [10, 94.0]]
    assert left.containers[0].lines[0].get_ydata().tolist() == [99.0, 98.0]
    assert "theirs" not in {line.get_label() for line in right.lines}
