"""The notebooks run as they are written, in a folder of their own."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))
assert NOTEBOOKS, "an empty list would skip the test instead of failing it"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_notebook_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = [out["text"] for cell in notebook.cells for out in cell.get("outputs", []) if out["output_type"] == "stream"]
    before, after = (float(part) for text in printed if text.startswith("loss ") for part in text.split()[1::2])
    assert after < before - 0.5
    assert (tmp_path / "notebook-model.gguf").is_file()
    equal = [out["data"]["text/plain"] for cell in notebook.cells for out in cell.get("outputs", []) if "data" in out]
    assert "True" in equal
