"""Recovery: a compressed model is trained towards its teachers, its labels, or both."""

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.compress.distill import Answers, Features, agreed, output_loss
from autocompress.compress.material import Material
from autocompress.compress.outputs import outputs_of
from autocompress.core.errors import StageError
from autocompress.core.recipe import Train

ADAMW_RATE = 1e-3
SGD_RATE = 0.05  # at a batch of 256; less by the root of the batch
CLIP = 5.0  # largest norm of all gradients together
CHECKS = 10  # looks at validation in the course of a training with `patience`
VECTOR = 16  # floats of the widest vector on a processor
_BFLOAT16 = {"avx512_bf16", "amx_bf16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """How a training went.

    Attributes:
        steps: that were taken, those of assistants too.
        best: the best metric on validation, None where it did not look.
        stopped: "steps", "seconds" or "patience".
    """

    steps: int
    seconds: float
    best: float | None
    stopped: str


def train(
    student: nn.Module,
    how: Train,
    material: Material,
    *,
    teachers: Sequence[nn.Module],
    steps: int,
    seed: int,
    after_step: Callable[[int, int], None] = lambda *_: None,
    progress: Callable[[int, int, float], None] = lambda *_: None,
    cache: Path | None = None,
    resize: Callable[[float], nn.Module] | None = None,
) -> Trained:
    """Train `student` in place; it ends in eval mode, on the CPU, and needs no gradient.

    Args:
        teachers: the original first, then the task's others; in eval mode, not changed.
        after_step: told of the step that was done, and of how many.
        progress: told the same, and the loss.
        cache: folder for the teachers' answers, which candidates share.
        resize: gives an untrained assistant of a width ratio.

    Raises:
        StageError: the loss is not finite, or the recipe asks for what the task does not have.
    """
    ratios = how.distill.assistants
    share, before = steps // (len(ratios) + 1), 0
    only = replace(how, distill=replace(how.distill, assistants=()))
    if how.seconds is not None:
        only = replace(only, seconds=how.seconds / (len(ratios) + 1))
    for i, ratio in enumerate(ratios):
        if resize is None:
            raise StageError("recover", "assistants need a model that can be cut, or a student of the task")
        assistant = resize(ratio)
        taught = train(
            assistant, only, material, teachers=teachers, steps=share, seed=seed + i, progress=progress, cache=cache
        )
        teachers, cache = [assistant, *teachers[1:]], None
        steps -= share
        before += taught.steps
    with torch.random.fork_rng(devices=[]), torch.backends.cudnn.flags(enabled=True, deterministic=True):
        torch.manual_seed(seed)
        run = _Training(student, only, material, teachers, steps, seed, cache)
        try:
            trained = run.go(after_step, progress)
            return replace(trained, steps=trained.steps + before)
        finally:
            run.close()


class _Training:
    def __init__(
        self,
        student: nn.Module,
        how: Train,
        material: Material,
        teachers: Sequence[nn.Module],
        steps: int,
        seed: int,
        cache: Path | None,
    ) -> None:
        self._student, self._how, self._material, self._steps = student, how, material, steps
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._order = material.orders(how.batch_size, seed)
        lesson = how.distill
        if (lesson.kind == "none" or lesson.weight < 1) and material.loss is None:
            text = "the recipe learns from labels, but the loss takes no targets of the train items: set weight to 1"
            raise StageError("recover", text)
        student.to(self._device)
        some = 1 if lesson.teachers in ("original", "self") else len(teachers)
        self._teachers = [] if lesson.kind == "none" else [self._placed(t) for t in teachers[:some]]
        self._features: Features | None = None
        if lesson.kind in ("features", "attention"):
            sample = self._moved(material.fetch([int(i) for i in next(self._order)[:2]])[0])
            student.eval()
            self._features = Features(
                student, self._teachers[0], material.call, sample, attention=lesson.kind == "attention"
            )
        fixed = material.fixed
        self._answers = [
            Answers(t, material.call, material.items, fixed=fixed, folder=cache)
            for t in (self._teachers[1:] if self._features else self._teachers)
        ]
        self._itself: nn.Module | None = None
        own = (p for p in student.parameters() if p.is_floating_point())
        self._parameters = [*own, *(self._features.parameters() if self._features else ())]
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        self._four_d = _channels_last(student)
        if self._four_d:
            student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def go(self, after_step: Callable[[int, int], None], progress: Callable[[int, int, float], None]) -> Trained:
        optimizer, schedule = optimization(self._student, self._parameters, self._how, self._steps)
        student, how, began = self._student, self._how, time.monotonic()
        best, kept, worse, stopped, step = None, None, 0, "steps", 0
        check = max(1, self._steps // CHECKS)
        student.train()
        for step in range(1, self._steps + 1):
            if how.distill.teachers == "self" and step == self._steps // 2 + 1:
                self._itself = copy.deepcopy(student).eval().requires_grad_(False)
            loss = self._loss(next(self._order))
            if not torch.isfinite(loss):
                raise StageError("recover", f"the loss is {float(loss.detach())} at step {step}: lower `learning_rate`")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self._parameters, CLIP)
            optimizer.step()
            schedule.step()
            after_step(step, self._steps)
            progress(step, self._steps, float(loss.detach()))
            if how.patience is not None and (step % check == 0 or step == self._steps):
                value = self._material.validate(self._here(student))
                if best is None or value > best:
                    best, worse = value, 0
                    kept = {name: tensor.clone() for name, tensor in student.state_dict().items()}
                else:
                    worse += 1
                if worse >= how.patience:
                    stopped = "patience"
                    break
            if how.seconds is not None and time.monotonic() - began >= how.seconds:
                stopped = "seconds"
                break
        if kept is not None:
            student.load_state_dict(kept)
        return Trained(steps=step, seconds=time.monotonic() - began, best=best, stopped=stopped)

    def close(self) -> None:
        """Leave the student as a model is left: on the CPU, contiguous, in eval mode; keep the teachers' answers."""
        if self._features is not None:
            self._features.close()
        for answers in self._answers:
            answers.save()
        self._student.cpu()
        if self._four_d:
            self._student.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self._student.eval().requires_grad_(False)
        self._student.zero_grad(set_to_none=True)

    def _loss(self, rows: NDArray[np.int64]) -> Tensor:
        material, lesson = self._material, self._how.distill
        inputs, targets = material.fetch([int(i) for i in rows])
        batch = self._moved(inputs)
        total = torch.zeros((), device=self._device)
        with self._arithmetic():
            wanted = None if lesson.kind == "none" else self._wanted(rows, batch)
            output = material.call(self._student, batch)
            if wanted is None or lesson.weight < 1:
                assert material.loss is not None
                share = 1.0 if wanted is None else 1 - lesson.weight
                total = total + share * material.loss(output, _on(self._device, targets))
        if wanted is not None:
            got = [tensor.float() for tensor in outputs_of(output)]
            taught = output_loss(got, wanted, classifies=material.classifies, temperature=lesson.temperature)
            if self._features is not None:
                taught = taught + self._features.loss()
            total = total + lesson.weight * taught
        return total

    def _wanted(self, rows: NDArray[np.int64], batch: dict[str, Tensor]) -> list[Tensor]:
        answers = [self._features.answers(batch)] if self._features is not None else []
        answers += [known(rows, batch) for known in self._answers]
        if self._itself is not None:
            with torch.no_grad():
                answers.append(outputs_of(self._material.call(self._itself, batch)))
        lesson = self._how.distill
        found = agreed(answers, classifies=self._material.classifies, confident=lesson.teachers == "confident")
        return [tensor.float() for tensor in found]

    def _arithmetic(self) -> AbstractContextManager[Any]:
        if not has_bfloat16(self._device):
            return nullcontext()
        return torch.autocast(self._device.type, torch.bfloat16)

    def _placed(self, teacher: nn.Module) -> nn.Module:
        """The teacher where the training is; a copy only where it has to move."""
        return teacher if self._device.type == "cpu" else copy.deepcopy(teacher).to(self._device)

    def _here(self, student: nn.Module) -> nn.Module:
        """The student on the CPU, where validation has its items; a copy only where it is elsewhere."""
        return student if self._device.type == "cpu" else copy.deepcopy(student).cpu()

    def _moved(self, batch: Any) -> dict[str, Tensor]:
        moved: dict[str, Tensor] = _on(self._device, batch)
        return moved


def optimization(
    model: nn.Module, parameters: Sequence[nn.Parameter], how: Train, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Optimizer and learning rate as a recipe says: by itself SGD where the model has BatchNorm, else AdamW."""
    optimizer: torch.optim.Optimizer
    normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if how.optimizer == "adamw" or (how.optimizer == "auto" and not normed):
        rate = how.learning_rate or ADAMW_RATE
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=how.weight_decay, fused=True)
    else:
        rate = how.learning_rate or SGD_RATE * math.sqrt(how.batch_size / 256)
        optimizer = torch.optim.SGD(
            parameters, lr=rate, momentum=0.9, nesterov=True, weight_decay=how.weight_decay, fused=True
        )
    warm_up = max(1, min(50, steps // 10))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1.0, (i + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * min(1.0, i / max(1, steps)))),
    )


def _channels_last(model: nn.Module) -> bool:
    """Whether channels go last: with convolutions over images, unless one would write past its memory.

    oneDNN's gradient of a 1x1 convolution with a stride does, where it has fewer input channels than fit into a vector
    (uxlfoundation/oneDNN#6035): of 17 numbers from 1 to 31, those below 8 crashed with AVX2; AVX-512 has 16.
    """
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    overruns = (
        set(m.kernel_size) == {1} and max(m.stride) > 1 and m.in_channels // m.groups < VECTOR for m in convolutions
    )
    return bool(convolutions) and not any(overruns)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has arithmetic in bfloat16; where it would be emulated it has not."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return False
    return bool(_BFLOAT16 & set(flags.split()))


def _on(device: torch.device, value: Any) -> Any:
    """Tensors, in whatever holds them, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _on(device, leaf) for name, leaf in value.items()}
    return tuple(_on(device, leaf) for leaf in value) if isinstance(value, tuple | list) else value
