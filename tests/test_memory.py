"""Freed memory is kept for the next array where the C library can."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

import xmask
from xmask import memory
from xmask.cli import main

FAULTS = """
import resource
import torch
from xmask import memory
if {keep}:
    assert memory.keep()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(16 << 20)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(4)][-1])  # the first ones make the room
"""


def faults(keep):
    # a test of Dask's workers may have left theirs in this process
    plain = {name: value for name, value in os.environ.items() if name not in memory.ENVIRONMENT}
    done = subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True,
                          text=True, check=True, env=plain)
    return int(done.stdout)


@pytest.mark.skipif(not memory.keep(), reason="the C library is not glibc")
def test_the_pages_of_a_freed_array_are_used_again():
    assert 4 * faults(keep=True) < faults(keep=False)


def test_a_loaded_model_keeps_memory(monkeypatch):
    kept = []
    monkeypatch.setattr(memory, "keep", lambda: kept.append(True))
    xmask.load("drawn", "cpu")
    assert kept == [True]


def _missing(name):
    raise OSError("no C library")


@pytest.mark.parametrize("library", [lambda name: object(), _missing])
def test_another_c_library_is_left_alone(monkeypatch, library):
    monkeypatch.setattr(memory.ctypes, "CDLL", library)
    assert memory.keep() is False


@pytest.mark.parametrize("arguments, training", [
    (["train", "--set", "nothing=1"], True), (["evaluate", "--set", "nothing=1"], True),
    (["learn", "nowhere", "--out", "model", "--set", "nothing=1"], True),
    (["masks", "--out", "masks"], False), (["predict", "nowhere.jpg", "--out", "found"], False)])
def test_commands_keep_memory_and_those_that_train_ask_for_huge_pages(
        monkeypatch, tmp_path, capsys, arguments, training):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    kept = []
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: SimpleNamespace(
        mallopt=lambda name, size: kept.append(name) or 1))
    assert main(arguments) == 1
    assert set(kept) == {-1, -2, -3} and ("THP_MEM_ALLOC_ENABLE" in os.environ) is training
