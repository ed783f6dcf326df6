"""The demo notebooks run from top to bottom."""

from pathlib import Path

import pytest

DEMOS = Path(__file__).resolve().parents[2] / "demos"


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(DEMOS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook(path, shared, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("STORIES", str(shared("models/stories260K").parents[1]))
    monkeypatch.setenv("RUNS", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    assert any("assert" in cell.source for cell in notebook.cells if cell.cell_type == "code")
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(DEMOS)}}).execute()
