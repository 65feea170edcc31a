"""The hand recipe over a grid of ratios and epochs, in two processes, as far as the time goes: for `front.py`.

    python benchmarks/front_hand.py TASK.py --work DIR --minutes 45

Nothing is begun once the time is over. What is finished stays in the folder and is not made again, and the time it took
is remembered, so that the grid may be stopped and continued.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from autocompress.core.record import to_json
from autocompress.device.fingerprint import fingerprint
from autocompress.export.qdq import integer_weight_bits
from benchmarks import hand_recipe

RATIOS, EPOCHS = "0.1,0.2,0.3,0.4,0.5,0.6,0.66,0.7", "2,4,8"
POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of the recipe."""

    ratio: float
    epochs: float

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.ratio:g}-{self.epochs:g}"


def grid(ratios: str, epochs: str) -> list[Job]:
    """All jobs, those of few epochs first."""
    return [Job(ratio=float(r), epochs=float(e)) for e in epochs.split(",") for r in ratios.split(",")]


def finished(jobs: Sequence[Job], work: Path) -> list[Job]:
    """Jobs whose files are there."""
    return [job for job in jobs if (work / job.name / "done.json").exists()]


def run(jobs: Sequence[Job], task: Path, work: Path, seconds: float, processes: int = 2) -> float:
    """Do what is not done, so many at once, as far as the time goes; returns the seconds spent so far in all calls."""
    work.mkdir(parents=True, exist_ok=True)
    record = work / "spent.json"
    spent = float(json.loads(record.read_text())) if record.exists() else 0.0
    done, running = finished(jobs, work), list[subprocess.Popen[bytes]]()
    waiting = [job for job in jobs if job not in done]
    begin = last = time.monotonic()
    while waiting or running:
        for process in [p for p in running if p.poll() is not None]:
            running.remove(process)
            if process.returncode:
                raise SystemExit(f"{process.args} failed: see {work}/log.txt")
        now = time.monotonic()
        while waiting and len(running) < processes and spent + now - begin < seconds:
            command = [sys.executable, __file__, str(task), "--work", str(work), "--job", waiting.pop(0).name]
            with (work / "log.txt").open("ab") as log:
                running.append(subprocess.Popen(command, stderr=log))
        if spent + now - begin >= seconds:
            waiting = []
        if now - last > 5:
            record.write_text(json.dumps(spent + now - begin))
            last = now
        time.sleep(POLL_S)
    if len(finished(jobs, work)) > len(done):
        spent += time.monotonic() - begin
        record.write_text(json.dumps(spent))
    return spent


def cut(module: Any, job: Job) -> nn.Module:
    """The task's model with its channels cut, untrained; always the same."""
    model = module.build_model()
    return hand_recipe.pruned(model, job.ratio, module.task.train.tensors[0][:2]) if job.ratio else model


def make(module: Any, job: Job, work: Path) -> None:
    """One job: cut, trained, exported, quantized."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder, begin = work / job.name, time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = module.task.train.tensors
    model = cut(module, job)
    steps = hand_recipe.trained(model, images, labels, 0, job.epochs) if job.ratio else 0
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, folder / "weights.safetensors")
    hand_recipe.exported(model, folder / "fp32.onnx", images[:2])
    chosen = images[torch.randperm(len(images))[: hand_recipe.CALIBRATION]].numpy()
    narrow = integer_weight_bits(fingerprint("onnxruntime", "").facts) < 8  # documented for x86 without VNNI
    hand_recipe.quantized(folder / "fp32.onnx", folder / "int8.onnx", chosen, reduce_range=narrow)
    seconds = time.perf_counter() - begin
    (folder / "done.json").write_text(json.dumps({**to_json(job), "steps": steps, "seconds": seconds}) + "\n")


def for_litert(module: Any, job: Job, work: Path, names: tuple[str, str]) -> None:
    """The same model as flatbuffers: by litert-torch, and by litert-quantizer's recipe for static INT8.

    `names` are those of the task's input and output.
    """
    from autocompress.export.flatbuffer import Flatbuffer
    from autocompress.export.tflite_quantize import quiet, vendor_quantized

    folder = work / job.name
    if (folder / "int8.tflite").exists():
        return
    with quiet():
        import litert_torch

        model = cut(module, job)
        model.load_state_dict(load_file(folder / "weights.safetensors"))
        images = module.task.train.tensors[0]
        data = bytes(litert_torch.convert(model.eval(), (images[:1],)).model_content())
    graph = Flatbuffer(data)
    graph.signature({"args_0": names[0]}, names[1:])
    torch.manual_seed(0)
    rows = torch.randperm(len(images))[: hand_recipe.CALIBRATION]
    items = [{names[0]: images[row : row + 1].numpy()} for row in rows.tolist()]
    (folder / "fp32.tflite").write_bytes(graph.data())
    (folder / "int8.tflite").write_bytes(vendor_quantized(graph.data(), items))


def main() -> None:
    """The grid, or one job of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", type=Path, help="the task's file, with build_model and a task of tensors")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--ratios", default=RATIOS)
    parser.add_argument("--epochs", default=EPOCHS)
    parser.add_argument("--job", help="only this one, RATIO-EPOCHS")
    given = parser.parse_args()
    if given.job:
        ratio, _, epochs = given.job.partition("-")
        make(hand_recipe.load(given.task), Job(ratio=float(ratio), epochs=float(epochs)), given.work)
        return
    jobs = grid(given.ratios, given.epochs)
    spent = run(jobs, given.task, given.work, 60 * given.minutes)
    print(f"{len(finished(jobs, given.work))} of {len(jobs)} done in {spent:.0f} s")


if __name__ == "__main__":
    main()
