"""A digest of code leads back to the commits that carry it."""

import subprocess

import pytest

from xmask import files, provenance
from xmask.cli import main
from xmask.study import commits, steps


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """Four commits of a package: A, the same with a comment, B, A again."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t"]
    (tmp_path / "xmask").mkdir()
    subprocess.run([*git, "init", "-q"], check=True)
    for subject, text in (("A", "x = 1"), ("A, said", "x = 1  # one"), ("B", "x = 2"),
                          ("A again", "x = 1")):
        (tmp_path / "xmask" / "a.py").write_text(text)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-qm", subject], check=True)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    provenance._installed.cache_clear()
    yield tmp_path
    provenance._installed.cache_clear()


def test_a_digest_names_the_commits_that_carry_it(clone):
    wanted = provenance.code("xmask.a")
    found = [line.split(" ", 2)[2] for line in commits.commits_of(wanted, ["xmask.a"], 200)]
    assert found == ["A again", "A, said", "A"]
    assert len(list(commits.commits_of(wanted[:10], ["xmask.a"], 2))) == 1
    assert not list(commits.commits_of("0" * 64, ["xmask.a"], 200))
    assert provenance.commit()["changed"] is False
    (clone / "xmask" / "a.py").write_text("x = 3")
    assert provenance.commit()["changed"] is True


def test_outside_a_clone_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(ValueError, match="run this in a clone of the repository"):
        list(commits.commits_of("0", ["xmask.a"], 200))
    assert provenance.commit() == {}


def test_the_command_finds_the_commits_of_a_run(clone, monkeypatch, capsys):
    run = clone / "run"
    code = {"digest": provenance.code("xmask.a"), "modules": ["xmask.a"]}
    for name in ("config.json", "metrics.json"):
        files.write_json(run / name, {"code": code})
    assert main(["code", str(run), "--limit", "9"]) == 0
    shown = capsys.readouterr().out
    assert f"config.json: {code['digest'][:16]}, the same as the code here" in shown
    assert shown.count("A again") == 2 and "B" not in shown
    (run / "metrics.json").unlink()  # trained, and not evaluated yet
    assert main(["code", str(run), "--limit", "9"]) == 0
    assert capsys.readouterr().out.count("A again") == 1
    monkeypatch.setattr(steps, "CODE", {"training": ("xmask.a",)})
    assert main(["code", "0" * 8, "--limit", "3"]) == 0
    shown = capsys.readouterr().out
    assert "not the same as the code here" in shown
    assert "none of the last 3 commits carries it" in shown


@pytest.mark.parametrize("wanted, message", [
    ("results/nowhere", "neither a run folder nor a digest"), ("abc", "8 to 64 digits"),
    (".", "config.json: holds no digest of code")])
def test_what_is_neither_a_run_nor_a_digest_is_refused(wanted, message, tmp_path, monkeypatch,
                                                       capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["code", wanted]) == 1
    assert message in capsys.readouterr().err
