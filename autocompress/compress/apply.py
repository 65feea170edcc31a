"""A candidate applied to the user's model: cut, silence weights, settle BatchNorm, recover. The original stays."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from autocompress.compress.recover import recover
from autocompress.compress.width import ChannelGroup, cut_widths
from autocompress.core.candidate import Candidate
from autocompress.core.errors import StageError

Batch = Mapping[str, torch.Tensor]
Call = Callable[[nn.Module, Batch], Any]


def apply(
    candidate: Candidate,
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    call: Call,
    *,
    student: Callable[[float], nn.Module] | None = None,
    settle: Callable[[], Iterable[Batch]],
    train: Callable[[], Iterator[Batch]],
    classifies: bool = True,
    stage: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> nn.Module:
    """The float model a candidate means, before quantization, in eval mode.

    Args:
        candidate: bits are not looked at here; they belong to the export.
        model: the original, also the teacher of recovery.
        call: runs a model on a batch.
        student: the user's own smaller topology.
        settle: batches on which BatchNorm statistics are estimated anew.
        train: endless training batches, used when the recipe recovers.
        classifies: whether the first output holds class logits (distilled by KL divergence, else by squared error).
        stage: entered with "compress", "settle" or "recover" around each part, for who wants to know the time.
    """
    with stage("compress"):
        compressed = _shrunk(candidate, model, groups, student)
        masks = sparsity_masks(compressed, candidate)
        hold(compressed, masks)
    if candidate.widths or candidate.student is not None:
        with stage("settle"):
            settle_batchnorm(compressed, call, settle())
    if candidate.recipe.recover_steps:
        with stage("recover"):
            recover(
                compressed,
                model,
                call,
                train(),
                steps=candidate.recipe.recover_steps,
                classifies=classifies,
                after_step=lambda: hold(compressed, masks),
            )
    return compressed.eval()


def _shrunk(
    candidate: Candidate,
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    student: Callable[[float], nn.Module] | None,
) -> nn.Module:
    if candidate.student is None:
        return cut_widths(model, groups, candidate.widths)
    if student is None:
        raise StageError("compress", f"the candidate wants a student of width {candidate.student}, the task has none")
    return copy.deepcopy(student(candidate.student))  # the task may keep what it gives


def sparsity_masks(model: nn.Module, candidate: Candidate) -> dict[str, torch.Tensor]:
    """For each layer to be sparse, which weights stay.

    Raises:
        StageError: the pattern 2:4 is wanted of a layer whose input channels do not come in fours.
    """
    masks = {}
    known = dict(model.named_modules())
    for name, choice in candidate.layers.items():
        if choice.sparsity is None or name not in known:  # a student may lack a layer of the original
            continue
        weight = model.get_submodule(name).get_parameter("weight").detach()
        if choice.sparsity.pattern == "2:4":
            masks[name] = _two_of_four(weight, name)
        else:
            masks[name] = _largest(weight, choice.sparsity.ratio)
    return masks


def _largest(weight: torch.Tensor, ratio: float) -> torch.Tensor:
    """All but the smallest share by magnitude."""
    keep = torch.ones(weight.numel(), dtype=torch.bool)
    keep[weight.abs().flatten().argsort(stable=True)[: int(ratio * weight.numel())]] = False
    return keep.view_as(weight)


def _two_of_four(weight: torch.Tensor, name: str) -> torch.Tensor:
    """The two largest by magnitude of every four neighbouring input channels.

    That is the axis along which NVIDIA's guide wants at most two non-zeros of four, for each output channel and each
    place of the kernel.
    """
    if weight.shape[1] % 4:
        raise StageError("compress", f"layer {name!r} cannot be 2:4 sparse: it has {weight.shape[1]} input channels")
    last = weight.movedim(1, -1)
    fours = last.reshape(*last.shape[:-1], -1, 4).abs()
    largest = fours.argsort(dim=-1, descending=True, stable=True)[..., :2]
    keep = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, largest, True)
    return keep.flatten(-2).movedim(-1, 1)


def hold(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Set the weights outside the masks to zero."""
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_submodule(name).get_parameter("weight").mul_(mask)


def settle_batchnorm(model: nn.Module, call: Call, batches: Iterable[Batch]) -> None:
    """Estimate BatchNorm's mean and variance anew as plain averages over `batches`; weights do not change."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [m.momentum for m in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    with torch.no_grad():
        for batch in batches:
            call(model, batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
