"""A child of the tests: builds engines of damaged graphs, and runs them whole; a crash ends it, and says at what.

    python tests/damage.py onnx-fp32|onnx-int8 FOLDER FIRST COUNT DAMAGE...

Prints what a case is before it, and what became of it behind; whatever is no error of the project ends the program.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
from bundled import BUNDLE, sound_of
from onnx import numpy_helper

from edge_asr.config import EngineConfig
from edge_asr.engine.build import build_engine
from edge_asr.errors import BundleError, EngineError
from edge_asr.loader import load_engine, load_whole
from edge_asr.recognizer.bundle import Bundle, read_bundle

NAMES = {"onnx-fp32": "model.onnx", "onnx-int8": "model_quant.onnx"}
HEADER = 200_000
"""Bytes at the start of a graph that hold its nodes, not its weights."""


def main() -> None:
    kind, folder, first, count, *damages = sys.argv[1:]
    original = (BUNDLE / NAMES[kind]).read_bytes()
    bundle = side_files(kind, Path(folder))
    path, engine = Path(folder) / NAMES[kind], Path(folder) / "engine"
    for damage in damages:
        for number in range(int(first), int(first) + int(count)):
            say(f"\ncase {kind} {damage} {number}\n")
            path.write_bytes(DAMAGES[damage](original, random.Random(f"{damage} {number}")))
            say(f"{build(bundle(), kind, engine)} {run_whole(bundle())}\n")


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def side_files(kind: str, folder: Path) -> Callable[[], Bundle]:
    """Make a bundle but for its graph; return what reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("am.mvn", "tokens.json", "config.yaml"):
        (folder / name).write_bytes((BUNDLE / name).read_bytes())

    def read() -> Bundle:
        found = read_bundle(folder)
        # The damage may have struck what tells the two kinds apart.
        path = folder / NAMES[kind]
        return Bundle(found.name, folder, {kind: path}, found.config, found.tokens, found.cmvn, found.gates)

    return read


def build(bundle: Bundle, kind: str, out: Path) -> str:
    """Build the engine, and let it recognise; return what became of it."""
    try:
        build_engine(bundle, kind, out, threads=1)
        recognizer = load_engine(bundle, out, EngineConfig(threads=1))
    except (BundleError, EngineError) as error:
        return f"{type(error).__name__}<{one_line(error)}>"
    finally:
        left = sorted(path.name for path in out.glob(".*")) if out.is_dir() else []
        assert not left, f"left behind: {left}"
    text = recognizer.recognize(sound_of("01.wav")).text
    recognizer.close()
    return f"engine<{text}>"


def run_whole(bundle: Bundle) -> str:
    """Run the graph as it is; return what became of it."""
    try:
        recognizer = load_whole(bundle, threads=1)
        text = recognizer.recognize(sound_of("01.wav")).text
    except (BundleError, EngineError) as error:
        return f"{type(error).__name__}<{one_line(error)}>"
    recognizer.close()
    return f"whole<{text}>"


def one_line(error: Exception) -> str:
    lines = str(error).splitlines()
    assert len(lines) == 1, f"not one line: {error}"
    return lines[0].encode("ascii", "replace").decode()


# Damages of the bytes


def cut(graph: bytes, rng: random.Random) -> bytes:
    return graph[: rng.choice((rng.randrange(HEADER), rng.randrange(len(graph))))]


def flip_header(graph: bytes, rng: random.Random) -> bytes:
    return flip(graph, rng, HEADER)


def flip_anywhere(graph: bytes, rng: random.Random) -> bytes:
    return flip(graph, rng, len(graph))


def flip(graph: bytes, rng: random.Random, end: int) -> bytes:
    damaged = bytearray(graph)
    for _ in range(rng.choice((1, 1, 4, 64))):
        damaged[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def zero(graph: bytes, rng: random.Random) -> bytes:
    start, length = rng.randrange(rng.choice((HEADER, len(graph)))), rng.choice((1, 64, 4096, 65536))
    return graph[:start] + bytes(len(graph[start : start + length])) + graph[start + length :]


# Damages of the graph


def on_model(change: Callable[[onnx.ModelProto, random.Random], None]) -> Callable[[bytes, random.Random], bytes]:
    def damage(graph: bytes, rng: random.Random) -> bytes:
        model = onnx.load_from_string(graph)
        change(model, rng)
        changed: bytes = model.SerializeToString()
        return changed

    return damage


def remove_node(model: onnx.ModelProto, rng: random.Random) -> None:
    del model.graph.node[rng.randrange(len(model.graph.node))]


def remove_tensor(model: onnx.ModelProto, rng: random.Random) -> None:
    del model.graph.initializer[rng.randrange(len(model.graph.initializer))]


def reshape_tensor(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = rng.choice(list(model.graph.initializer))
    array = numpy_helper.to_array(tensor)
    changed = rng.choice(
        (array.T, array.reshape(-1), array[:1], array[..., :-1], np.zeros(0, array.dtype), array.astype(np.float64))
    )
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(changed), tensor.name))


def rename_input(model: onnx.ModelProto, rng: random.Random) -> None:
    node = rng.choice([node for node in model.graph.node if node.input])
    node.input[rng.randrange(len(node.input))] = rng.choice(("", "nothing", "speech", rng.choice(names(model))))


def make_cycle(model: onnx.ModelProto, rng: random.Random) -> None:
    nodes = list(model.graph.node)
    early = rng.choice([node for node in nodes[: len(nodes) // 2] if node.input])
    early.input[0] = rng.choice(nodes[len(nodes) // 2 :]).output[0]


def cycle_of_names(model: onnx.ModelProto, rng: random.Random) -> None:
    """Let two Identity nodes feed each other, and a matrix come from them."""
    first = onnx.helper.make_node("Identity", ["b"], ["a"], name="first")
    second = onnx.helper.make_node("Identity", ["a"], ["b"], name="second")
    node = rng.choice([node for node in model.graph.node if node.op_type.startswith("MatMul")])
    node.input[1] = "a"
    model.graph.node.extend([first, second])


def change_operator(model: onnx.ModelProto, rng: random.Random) -> None:
    kinds = sorted({node.op_type for node in model.graph.node} | {"Nonsense"})
    rng.choice(list(model.graph.node)).op_type = rng.choice(kinds)


def drop_inputs(model: onnx.ModelProto, rng: random.Random) -> None:
    del rng.choice([node for node in model.graph.node if node.input]).input[:]


def names(model: onnx.ModelProto) -> list[str]:
    return [tensor.name for tensor in model.graph.initializer] + [node.output[0] for node in model.graph.node]


def every_damage() -> Iterator[tuple[str, Callable[[bytes, random.Random], bytes]]]:
    for change in (cut, flip_header, flip_anywhere, zero):
        yield change.__name__, change
    for on_graph in (
        remove_node, remove_tensor, reshape_tensor, rename_input, make_cycle, cycle_of_names, change_operator,
        drop_inputs,
    ):  # fmt: skip
        yield on_graph.__name__, on_model(on_graph)


DAMAGES = dict(every_damage())

if __name__ == "__main__":
    main()
