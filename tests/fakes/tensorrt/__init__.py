"""A fake of TensorRT's Python bindings that really computes, with onnxruntime, in the memory of a simulated GPU.

`FAKE_TENSORRT` says which release it is: 8.5, 8.6, 10.3, 10.7, 10.13, 10.16 or 11.4; broken: a library is missing.
"""

from tensorrt import _build, _network, _release, _runtime, _types

__version__ = _release.VERSION
_NAMES = {
    _build: "Builder IBuilderConfig IOptimizationProfile ITimingCache",
    _network: "ILayer INetworkDefinition ITensor OnnxParser ParserError",
    _runtime: "Runtime ICudaEngine IExecutionContext",
    _types: (
        "BuilderFlag DataType Dims IHostMemory ILogger LayerType Logger MemoryPoolType NetworkDefinitionCreationFlag"
        " OnnxParserFlag PreviewFeature ProfilingVerbosity TacticSource TensorIOMode TensorLocation nptype"
    ),
}
for _module, _names in _NAMES.items():
    for _name in _names.split():
        globals()[_name] = getattr(_module, _name)
for _name, _kind in _types.ALIASES.items():
    if hasattr(_types.DataType, _kind):
        globals()[_name] = _types.DataType[_kind]
if _release.NUMBER >= (10,):
    ExecutionContextAllocationStrategy = _runtime.ExecutionContextAllocationStrategy
    IProgressMonitor = _types.IProgressMonitor
