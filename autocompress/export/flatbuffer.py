"""Small verbs on a .tflite flatbuffer, used by all that reads or edits one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.core.extras import require

IDENTIFIER = b"TFL3"
_DTYPES = {"FLOAT32": np.float32, "FLOAT16": np.float16, "INT8": np.int8, "INT32": np.int32, "INT64": np.int64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """An operator of the main subgraph: its kind, such as "CONV_2D", and the indices of its tensors, -1 for none."""

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Flatbuffer:
    """The main subgraph of a model."""

    def __init__(self, data: bytes) -> None:
        self._schema = require("ai_edge_litert.schema_py_generated", "tflite")
        self._kinds = {v: k for k, v in vars(self._schema.BuiltinOperator).items() if k.isupper()}
        self._types = {v: k for k, v in vars(self._schema.TensorType).items() if k.isupper()}
        self._model: Any = self._schema.ModelT.InitFromObj(self._schema.Model.GetRootAs(data, 0))
        self._graph: Any = self._model.subgraphs[0]

    def ops(self) -> Iterator[Op]:
        """In the order of execution."""
        for op in self._graph.operators:
            code = self._model.operatorCodes[op.opcodeIndex]
            kind = self._kinds[max(code.builtinCode, code.deprecatedBuiltinCode)]
            inputs = () if op.inputs is None else tuple(int(i) for i in op.inputs)
            yield Op(kind=kind, inputs=inputs, outputs=tuple(int(i) for i in op.outputs))

    def name(self, tensor: int) -> str:
        """A tensor's name."""
        return str(self._graph.tensors[tensor].name.decode())

    def dtype(self, tensor: int) -> str:
        """A tensor's type as the format calls it, such as "INT8"."""
        return str(self._types[self._graph.tensors[tensor].type])

    def shape(self, tensor: int) -> tuple[int, ...]:
        """A tensor's shape."""
        found = self._graph.tensors[tensor].shape
        return () if found is None else tuple(int(n) for n in found)

    def constant(self, tensor: int) -> NDArray[Any] | None:
        """The value of a constant tensor; None for one that is computed or fed."""
        data = self._model.buffers[self._graph.tensors[tensor].buffer].data
        if data is None or self.dtype(tensor) not in _DTYPES:
            return None
        return np.frombuffer(bytes(bytearray(data)), _DTYPES[self.dtype(tensor)]).reshape(self.shape(tensor))

    def is_constant(self, tensor: int) -> bool:
        """Whether a tensor's value stands in the file."""
        return self._model.buffers[self._graph.tensors[tensor].buffer].data is not None

    def scales(self, tensor: int) -> tuple[NDArray[np.float32], int]:
        """Scales of an integer tensor, and the axis that they are along; an empty array for one without."""
        found = self._graph.tensors[tensor].quantization
        none = found is None or found.scale is None
        return np.array([] if none else found.scale, np.float32), 0 if none else int(found.quantizedDimension)

    def put(self, tensor: int, q: NDArray[Any], scale: NDArray[np.floating[Any]]) -> None:
        """Give a constant integer tensor these values in its own type, of these scales."""
        flat = q.reshape(-1)
        if self.dtype(tensor) == "INT4":  # two to a byte, the first one low
            low, high = np.append(flat, np.zeros(flat.size % 2)).astype(np.uint8).reshape(-1, 2).T
            raw = (low & 15) | (high << 4)
        else:
            raw = np.ascontiguousarray(flat.astype(_DTYPES[self.dtype(tensor)])).view(np.uint8)
        mine = self._graph.tensors[tensor]
        if sum(other.buffer == mine.buffer for other in self._graph.tensors) > 1:  # equal constants share theirs
            self._model.buffers.append(self._schema.BufferT())
            mine.buffer = len(self._model.buffers) - 1
        self._model.buffers[mine.buffer].data = raw
        mine.quantization.scale = scale.astype(np.float32)

    def rename(self, names: Mapping[int, str]) -> None:
        """Name these tensors so, and every other one such that no two have the same name."""
        taken = set(names.values())
        for i, tensor in enumerate(self._graph.tensors):
            old = tensor.name.decode()
            name = names.get(i) or (old if old not in taken else f"{old}#{i}")
            taken.add(name)
            tensor.name = name.encode()

    def signature(self, inputs: Mapping[str, str], outputs: tuple[str, ...]) -> None:
        """Rename the inputs of the one signature, old → new, and its outputs in order."""
        (found,) = self._model.signatureDefs
        for entry in found.inputs:
            entry.name = inputs[entry.name.decode()].encode()
        order = [int(i) for i in self._graph.outputs]
        for entry in found.outputs:
            entry.name = outputs[order.index(entry.tensorIndex)].encode()

    def fed(self) -> dict[str, int]:
        """Tensors of the signature's inputs, by name."""
        return {e.name.decode(): int(e.tensorIndex) for e in self._model.signatureDefs[0].inputs}

    def given(self) -> dict[str, int]:
        """Tensors of the signature's outputs, by name."""
        return {e.name.decode(): int(e.tensorIndex) for e in self._model.signatureDefs[0].outputs}

    def give_what_is_signed(self) -> bool:
        """Make the outputs of the graph those of its signature; whether anything was to be done.

        A quantizer may put the integer copy of a tensor that is also read on in the place of the output itself.
        """
        signed = set(self.given().values())
        outputs = [int(index) for index in self._graph.outputs]
        missing = sorted(signed.difference(outputs))
        self._graph.outputs = [index if index in signed else missing.pop(0) for index in outputs]
        return bool(outputs != self._graph.outputs)

    def data(self) -> bytes:
        """The model as a file's bytes."""
        builder = require("flatbuffers", "tflite").Builder(1 << 20)
        builder.Finish(self._model.Pack(builder), file_identifier=IDENTIFIER)
        return bytes(builder.Output())
