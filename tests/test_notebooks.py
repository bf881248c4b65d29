"""Notebooks that people can read and papermill can run."""

from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
STEPS = [path for path in NOTEBOOKS if path.name[0] in "12"]


@pytest.mark.parametrize("path", STEPS, ids=lambda p: p.name)
def test_a_step_has_one_parameters_cell_first_and_stores_no_output(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tagged = ["parameters" in cell.metadata.get("tags", []) for cell in code]
    assert tagged == [True] + [False] * (len(code) - 1)
    assert "check_parameters(In)" in code[1].source
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_a_notebook_fits_the_screen_and_names_no_place_of_ours(path):
    notebook = nbformat.read(path, 4)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    for cell in notebook.cells:
        lines = cell.source.splitlines()
        if cell.cell_type == "code":
            assert len(lines) <= 30 and all(len(line) <= 100 for line in lines)
        assert '"work/' not in cell.source, "`make clean` may remove what lies there"
        assert "/work/" not in cell.source and "/root/" not in cell.source
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


@pytest.mark.parametrize("name", ["10_masks", "23_claims", "24_constants"])
def test_what_a_notebook_writes_itself_is_written_within_a_folder_with_a_record(name):
    path = next(path for path in STEPS if path.stem == name)
    for cell in nbformat.read(path, 4).cells:
        lines = cell.source.splitlines()
        for before, line in zip(lines, lines[1:]):
            if ".write(" in line and "claims.write(" not in line or "write_text(" in line:
                assert before.startswith("with files.OutputFolder(") and line.startswith("    ")
        assert "files.replacing" not in cell.source


def test_every_step_of_the_study_has_a_notebook():
    assert [path.name for path in STEPS] == [
        "10_masks.ipynb", "11_train.ipynb", "12_evaluate.ipynb",
        "13_bundled_sam.ipynb", "14_correct_masks.ipynb", "15_edp_sam_study.ipynb",
        "16_other_masks.ipynb", "17_learn_elsewhere.ipynb",
        "18_calibrated_counts.ipynb",
        "20_tables.ipynb", "21_figures.ipynb", "22_ablations.ipynb", "23_claims.ipynb",
        "24_constants.ipynb",
    ]
