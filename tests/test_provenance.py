"""Fingerprints follow what code says; stamps that are damaged say that nothing is done."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmask import files, provenance

CODE = '''
"""A module."""
import math
from xmask import nnec


def area(radius: float, *, half: bool = False) -> float:
    """Of a disc."""
    return math.pi * radius**2 * (0.5 if half else 1)  # px
'''
SAME = '''
import math

from xmask import nnec

def area(radius:float,
         *, half:bool=False)->float:
    return (math.pi*radius ** 2 * (
        0.5 if half else 1))
'''


def said(source: str) -> str:
    return provenance._parsed(source)[0]


def test_comments_docstrings_and_formatting_do_not_count():
    assert said(CODE) == said(SAME)


@pytest.mark.parametrize("old, new", [
    ("0.5 if", "0.4 if"), ("radius**2", "radius*2"), ("half: bool = False", "half: bool = True"),
    ("import math", "import cmath as math"), ('"""Of a disc."""', "radius += 1"),
])
def test_whatever_else_changes_counts(old, new):
    assert old in CODE and said(CODE) != said(CODE.replace(old, new))


def test_the_digest_is_the_same_under_every_python():
    """Found under 3.10, 3.11, 3.12 and 3.13, whose own dumps of a tree differ."""
    source = ('def f(a, /, *b: int, c=None, **d):\n    "doc"\n    x = {**d, 1: f"{a!r:>{c}}"}\n'
              '    match a:\n        case [1, *_]: return x[1:2, ...]\n'
              '    with open(a) as g, b: pass\n    return lambda: (yield)\n'
              'class K(list, metaclass=type):\n    y: float = -1.5e-3\n')
    assert said(source)[:16] == "e18fc3c42efce5fd"


def test_code_follows_imports_within_functions_but_not_the_configuration(monkeypatch):
    sources = {
        "xmask/a.py": "def f():\n    from xmask.room import thing\n",
        "xmask/room/__init__.py": "from xmask.room.deep import thing\nfrom xmask import config",
        "xmask/room/deep.py": "thing = 1",
        "xmask/config.py": "lr = 1", "xmask/other.py": "",
    }
    monkeypatch.setattr(provenance, "_installed", lambda path: sources.get(path))
    before = provenance.code("xmask.a")
    sources["xmask/other.py"] = sources["xmask/config.py"] = "lr = 2"
    assert provenance.code("xmask.a") == before
    sources["xmask/room/deep.py"] = "thing = 2"
    assert provenance.code("xmask.a") != before


def test_no_module_imports_relatively_so_that_none_is_overlooked():
    for path in (provenance.ROOT / "xmask").rglob("*.py"):
        assert "\nfrom ." not in path.read_text(encoding="utf-8"), path


def test_the_code_of_a_step_may_be_fingerprinted_in_many_threads():
    provenance._parsed.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(provenance.code, ["xmask.trainer"] * 8))
    assert len(set(found)) == 1 and found[0] != provenance.code("xmask.study.tables")


# -- stamps --------------------------------------------------------------------------------


@pytest.fixture
def stamped(tmp_path):
    output, stamp = tmp_path / "numbers.csv", tmp_path / "stamps" / "step.json"
    output.write_text("1,2\n")
    provenance.write_stamp(stamp, "print", [output])
    return stamp, output


def test_a_step_is_done_while_fingerprint_and_outputs_stay(stamped):
    stamp, output = stamped
    assert provenance.is_done(stamp, "print") and not provenance.is_done(stamp, "other")
    output.write_text("1,3\n")
    assert not provenance.is_done(stamp, "print")
    output.unlink()
    assert not provenance.is_done(stamp, "print")


@pytest.mark.parametrize("content", [
    b"", b"{}", b"[]", b"text", b"null", b"\xff\xfe\x00", b'{"fingerprint": "print"}',
    b'{"fingerprint": "print", "outputs": ["a"]}', b'{"fingerprint": "print", "outputs": {"": 1}}',
    b'{"fingerprint": "print", "outputs": {"\\u0000": 1}}', b"[" * 100_000,
])
def test_a_damaged_stamp_says_not_done(stamped, content):
    stamp, _ = stamped
    stamp.write_bytes(content)
    assert provenance.is_done(stamp, "print") is False


JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@given(st.binary() | st.dictionaries(st.sampled_from(["fingerprint", "outputs"]), JSON))
def test_no_stamp_raises(tmp_path_factory, content):
    stamp = tmp_path_factory.mktemp("stamp") / "stamp.json"
    stamp.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert provenance.is_done(stamp, "print") is False


def test_a_stamp_names_the_commit_for_people(stamped):
    assert set(files.read_json(stamped[0])) == {"fingerprint", "outputs", "git", "machine",
                                                "finished"}
