"""Runs the notebook from top to bottom and stores it with its outputs: ``python notebooks/store_outputs.py``.

Trained models are kept in a temporary folder. Pictures are made small, and folders of this machine get other names.
"""

import base64
import io
import os
import tempfile
from pathlib import Path

import nbclient
import nbformat
import pooch
from PIL import Image

NOTEBOOK = Path(__file__).with_name("colab_tpu.ipynb")
CLONE = NOTEBOOK.parents[1]


def run(notebook, folder):
    """Executes the cells; those of set-up find the clone that holds this file."""
    os.environ["PYTHONPATH"] = str(CLONE)  # the kernel's
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    source = parameters.source
    parameters.source = source.replace('REPOSITORY = ""', f"REPOSITORY = {str(CLONE)!r}").replace(
        'WORKDIR = ""', f"WORKDIR = {folder!r}"
    )
    resources = {"metadata": {"path": folder}}
    nbclient.NotebookClient(notebook, timeout=None, coalesce_streams=True, resources=resources).execute()
    parameters.source = source


def clean(notebook, folder):
    """Removes what belongs to this machine and this day: times, folders, and warnings of its packages."""
    notebook.metadata.language_info = {"name": "python"}
    names = {folder: "runs/notebook", pooch.os_cache("planar_vae_jax"): "~/.cache/planar_vae_jax"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            for name, replacement in names.items():
                if "text" in output:
                    output.text = output.text.replace(str(name), replacement)
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = small(output.data["image/png"])


def small(picture):
    """A PNG in base64 of at most 900 pixels in width and 256 colours."""
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image.thumbnail((900, 4000))
    file = io.BytesIO()
    image.quantize(256, method=Image.Quantize.FASTOCTREE).save(file, format="png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        run(notebook, folder)
        clean(notebook, folder)
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
