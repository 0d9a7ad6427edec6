"""The pictures of docs/how_it_works.md are drawn by docs/draw.py from the library's own functions."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def draw():
    spec = importlib.util.spec_from_file_location("draw", DOCS / "draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("any_promotion")
def test_each_picture_of_the_page_is_drawn(draw, tmp_path):
    draw.main([f"--output={tmp_path}"])
    shown = re.findall(r'(?:\]\(|src=")(\w+\.(?:png|svg))', (DOCS / "how_it_works.md").read_text())
    assert sorted(shown) == sorted(file.name for file in tmp_path.iterdir()) == sorted(draw.PICTURES)


@pytest.mark.usefixtures("any_promotion")
def test_the_usual_log_determinant_is_lost_where_the_page_says_so_and_ours_is_not(draw):
    a, p, usual, ours = map(np.asarray, draw.log_determinants(side=101))
    a, p = a.astype(np.float64), p.astype(np.float64)
    exact = np.log(np.tanh(a) ** 2 + np.log1p((np.e - 1) * np.exp(p))[:, None] / np.cosh(a) ** 2)
    np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-12)
    lost = np.isneginf(usual)
    assert lost[np.ix_(p < -18, np.abs(a) < 1.5e-4)].all()
    np.testing.assert_allclose(usual[p > -5], exact[p > -5], rtol=1e-3, atol=1e-6)
