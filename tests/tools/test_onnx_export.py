"""`xmask export --onnx`: the file says what it is and computes what torch computes, at any size."""

import importlib.util
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import xmask
from tests.test_trainer import tiny
from xmask.cli import main
from xmask.model import XMask
from xmask.predict import Predictor
from xmask.tools import onnx_export

NETWORKS = {"test_resnet": {"network__channels": 16},
            "tf_efficientnet_lite0": {"network__channels": 16, "network__fold_norm": True,
                                      "network__weights": "imagenet"}}


def untrained(backbone, **changes):
    config = tiny(network__backbone=backbone, **changes)
    torch.manual_seed(0)
    return Predictor(XMask(config.network).eval(), config, {"initialisation": "random"})


@pytest.mark.parametrize("backbone", NETWORKS)
def test_a_file_computes_what_torch_computes_at_any_size(backbone, tmp_path):
    predictor = untrained(backbone, **NETWORKS[backbone])
    in_place = [one for one in onnx_export._Maps(predictor.network).modules()
                if getattr(one, "inplace", False)]
    assert not in_place, "the exporter takes twice as long"
    found = onnx_export.export(predictor, tmp_path / "x.onnx")
    assert set(found) == {"logits", "embedding"} and max(found.values()) < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    for batch, height, width in ((1, 32, 32), (3, 96, 64), (1, 64, 160)):
        image = torch.rand(batch, 3, height, width)
        logits, embedding = session.run(["logits", "embedding"], {"image": image.numpy()})
        with torch.no_grad():
            wanted = predictor.network(image)
        assert logits.shape == (batch, height // 4, width // 4)
        np.testing.assert_allclose(logits, wanted.logits, atol=1e-4)
        np.testing.assert_allclose(embedding, wanted.embedding, atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx"]


def test_the_command_writes_the_package_s_model_and_what_it_is(tmp_path, capsys):
    assert main(["export", "drawn", "--onnx", str(tmp_path / "x.onnx")]) == 0
    said = capsys.readouterr().out
    assert "drawn crowds" in said and "logits within" in said and "of torch" in said
    file = onnx.load(tmp_path / "x.onnx")
    assert [one.name for one in (*file.graph.input, *file.graph.output)] == [
        "image", "logits", "embedding"]
    metadata = {one.key: one.value for one in file.metadata_props}
    model = xmask.load("drawn", "cpu")
    assert set(metadata) == {"config", "backbone", "record"}
    assert json.loads(metadata["config"]) == model.config.to_dict()
    assert json.loads(metadata["record"]) == model.record
    assert not any(node.metadata_props or node.doc_string for node in file.graph.node)


def test_half_precision_is_not_for_onnx(tmp_path, capsys):
    assert main(["export", "drawn", "--half", "--out", str(tmp_path / "x.onnx")]) == 1
    assert "--half: an ONNX file has weights in 32 bits" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "compare", lambda *_: {"logits": float("nan"), "embedding": 0})
    with pytest.raises(RuntimeError, match=r"x.onnx: not written\. .*'logits': nan"):
        onnx_export.export(untrained("test_resnet"), tmp_path / "x.onnx")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("option, file", [("--onnx", "model"), ("--out", "model.onnx")])
def test_both_options_lead_to_the_remedy_where_the_extra_is_missing(
        option, file, tmp_path, monkeypatch, capsys):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name: None if name.startswith("onnx") else there(name))
    assert main(["export", "drawn", option, str(tmp_path / file)]) == 1
    assert 'pip install ".[onnx]" in the clone' in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_file_that_is_there_is_not_replaced(tmp_path, capsys):
    (tmp_path / "x.onnx").write_text("mine")
    assert main(["export", "drawn", "--onnx", str(tmp_path / "x.onnx")]) == 1
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "x.onnx").read_text() == "mine"
