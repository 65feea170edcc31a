"""What a person does by hand today: cut all channels evenly, train two epochs, quantize with the runtime's own tool.

torch-pruning's magnitude pruner at one ratio for all layers, SGD with a one-cycle learning rate on flipped and shifted
images, an export to ONNX and `quantize_static` of ONNX Runtime at W8A8. Nothing of autocompress is used, but the task's
file for its model and data. It is the bar that a recovered, pruned INT8 candidate has to reach at the same widths and
number of steps, in no more time; `techniques.py` shows the two beside each other.

    python benchmarks/hand_recipe.py path/to/fashion_resnet/task.py --ratios 0.3,0.5,0.66,0.7 --seeds 0,1,2

One line of JSON per ratio and seed is added to the results; what stands there already is skipped. The fp32 and INT8
files are kept in `--work`.
"""

import argparse
import importlib.util
import json
import os
import resource
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as for the product

import numpy as np
import onnx
import onnxruntime
import torch
import torch_pruning
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn
from torch.nn import functional

BATCH, EPOCHS, CALIBRATION = 256, 2, 512


def load(path: Path) -> Any:
    """The module of a task's file."""
    spec = importlib.util.spec_from_file_location("hand_task", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pruned(model: nn.Module, ratio: float, example: Tensor) -> nn.Module:
    """The model with that share of all channels cut, the smallest ones, to multiples of four."""
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=ratio,
        round_to=4,
        ignored_layers=[model.fc],
    )
    pruner.step()
    return model


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images flipped at random and shifted by up to two pixels."""
    count, side = len(images), images.shape[-1]
    flip = torch.rand(count, generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    y, x = (torch.randint(0, 5, (count, 1), generator=generator) + torch.arange(side) for _ in range(2))
    return functional.pad(images, (2, 2, 2, 2), mode="replicate")[
        torch.arange(count)[:, None, None], 0, y[:, :, None], x[:, None, :]
    ][:, None]


def trained(model: nn.Module, images: Tensor, labels: Tensor, seed: int, epochs: float = EPOCHS) -> int:
    """Train in place; the number of steps."""
    generator = torch.Generator().manual_seed(seed)
    steps = left = max(1, round(epochs * (len(images) // BATCH)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
    model.train()
    while left > 0:
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: len(images) // BATCH * BATCH].view(-1, BATCH)[:left]:
            loss = functional.cross_entropy(model(augmented(images[rows], generator)), labels[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            left -= 1
    model.eval()
    return steps


def exported(model: nn.Module, path: Path, example: Tensor) -> None:
    """The model as ONNX with a dynamic batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (example,),
            input_names=["x"],
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None
    onnx.save(program.model_proto, str(path))


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Calibration images, 64 at a time."""

    def __init__(self, images: np.ndarray) -> None:
        self._batches: Iterator[np.ndarray] = iter(np.split(images, range(64, len(images), 64)))

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        """The next batch by input name, None at the end."""
        images = next(self._batches, None)
        return None if images is None else {"x": images}


def quantized(source: Path, target: Path, images: np.ndarray, *, reduce_range: bool) -> None:
    """W8A8 as ONNX Runtime's documentation recommends for x86; `reduce_range` where the processor has no VNNI."""
    prepared = source.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared))
    quantize_static(
        str(prepared),
        str(target),
        Reader(images),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=reduce_range,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    prepared.unlink()


def accuracy(path: Path, images: np.ndarray, labels: np.ndarray) -> float:
    """Top-1 of a file in ONNX Runtime."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = [session.run(None, {"x": part})[0].argmax(1) for part in np.split(images, range(100, len(images), 100))]
    return float((np.concatenate(found) == labels).mean())


def cpu_s() -> float:
    """Processor seconds of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def by_hand(module: Any, ratio: float, seed: int, work: Path, epochs: float = EPOCHS) -> dict[str, Any]:
    """One run of the recipe: figures of its files, and the seconds of each stage."""
    torch.manual_seed(seed)
    images, labels = module.task.train.tensors
    tests = {
        name: tuple(t.numpy() for t in data.tensors)
        for name, data in (("validation", module.task.validation), ("test", module.task.test))
    }
    example = images[:2]
    model = module.build_model()
    seconds: dict[str, float] = {}

    def lap(stage: str) -> None:
        seconds[stage] = time.perf_counter() - began[0]
        seconds[f"{stage}_cpu"] = cpu_s() - began[1]
        began[:] = [time.perf_counter(), cpu_s()]

    began = [time.perf_counter(), cpu_s()]
    if ratio:
        model = pruned(model, ratio, example)
    lap("prune")
    steps = trained(model, images, labels, seed, epochs) if ratio else 0
    lap("train")
    float_path = work / f"hand-{ratio:g}-{seed}.onnx"
    exported(model, float_path, example)
    lap("export")
    calibration = images[torch.randperm(len(images))[:CALIBRATION]].numpy()
    files = {"fp32": float_path}
    for name, reduce_range in (("int8", False), ("int8 reduce_range", True)):
        files[name] = float_path.with_suffix(f".{name.replace(' ', '-')}.onnx")
        quantized(float_path, files[name], calibration, reduce_range=reduce_range)
        lap(name)
    return {
        "ratio": ratio,
        "seed": seed,
        "widths": [model.stem.out_channels, *(block.conv2.out_channels for block in model.layers[1::2])],
        "steps": steps,
        "batch": BATCH,
        "threads": torch.get_num_threads(),
        "seconds": {stage: round(s, 2) for stage, s in seconds.items()},
        "files": {
            name: {
                "path": path.name,
                "bytes": path.stat().st_size,
                **{split: accuracy(path, *rows) for split, rows in tests.items()},
            }
            for name, path in files.items()
        },
    }


def main() -> None:
    """Run what is asked for and is not there yet; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", type=Path, help="the task's file, with build_model and a task of tensors")
    parser.add_argument("--ratios", default="0.3,0.5,0.66,0.7")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int, help="of torch; default is its own choice")
    parser.add_argument("--work", type=Path, default=Path("runs/techniques"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "hand_recipe.jsonl")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    given.out.touch()
    rows = [json.loads(line) for line in given.out.read_text().splitlines()]
    known = {(row["ratio"], row["seed"]) for row in rows}
    module = load(given.task)
    for seed in map(int, given.seeds.split(",")):
        for ratio in map(float, given.ratios.split(",")):
            if (ratio, seed) in known:
                continue
            rows.append(by_hand(module, ratio, seed, given.work))
            with given.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    for row in sorted(rows, key=lambda row: (row["ratio"], row["seed"])):
        tests = "  ".join(f"{name} {100 * file['test']:.2f}" for name, file in row["files"].items())
        print(f"{row['ratio']:<5g} seed {row['seed']}  {row['widths']}  {tests}  train {row['seconds']['train']:.0f} s")


if __name__ == "__main__":
    main()
