"""The house's rules that a machine can read: which way imports go, and how long things may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "xmask"
PAPER = ["nnec", "edp_sam", "segmenters", "model", "features", "decode", "losses", "trainer",
         "metrics", "predict"]
METHOD = [*PAPER, "calibration", "config", "encoder", "presets", "pretrained", "processes"]
# Which rooms a room must not know: the paper stands alone, the command line knows all.
FORBIDDEN = {"": ("study", "tools", "bench", "cli"),
             "data": ("study", "tools", "bench", "cli"),
             "segmenting": ("study", "tools", "bench", "cli"),
             "synthetic": ("study", "tools", "bench", "cli"),
             "study": ("bench", "cli"), "tools": ("bench", "cli"), "bench": ("cli",)}
MODULES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(tree):
    """(module, line) of every import of a module, those inside functions too; of `from a import b`
    both a and a.b, as b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield str(node.module), node.lineno
            yield from ((f"{node.module}.{name.name}", node.lineno) for name in node.names)


def allowed_to_know_all(name):
    return name in ("cli.py", "__main__.py", "__init__.py")  # __init__: `xmask.load`, inside it


@pytest.mark.parametrize("name", [name for name in MODULES if not allowed_to_know_all(name)])
def test_imports_go_one_way(name):
    room = name.split("/")[0] if "/" in name else ""
    wrong = [f"{name}:{line} imports {module}"
             for module, line in imported(ast.parse(MODULES[name].read_text("utf-8")))
             if module.startswith("xmask.") and module.split(".")[1] in FORBIDDEN[room]]
    assert not wrong, f"method <- data, segmenting, synthetic <- study, tools, bench <- cli: {wrong}"


@pytest.mark.parametrize("name", METHOD)
def test_the_method_writes_no_files_and_knows_no_records(name):
    known = {module for module, _ in imported(ast.parse((PACKAGE / f"{name}.py").read_text("utf-8")))}
    assert not known & {"xmask.provenance", "xmask.data.masks", "xmask.data.readers"}
    if name in PAPER:
        assert "xmask.files" not in known


def test_no_module_is_longer_than_600_lines():
    lines = {name: len(path.read_text("utf-8").splitlines()) for name, path in MODULES.items()}
    assert max(lines.values()) <= 600, {name: n for name, n in lines.items() if n > 600}


def test_no_function_is_longer_than_80_lines():
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                assert length <= 80, f"{name}:{node.lineno} {node.name} has {length} lines"


def test_the_ten_files_that_are_the_paper_can_be_read_in_an_afternoon():
    lines = {name: len((PACKAGE / f"{name}.py").read_text("utf-8").splitlines()) for name in PAPER}
    assert sum(lines.values()) <= 3000, lines
