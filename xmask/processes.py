"""The processes that train one network together, by Lightning Fabric: device, precision, gradients.

`torchrun` starts them; without it there is one. Each sees its share of every batch, and what they
learn is what one process learns from the whole batch (BatchNorm, too: `join_norms`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning_fabric import Fabric
from torch import Tensor, distributed, nn

# it announces mixed precision between progress bars; config.json says what was used
logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
# what gloo and NCCL say where another process is gone
_GONE = ("closed by peer", "reset by peer", "Broken pipe", "Socket", "timed out", "NCCL")


def count() -> int:
    """How many processes train together, as `torchrun` says; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if distributed.is_torchelastic_launched() else 1


def open_fabric(device: torch.device, wanted: str = "float32") -> Fabric:
    """The Fabric of a kind of device, connected to the other processes if there are any.

    wanted: "float32", or "bfloat16" for mixed precision where the device has instructions for it.
    """
    cuda = device.type == "cuda"
    precision = "bf16-mixed" if wanted == "bfloat16" and _fast_bfloat16(device) else "32-true"
    if count() == 1:
        return Fabric(accelerator=device.type, devices=[device.index or 0] if cuda else 1,
                      precision=precision)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    fabric = Fabric(accelerator=device.type, strategy="ddp", devices=local,
                    num_nodes=count() // local, precision=precision)
    fabric.launch()
    return fabric


def _fast_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 itself; emulation would save nothing."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return bool(able.get("amx_bf16") or able.get("avx512_bf16"))


def widen_depthwise(network: nn.Module) -> None:
    """Let depthwise convolutions that learn compute in float32 under autocast: on a CPU their
    gradients in bfloat16 take longer than all the rest saves."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            kind = type(layer)
            layer.__class__ = type(kind.__name__, (_Wide, kind), {})


class _Wide(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        if not any(weight.requires_grad for weight in self.parameters()):
            return super().forward(maps)
        with torch.autocast(maps.device.type, enabled=False):
            return super().forward(maps.float()).to(maps.dtype)


@contextmanager
def gone() -> Iterator[None]:
    """RuntimeError in plain words where another of the processes has ended."""
    try:
        yield
    except RuntimeError as error:
        if count() == 1 or not any(words in str(error) for words in _GONE):
            raise
        raise RuntimeError(
            "another process of this training has ended, and this one ends with it. What was "
            "saved is kept: see the other's message, and start all of them again") from error


def of_all(mine: Tensor) -> Tensor:
    """A tensor (B, ...) of each process, all of one shape, one after the other: (processes * B,
    ...), without gradient."""
    if count() == 1:
        return mine.detach()
    parts = [torch.empty_like(mine) for _ in range(count())]
    distributed.all_gather(parts, mine.detach().contiguous())
    return torch.cat(parts)


def join_norms(network: nn.Module) -> None:
    """Let every BatchNorm of a network in training take its statistics over all processes."""
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.__class__ = _JointBatchNorm


class _Sum(torch.autograd.Function):
    """The sum over all processes, with a gradient."""

    @staticmethod
    def forward(context, mine: Tensor) -> Tensor:
        total = mine.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        return _Sum.forward(context, gradient)


class _JointBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the crops of all processes, of which each has as many; on every device.

    `torch.nn.SyncBatchNorm` knows CUDA only. timm's BatchNormAct2d holds an activation, too.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return self._activated(nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias,
                eps=self.eps))
        x, axes, size = input.float(), (0, 2, 3), distributed.get_world_size()
        mean = _Sum.apply(x.mean(axes)) / size
        centred = x - mean[:, None, None]
        variance = _Sum.apply(centred.square().mean(axes)) / size
        scale = self.weight * torch.rsqrt(variance + self.eps)
        with torch.no_grad():
            seen = size * x.numel() // x.shape[1]
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * seen / (seen - 1), self.momentum)
        return self._activated(
            (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype))

    def _activated(self, output: Tensor) -> Tensor:
        return self.act(self.drop(output)) if hasattr(self, "act") else output
