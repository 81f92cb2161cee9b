"""A network, and the parser that fills it from ONNX."""

from __future__ import annotations

from pathlib import Path

import onnx

from tensorrt._graph import Graph, unsupported
from tensorrt._release import NUMBER, of_release, plain
from tensorrt._types import (
    DataType,
    Dims,
    ILogger,
    LayerType,
    NetworkDefinitionCreationFlag,
    OnnxParserFlag,
    TensorLocation,
    data_type,
)

ALWAYS_EXPLICIT = NUMBER >= (10,)
ALWAYS_STRONG = NUMBER >= (11,)


class ITensor:
    """A value of a network."""

    name = plain("name")
    dtype = plain("dtype", read_only=NUMBER >= (11,))
    location = plain("location", TensorLocation.DEVICE)
    is_shape_tensor = plain("is_shape_tensor", False, read_only=True)

    def __init__(self, name, dtype, shape=()):
        self._name, self._dtype, self._shape = name, dtype, shape

    @property
    def shape(self):
        return Dims(self._shape)


of_release(ITensor)


class ILayer:
    """An operation of a network."""

    name = plain("name")
    type = plain("type", read_only=True)

    def __init__(self, name, kind, num_inputs, outputs, network):
        self._name, self._num_inputs = name, num_inputs
        self._type = _layer_type(kind)
        self._outputs = [ITensor(output, data_type(dtype)) for output, dtype in outputs]
        self._network = network
        self._precision = None
        self._types = {}

    @property
    def num_inputs(self):
        return self._num_inputs

    @property
    def num_outputs(self):
        return len(self._outputs)

    def get_output(self, index):
        return self._outputs[index] if 0 <= index < len(self._outputs) else None

    @property
    def precision(self):
        return self._precision or DataType.FLOAT

    @precision.setter
    def precision(self, value):
        if self._network._strong:
            self._network._complaints.append(
                f"{self.name}: the precision of a layer of a strongly typed network is not to be set"
            )
        self._precision = value

    @property
    def precision_is_set(self):
        return self._precision is not None

    def reset_precision(self):
        self._precision = None

    def set_output_type(self, index, dtype):
        if self._network._strong:
            self._network._complaints.append(f"{self.name}: types of a strongly typed network are not to be set")
        self._types[index] = dtype

    def get_output_type(self, index):
        return self._types.get(index, self._outputs[index].dtype)

    def output_type_is_set(self, index):
        return index in self._types

    def reset_output_type(self, index):
        self._types.pop(index, None)

    @property
    def _is_integer(self):
        return any(output.dtype in _INTEGERS for output in self._outputs)


_INTEGERS = {kind for name in ("INT32", "INT64", "BOOL", "INT8") if (kind := getattr(DataType, name, None))}


def _layer_type(kind):
    if kind in LayerType.__members__:
        return LayerType[kind]
    return {"NORMALIZATION": LayerType.REDUCE, "CAST": LayerType.IDENTITY}.get(kind, LayerType.SHUFFLE)


of_release(ILayer)


