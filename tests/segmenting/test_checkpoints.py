"""A SAM by name is the published file or an error that says what to do; nothing else passes."""

from __future__ import annotations

import functools
import http.server
import threading

import pytest
import segment_anything
import torch

from tests.test_segmenters import tiny_sam
from xmask import files
from xmask.cli import main
from xmask.segmenters import open_segmenter
from xmask.segmenting import checkpoints
from xmask.segmenting.checkpoints import Published

NAME = "sam_vit_b_01ec64.pth"


@pytest.fixture
def release(tmp_path, monkeypatch):
    """A release on this machine: a server of a folder with one tiny SAM, published as vit_b."""
    served = tmp_path / "served"
    served.mkdir()
    torch.save(tiny_sam(side=64, width=768).state_dict(), served / NAME)
    monkeypatch.setitem(
        segment_anything.sam_model_registry, "vit_b", lambda: tiny_sam(side=64, width=768))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(served)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(checkpoints, "RELEASE", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setitem(checkpoints.PUBLISHED, "vit_b", Published(
        NAME, files.sha256(served / NAME), (served / NAME).stat().st_size))
    monkeypatch.setenv(checkpoints.VARIABLE, str(tmp_path / "weights"))
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_published_files_are_those_of_the_release():
    # The digits in the makers' file names are the beginning of the MD5, so they cannot vouch for
    # a SHA-256; but a typing error would show in its length.
    assert {name: one.file for name, one in checkpoints.PUBLISHED.items()} == {
        "vit_b": "sam_vit_b_01ec64.pth", "vit_l": "sam_vit_l_0b3195.pth",
        "vit_h": "sam_vit_h_4b8939.pth"}
    for one in checkpoints.PUBLISHED.values():
        assert len(bytes.fromhex(one.sha256)) == 32
        assert one.url == "https://dl.fbaipublicfiles.com/segment_anything/" + one.file


def test_a_name_without_its_file_says_where_it_belongs_and_how_it_gets_there(tmp_path, monkeypatch):
    monkeypatch.setenv(checkpoints.VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError) as raised:
        open_segmenter("vit_l")
    for part in ("sam_vit_l_0b3195.pth", "1250 MB", str(tmp_path), "xmask sam-weights vit_l",
                 checkpoints.VARIABLE):
        assert part in str(raised.value)
    monkeypatch.delenv(checkpoints.VARIABLE)
    assert checkpoints.folder().parts[-3:] == (".cache", "xmask", "sam")


def test_a_downloaded_name_is_a_segmenter_and_is_not_downloaded_twice(release, capsys):
    assert main(["sam-weights", "vit_b"]) == 0
    shown = capsys.readouterr()
    path = checkpoints.folder() / NAME
    assert str(path) in shown.out and "100%" in shown.err
    assert [one.name for one in path.parent.iterdir()] == [NAME]
    described = open_segmenter("vit_b").describe()
    assert described["model_type"] == "vit_b" and described["sha256"] == files.sha256(path)
    (release / NAME).unlink()
    assert checkpoints.download("vit_b") == path
    # The same file by its path is the same segmenter.
    assert open_segmenter(str(path)).describe() == described


def test_masks_are_made_with_a_checkpoint_by_name(release, tmp_path, capsys):
    assert main(["data", "draw", "--layout", "sha", "--out", str(tmp_path / "drawn"), "--train",
                 "1", "--test", "1", "--seed", "3"]) == 0
    arguments = ["masks", "--dataset", "sha", "--root", str(tmp_path / "drawn"), "--out",
                 str(tmp_path / "masks"), "--checkpoint", "vit_b"]
    assert main(arguments) == 1
    assert "xmask sam-weights vit_b" in capsys.readouterr().err
    checkpoints.download("vit_b", progress=False)
    assert main(arguments) == 0
    manifest = files.read_json(tmp_path / "masks" / "manifest.json")
    assert manifest["segmenter"]["sha256"] == checkpoints.PUBLISHED["vit_b"].sha256


def test_a_changed_or_cut_transfer_leaves_no_file(release):
    whole = (release / NAME).read_bytes()
    for content in (whole[:-1000], whole[:-1] + b"x"):
        (release / NAME).write_bytes(content)
        with pytest.raises(ValueError, match="invalid hash value.*try again"):
            checkpoints.download("vit_b", progress=False)
        assert list(checkpoints.folder().iterdir()) == []


def test_without_a_way_to_the_release_the_error_says_what_to_copy_where(release, monkeypatch):
    (release / NAME).unlink()
    with pytest.raises(OSError, match="not found") as missing:
        checkpoints.download("vit_b", progress=False)
    monkeypatch.setattr(checkpoints, "RELEASE", "http://127.0.0.1:9/")  # nobody listens there
    with pytest.raises(OSError, match="cannot be downloaded") as offline:
        checkpoints.download("vit_b", progress=False)
    for error in (missing, offline):
        assert NAME in str(error.value) and str(checkpoints.folder()) in str(error.value)
    assert list(checkpoints.folder().iterdir()) == []
    with pytest.raises(ValueError, match="vit_x: no published SAM; known: vit_b, vit_l, vit_h"):
        checkpoints.download("vit_x")


def test_a_file_with_a_published_name_has_to_be_that_file(release):
    path = checkpoints.download("vit_b", progress=False)
    path.write_bytes(path.read_bytes()[:5000])
    for spec in ("vit_b", str(path)):
        with pytest.raises(ValueError, match="5000 bytes with sha256 .*truncated or another file"):
            open_segmenter(spec)
    with pytest.raises(ValueError, match="truncated or another file"):
        checkpoints.download("vit_b")
