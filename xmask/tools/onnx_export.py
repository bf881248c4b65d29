"""The network as one ONNX file, for programs without torch: `xmask export RUN --onnx FILE`.

docs/onnx.md says how to use it. Its metadata are those of a safetensors file (`tools.models`)."""

from __future__ import annotations

import copy
import importlib.util
import json
import os

import numpy as np
import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import pad_same_arg
from torch import Tensor, nn

from xmask import files, model
from xmask.predict import Predictor

TOLERANCE = 1e-3  # of the differences that `compare` finds (ours; 1e-6 is usual)
SIZES = ((64, 96), (128, 64))  # px, (H, W) of the images of the comparison (ours)


def export(predictor: Predictor, out: str | os.PathLike) -> dict[str, float]:
    """Write the network of a model (`xmask.load`) as one ONNX file, and compare it with torch.

    Its input is `image` (B, 3, H, W) float32, RGB in 0..1, any B, any H and W that are multiples
    of 32 px; its outputs, float32, are those of `xmask.model.Output`: `logits` and `embedding`.
    Returns what `compare` returns; {}, and nothing is compared, where onnxruntime is missing.
    Raises RuntimeError, writing nothing, without onnx or onnxscript, or if the file is wrong.
    """
    if not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise RuntimeError('ONNX files need onnx and onnxscript: pip install ".[onnx]" in the '
                           'clone')
    made = _program(predictor.network, predictor.config.network.embedding)
    record, config = predictor.record, predictor.config.to_dict()
    made.model.metadata_props.update(backbone=record["initialisation"], config=json.dumps(config),
                                     record=json.dumps(record))
    with files.replacing(out) as temporary:
        made.save(temporary, external_data=False)
        found = compare(temporary, predictor) if importlib.util.find_spec("onnxruntime") else {}
        if not all(value <= TOLERANCE for value in found.values()):  # NaN is not
            raise RuntimeError(f"{out}: not written. onnxruntime computes other values than torch: "
                               f"differences {found}, allowed {TOLERANCE}. Please report it")
    return found


def compare(file: str | os.PathLike, predictor: Predictor) -> dict[str, float]:
    """How far onnxruntime with a file is from torch, by output, on random images of two sizes:
    the largest difference over the largest value of torch, or over 1 where that is smaller."""
    import onnxruntime
    session = onnxruntime.InferenceSession(os.fspath(file), providers=["CPUExecutionProvider"])
    generator, worst = torch.Generator().manual_seed(0), {"logits": 0.0, "embedding": 0.0}
    for size in SIZES:
        image = torch.rand(1, 3, *size, generator=generator)
        with torch.inference_mode():
            wanted = predictor.network(image.to(predictor.device))
        for name, values in zip(worst, session.run(list(worst), {"image": image.numpy()})):
            true = getattr(wanted, name).cpu().numpy()
            difference = np.abs(values - true).max() / max(np.abs(true).max(), 1.0)
            worst[name] = float(np.maximum(worst[name], difference))  # NaN stays
    return worst


def _program(network: nn.Module, depth: int) -> torch.onnx.ONNXProgram:
    """What torch's exporter makes of a network with an embedding of `depth` channels."""
    import onnx_ir
    free = torch.export.Dim
    sides = free("B"), free.STATIC, *(model.MULTIPLE * free(name) for name in "hw")
    made = torch.onnx.export(
        _Maps(network).eval(), (torch.zeros(2, 3, *SIZES[0]),), input_names=["image"],
        output_names=["logits", "embedding"], dynamic_shapes=(sides,), verbose=False)
    # the exporter notes which line of which file made a node: of no use elsewhere
    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(made.model)
    shapes = ("B", 3, "H", "W"), ("B", "H/4", "W/4"), ("B", depth, "H/4", "W/4")  # for readers
    for value, shape in zip((*made.model.graph.inputs, *made.model.graph.outputs), shapes):
        value.shape = onnx_ir.Shape(shape)
    return made


class _Maps(nn.Module):
    """A copy of the network that the exporter takes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).cpu().requires_grad_(False)
        for parent in list(self.network.modules()):
            if hasattr(parent, "inplace"):
                parent.inplace = False  # or the exporter takes twice as long
            for name, layer in list(parent.named_children()):
                if isinstance(layer, Conv2dSame):  # it pads by the image's size: here all alike
                    padding = pad_same_arg([model.MULTIPLE] * 2, layer.kernel_size, layer.stride,
                                           layer.dilation)
                    layer.__class__ = nn.Conv2d  # which it is, but for its padding
                    setattr(parent, name, nn.Sequential(nn.ZeroPad2d(padding), layer))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        # `model.coordinates`, whose linspace would become a constant of one size
        cells = (torch.arange(side // 8, dtype=torch.float32) for side in image.shape[-2:])
        axes = (2 * place / place.max() - 1 for place in cells)
        output = self.network(image, grid=torch.stack(torch.meshgrid(*axes, indexing="ij")))
        return output.logits, output.embedding
