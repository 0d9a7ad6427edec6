"""The Colab notebook: stored with its outputs, and executed from top to bottom with tiny settings."""

import json
import re
from pathlib import Path

import pytest
from image_runs import write_bars

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "colab_tpu.ipynb"
TRAINING = "with_flow = train("  # in the cell that a reader runs again after a disconnect
PICTURES = 15  # that a reader sees
PAGES = ("loss", "reconstructions", "samples", "classes", "interpolations", "traversals", "aggregate")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def settings(notebook):
    """The one cell of parameters."""
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    return cell


def printed(cell, stream="stdout"):
    return "".join(output.text for output in cell.outputs if output.get("name") == stream)


def pictures(cell):
    return [output for output in cell.outputs if "image/png" in output.get("data", {})]


def lines(workdir):
    """Of the metrics, with their seconds: a training that was repeated has others."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def with_settings(**values):
    """The notebook with another value for each of its parameters."""
    notebook, names = nbformat.read(NOTEBOOK, as_version=4), {}
    exec(settings(notebook).source, names)
    assert names.keys() - {"__builtins__"} == values.keys()
    settings(notebook).source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    return notebook


def test_it_is_stored_with_the_outputs_of_one_run_and_small():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert settings(notebook) is code_cells(notebook)[0]
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert sum(len(pictures(cell)) for cell in code_cells(notebook)) == PICTURES
    for cell in code_cells(notebook):
        assert not any(output.output_type == "error" for output in cell.outputs)
        assert not printed(cell, "stderr")
        folders = re.findall(r"(?<![\w.~/])/\w+/\S*", printed(cell))  # of the machine that it ran on
        assert not folders
    assert NOTEBOOK.stat().st_size < 2**20


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter; the notebook runs in another process
def test_it_runs_from_top_to_bottom_and_a_training_that_is_run_again_goes_on(tmp_path, monkeypatch):
    images, runs = write_bars(tmp_path / "bars.npz", (12, 12)), tmp_path / "drive"
    notebook = with_settings(
        REPOSITORY=str(ROOT),
        WORKDIR=str(runs),
        DATASET=str(images),
        EPOCHS=2,
        PLANE_EPOCHS=1,
        BATCH_SIZE=20,
        DENSITY_STEPS=20,
    )
    (training,) = [cell for cell in code_cells(notebook) if TRAINING in cell.source]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the kernel's
    client = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}})

    def run(cell):
        client.execute_cell(cell, notebook.cells.index(cell))

    with client.setup_kernel():
        for cell in notebook.cells:
            run(cell)
        assert sum(len(pictures(cell)) for cell in code_cells(notebook)) == PICTURES
        assert not any(printed(cell, "stderr") for cell in code_cells(notebook))  # no warnings
        assert {folder.name for folder in runs.iterdir()} == {"bars-flows=5", "bars-flows=0", "bars-plane"}
        for folder in runs.iterdir():
            assert json.loads((folder / "summary.json").read_text())["dataset"] == "bars"
            assert all((folder / f"{page}.png").exists() for page in PAGES)
        assert (runs / "bars-plane" / "posteriors.png").exists()

        workdir = runs / "bars-flows=5"
        trained, summary = lines(workdir), (workdir / "summary.json").read_bytes()
        run(training)
        assert "is finished" in printed(training)
        assert (lines(workdir), (workdir / "summary.json").read_bytes()) == (trained, summary)

        training.source = f"EPOCHS += 1\n{training.source}"
        run(training)
        assert "after epoch 2" in printed(training)
        assert lines(workdir)[:-1] == trained