class INetworkDefinition:
    """What a parser fills."""

    name = plain("name", "Unnamed Network 0")

    def __init__(self, flags):
        self._flags = flags
        self._graph = None
        self._layers = []
        self._complaints = []

    def get_flag(self, flag):
        return self._has(flag)

    def _has(self, flag):
        return bool(self._flags >> flag.value & 1)

    @property
    def flags(self):
        return self._flags

    @property
    def _strong(self):
        flag = getattr(NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return ALWAYS_STRONG or (flag is not None and self._has(flag))

    @property
    def _explicit(self):
        return ALWAYS_EXPLICIT or self._has(NetworkDefinitionCreationFlag.EXPLICIT_BATCH)

    @property
    def has_implicit_batch_dimension(self):
        return not self._explicit

    @property
    def num_layers(self):
        return len(self._layers)

    def __len__(self):
        return len(self._layers)

    def get_layer(self, index):
        return self._layers[index] if 0 <= index < len(self._layers) else None

    def __getitem__(self, index):
        return self._layers[index]

    def add_normalization(self, input, scale, bias, axesMask):  # noqa: A002, N803
        raise NotImplementedError("the fake takes only what a parser gives it")

    def _tensors(self, inputs):
        tensors = (self._graph.inputs if inputs else self._graph.outputs) if self._graph else {}
        return [ITensor(one.name, data_type(one.dtype), one.shape) for one in tensors.values()]

    @property
    def num_inputs(self):
        return len(self._tensors(True))

    @property
    def num_outputs(self):
        return len(self._tensors(False))

    def get_input(self, index):
        return self._tensors(True)[index]

    def get_output(self, index):
        return self._tensors(False)[index]


of_release(INetworkDefinition)


class ParserError:
    """Why a graph was refused."""

    def __init__(self, desc, node=-1, name="", operator=""):
        self._desc, self._node, self._name, self._operator = desc, node, name, operator

    def code(self):
        return "UNSUPPORTED_NODE"

    def desc(self):
        return self._desc

    def file(self):
        return "ModelImporter.cpp"

    def line(self):
        return 1

    def func(self):
        return "parseNode"

    def node(self):
        return self._node

    def node_name(self):
        return self._name

    def node_operator(self):
        return self._operator

    def __str__(self):
        return f"In node {self._node} with name: {self._name} and operator: {self._operator} (parseNode): {self._desc}"

    __repr__ = __str__


of_release(ParserError)


class OnnxParser:
    """Reads ONNX into a network."""

    def __init__(self, network, logger):
        self._network, self._logger, self._errors, self._flags = network, logger, [], 0

    @property
    def num_errors(self):
        return len(self._errors)

    def get_error(self, index):
        return self._errors[index]

    def clear_errors(self):
        self._errors.clear()

    @property
    def flags(self):
        return self._flags

    def set_flag(self, flag):
        if not isinstance(flag, OnnxParserFlag):
            raise TypeError("incompatible function arguments: an OnnxParserFlag is needed")
        self._flags |= 1 << flag.value

    def get_flag(self, flag):
        return bool(self._flags >> flag.value & 1)

    def clear_flag(self, flag):
        self._flags &= ~(1 << flag.value)

    def parse(self, model, path=None):
        folder = "" if path is None else str(Path(path).parent)
        return self._parse(bytes(model), folder)

    def parse_from_file(self, model):
        if not isinstance(model, str):
            raise TypeError(f"parse_from_file(): incompatible function arguments: {type(model).__name__}")
        try:
            data = Path(model).read_bytes()
        except OSError:
            return self._refuse(f"Could not open file {model}")
        return self._parse(data, str(Path(model).parent))

    def _refuse(self, *arguments):
        self._errors.append(ParserError(*arguments))
        self._logger.log(ILogger.ERROR, str(self._errors[-1]))
        return False

    def _parse(self, data, folder):
        if not self._network._explicit:
            return self._refuse(
                "This version of the ONNX parser only supports networks with an explicit batch dimension"
            )
        try:
            model = onnx.load_model_from_string(data)
            if not model.graph.node:
                raise ValueError("no graph")
        except Exception:  # noqa: BLE001  whatever protobuf says
            return self._refuse("Failed to parse ONNX model")
        try:
            onnx.load_external_data_for_model(model, folder)
        except Exception as error:  # noqa: BLE001  onnx has several
            return self._refuse(f"Failed to import initializer: {error}")
        for index, node in unsupported(model, NUMBER):
            self._refuse(f"No importer registered for op: {node.op_type}", index, node.name, node.op_type)
        if self._errors:
            return False
        self._network._graph = Graph(model)
        self._network._layers = [ILayer(*one, self._network) for one in self._network._graph.layers()]
        return True


of_release(OnnxParser)
