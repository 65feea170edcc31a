"""Does the file compute what the model computes? Checked in ONNX Runtime, on the host, before a file is scored."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from autocompress.core.errors import StageError
from autocompress.export.graph import only_consumer, to_bytes
from autocompress.export.session import Session

Arrays = Sequence[NDArray[np.generic]]
FLOAT_TOLERANCE = 1e-3  # of the largest output; exact exports differ by about 1e-6
INT8_SQNR_DB = 10.0  # optimised against unoptimised: a wrong fusion gives noise, rounding gives 20 dB and more
LOST_DB = 3.0  # twice the noise
PARITY_SQNR_DB = 10.0
_BEHIND = ("Relu", "Clip", "QuantizeLinear", "DequantizeLinear")


def run_onnx(model: bytes, feeds: Mapping[str, NDArray[np.generic]], *, optimise: bool = True) -> list[NDArray[Any]]:
    """Outputs of a model file's bytes, in order.

    Raises:
        StageError: ONNX Runtime refuses the file or fails on it.
    """
    return list(Session(model, "export", optimise=optimise).run(feeds))


def float_difference(got: Arrays, wanted: Arrays) -> float:
    """Largest difference over the largest wanted magnitude; infinite where shapes differ or a value is not finite."""
    worst = 0.0
    for g, w in zip(got, wanted, strict=True):
        if g.shape != w.shape or not np.isfinite(g).all():
            return float("inf")
        scale = max(float(np.abs(w).max(initial=0)), 1e-6)
        worst = max(worst, float(np.abs(g.astype(np.float64) - w.astype(np.float64)).max(initial=0)) / scale)
    return worst


def check_optimised(
    model: bytes,
    feeds: Mapping[str, NDArray[np.generic]],
    layers: Collection[str] = (),
    *,
    exact: Callable[[], Arrays] = list,
) -> float:
    """Signal-to-noise ratio, dB, of optimised against unoptimised outputs (onnxruntime#24711 shows why).

    A deep model may amplify a last bit that an optimised kernel rounds otherwise until little of the outputs is left.
    It amplifies the rounding to integers as well: optimisation whose outputs are as near to those without integers as
    the unoptimised ones are, or lose at most `LOST_DB` on them, has broken nothing.

    Args:
        exact: gives the outputs without integers; asked for only where the others disagree.

    Raises:
        StageError: they disagree, and optimisation leads away from the exact ones; it names the first of `layers`
            whose outputs differ.
    """
    fast, plain = run_onnx(model, feeds), run_onnx(model, feeds, optimise=False)
    ratio = _least(plain, fast)
    if ratio < INT8_SQNR_DB:
        known = exact()
        if known and _least(known, fast) >= _least(known, plain) - LOST_DB:
            return ratio
        first = first_below(layer_sqnr(model, model, feeds, layers, optimise_wanted=False), INT8_SQNR_DB)
        raise StageError(
            "export",
            f"ONNX Runtime's optimised outputs disagree with its unoptimised ones: {ratio:.1f} dB, "
            f"at least {INT8_SQNR_DB:g} are expected{first}",
        )
    return ratio


def check_simulated(
    simulated: Arrays,
    deployed: Arrays,
    layers: Callable[[], Mapping[str, float]],
    *,
    least_db: float = PARITY_SQNR_DB,
) -> float:
    """Signal-to-noise ratio, dB, of a file's outputs against those that training simulated.

    Args:
        layers: the ratio of each layer's outputs, in the order of execution; asked for only where the outputs differ.

    Raises:
        StageError: the ratio is below `least_db`; it names the first layer that is.
    """
    ratio = _least(simulated, deployed)
    if ratio < least_db:
        text = (
            f"the file's outputs are not those that were simulated: {ratio:.1f} dB, at least {least_db:g} are expected"
        )
        raise StageError("parity", text + first_below(layers(), least_db))
    return ratio


def layer_sqnr(
    wanted: bytes,
    deployed: bytes,
    feeds: Mapping[str, NDArray[np.generic]],
    layers: Collection[str],
    *,
    optimise_wanted: bool = True,
) -> dict[str, float]:
    """Signal-to-noise ratio, dB, of what each layer gives in one file against another, in the order of execution.

    What an integer layer gives is looked at behind its rounding, so that it still runs on integers. Layers that are no
    node of both graphs are left out.
    """
    pairs = _pairs(wanted, deployed, layers)
    if not pairs:
        return {}
    got = [
        run_onnx(_giving(data, [pair[side] for pair in pairs.values()]), feeds, optimise=optimise)[-len(pairs) :]
        for side, (data, optimise) in enumerate([(wanted, optimise_wanted), (deployed, True)])
    ]
    return {name: sqnr_db(w, d) for name, w, d in zip(pairs, *got, strict=True)}


def _pairs(wanted: bytes, deployed: bytes, layers: Collection[str]) -> dict[str, tuple[str, str]]:
    """Names of the tensors that each layer gives in the two files, in the order of execution."""
    known = {value.name for node in _read(wanted).graph for value in node.outputs}
    pairs: dict[str, tuple[str, str]] = {}
    for node in _read(deployed).graph:
        if node.name in layers:
            given = str(_given(node).name)
            exact = given if given in known else given.removesuffix(".dq")
            if exact in known:
                pairs[str(node.name)] = (exact, given)
    return pairs


def _read(data: bytes) -> ir.Model:
    model: ir.Model = ir.from_proto(onnx.ModelProto.FromString(data))
    return model


def first_below(ratios: Mapping[str, float], least_db: float) -> str:
    """A clause that names the first layer below `least_db`; empty where none is."""
    for name, ratio in ratios.items():
        if ratio < least_db:
            return f"; the first layer to differ is {name!r}, {ratio:.1f} dB"
    return ""


def _given(node: ir.Node) -> ir.Value:
    """A layer's output; where a rectifier and rounding follow and nothing else reads it, what they give."""
    value = node.outputs[0]
    while (reader := only_consumer(value)) is not None and reader.op_type in _BEHIND:
        value = reader.outputs[0]
        if reader.op_type == "DequantizeLinear":
            return value
    return node.outputs[0]


def _giving(data: bytes, names: Sequence[str]) -> bytes:
    """The file with these tensors as outputs behind its own."""
    model = _read(data)
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    for name in names:
        copy = ir.node("Identity", [values[name]], name=f"{name}.given")
        copy.outputs[0].name, copy.outputs[0].type = copy.name, ir.TensorType(ir.DataType.FLOAT)
        model.graph.append(copy)
        model.graph.outputs.append(copy.outputs[0])
    return to_bytes(model)


def _least(wanted: Arrays, got: Arrays) -> float:
    return min(sqnr_db(w, g) for w, g in zip(wanted, got, strict=True))


def sqnr_db(signal: NDArray[Any], noisy: NDArray[Any]) -> float:
    """Signal-to-quantization-noise ratio in dB; 200 for equal arrays."""
    signal = signal.astype(np.float64)
    noise = float(((signal - noisy.astype(np.float64)) ** 2).sum())
    power = float((signal**2).sum())
    if noise == 0:
        return 200.0
    return float(10 * np.log10(max(power, 1e-30) / noise)) if np.isfinite(noise) else -200.0
