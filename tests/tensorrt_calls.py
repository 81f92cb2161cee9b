"""Which members of TensorRT a source uses, how it calls them, and in which releases it gets there."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

Releases = frozenset[str]
MODULE = ""
"""The class that stands for the module itself."""
NAMES = {
    "trt": MODULE, "tensorrt": MODULE, "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser",
    "error": "ParserError", "config": "IBuilderConfig", "layer": "ILayer", "cache": "ITimingCache",
    "runtime": "Runtime", "engine": "ICudaEngine", "context": "IExecutionContext",
}  # fmt: skip
"""Of variables and attributes that hold something of TensorRT, unless an annotation says otherwise; with an s: many."""
Kinds = Mapping[str, str | None]
"""What variables hold; None: nothing of TensorRT."""
NESTED = {("ILogger", "Severity"): "Severity"}


@dataclass(frozen=True)
class Use:
    """A member at work."""

    kind: str
    """Its class; MODULE for names of the module."""
    name: str
    line: int
    releases: Releases
    """Where this line is reached."""
    arguments: int | None = None
    """Without self, of a call; None where it is not called."""
    keywords: tuple[str, ...] = ()
    is_set: bool = False
    overrides: tuple[str, ...] | None = None
    """Parameters of a method that takes a method's place."""


@dataclass
class Walk:
    """One source, walked function by function with the releases that reach each line."""

    source: str
    releases: Releases
    has: Callable[[str, str], Releases]
    """The releases that have a member of a class."""
    returns: Mapping[tuple[str, str], str]
    """The classes that calls answer with."""
    distinctive: frozenset[str]
    """Names that only members of TensorRT have: where nobody knows whose one is, it is reported."""
    uses: list[Use] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def run(self) -> Walk:
        """Find all uses; functions of this source are reached where their calls are."""
        tree = ast.parse(self.source)
        functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        called = {name for node in ast.walk(tree) if isinstance(node, ast.Call) if (name := _called(node)) in functions}
        self._functions = functions
        imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
        self._imported = {one.asname or one.name for node in imports for one in node.names}
        private = {name for name in called if name.startswith("_")}
        self._reached = {name: frozenset() if name in private else self.releases for name in functions}
        before: dict[str, Releases] | None = None
        while before != self._reached:
            before = dict(self._reached)
            self.uses, self.unknown = [], []
            self._block(tree.body, self.releases, {})
        return self

    # Statements

    def _block(self, body: Iterable[ast.stmt], reached: Releases, kinds: Kinds) -> None:
        for statement in body:
            kinds = {**kinds, **self._assigned(statement, kinds)}
            if isinstance(statement, ast.If):
                where, otherwise = self._test(statement.test, kinds)
                self._expression(statement.test, reached, kinds)
                self._block(statement.body, reached & where, kinds)
                self._block(statement.orelse, reached & otherwise, kinds)
                if isinstance(statement.body[-1], (ast.Return, ast.Raise, ast.Continue)):
                    reached = reached & otherwise
            elif isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self._function(statement, reached, kinds)
            elif isinstance(statement, ast.ClassDef):
                self._class(statement, reached, kinds)
            else:
                self._compound(statement, reached, kinds)

    def _assigned(self, statement: ast.stmt, kinds: Kinds) -> Kinds:
        """Return what a variable holds from here on."""
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            kind = self._kind(statement.value, kinds)
            return {} if kind is None else {statement.targets[0].id: kind}
        return {}

    def _compound(self, statement: ast.stmt, reached: Releases, kinds: Kinds) -> None:
        for child in ast.iter_child_nodes(statement):
            if isinstance(child, ast.expr):
                self._expression(child, reached, kinds)
            elif isinstance(child, ast.ExceptHandler):
                self._block(child.body, reached, {**kinds, child.name or "": None})
            elif isinstance(child, ast.withitem):
                self._expression(child.context_expr, reached, kinds)
        for name in ("body", "orelse", "finalbody"):
            self._block(getattr(statement, name, []), reached, kinds)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef, reached: Releases, kinds: Kinds) -> None:
        reached = reached & self._reached.get(node.name, self.releases)
        parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        # What is annotated with a type is that; TensorRT's types are Any to a type checker.
        others = {one.arg: None for one in parameters if one.annotation and ast.unparse(one.annotation) != "Any"}
        self._block(node.body, reached, {**kinds, **others})

    def _class(self, node: ast.ClassDef, reached: Releases, kinds: Kinds) -> None:
        bases = [
            base.attr
            for base in node.bases
            if isinstance(base, ast.Attribute) and self._kind(base.value, kinds) == MODULE
        ]
        for base in node.bases:
            self._expression(base, reached, kinds)
        for method in node.body:
            if bases and isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                if not self.has(bases[0], method.name):
                    continue  # a method of our own
                parameters = tuple(argument.arg for argument in method.args.args[1:])
                self.uses.append(Use(bases[0], method.name, method.lineno, reached, overrides=parameters))
        self._block(node.body, reached, kinds)

    # Expressions

    def _expression(self, node: ast.AST, reached: Releases, kinds: Kinds) -> None:
        if isinstance(node, ast.IfExp):
            where, otherwise = self._test(node.test, kinds)
            self._expression(node.test, reached, kinds)
            self._expression(node.body, reached & where, kinds)
            self._expression(node.orelse, reached & otherwise, kinds)
            return
        if isinstance(node, ast.BoolOp):
            for value in node.values:
                self._expression(value, reached, kinds)
                where, otherwise = self._test(value, kinds)
                reached = reached & (where if isinstance(node.op, ast.And) else otherwise)
            return
        if isinstance(node, ast.Call):
            self._call(node, reached, kinds)
        elif isinstance(node, ast.Attribute):
            self._member(node, Use("", node.attr, node.lineno, reached, is_set=isinstance(node.ctx, ast.Store)), kinds)
        for child in ast.iter_child_nodes(node):
            if not (isinstance(node, ast.Call) and child is node.func and isinstance(child, ast.Attribute)):
                self._expression(child, reached, kinds)
            else:
                self._expression(child.value, reached, kinds)

    def _call(self, node: ast.Call, reached: Releases, kinds: Kinds) -> None:
        name = _called(node)
        if name in self._functions:
            self._reached[name] = self._reached[name] | reached
        if isinstance(node.func, ast.Attribute):
            keywords = tuple(keyword.arg or "**" for keyword in node.keywords)
            use = Use("", node.func.attr, node.lineno, reached, arguments=len(node.args), keywords=keywords)
            self._member(node.func, use, kinds)

    def _member(self, node: ast.Attribute, use: Use, kinds: Kinds) -> None:
        kind = self._kind(node.value, kinds)
        if kind is not None:
            self.uses.append(Use(kind, *(getattr(use, name) for name in list(Use.__dataclass_fields__)[1:])))
        elif node.attr in self.distinctive and _root(node) not in self._imported:
            self.unknown.append(f"line {node.lineno}: {ast.unparse(node)}: whose member is it?")

    def _kind(self, node: ast.expr, kinds: Kinds) -> str | None:
        """Return the class of what an expression holds, or the class that it is; None where it is not TensorRT's."""
        if isinstance(node, ast.Name):
            return kinds[node.id] if node.id in kinds else NAMES.get(node.id)
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Attribute):
                return None
            kind = self._kind(node.func.value, kinds)
            if kind is None:
                return None
            return node.func.attr if kind == MODULE else self.returns.get((kind, node.func.attr))
        if isinstance(node, ast.Attribute):
            kind = self._kind(node.value, kinds)
            if kind == MODULE:
                return node.attr
            if kind is not None:
                return NESTED.get((kind, node.attr))
            # An attribute of ours is known by its name.
            is_self = isinstance(node.value, ast.Name) and node.value.id == "self"
            return NAMES.get(node.attr.lstrip("_")) if is_self else None
        if isinstance(node, ast.Subscript):
            name = ast.unparse(node.value).rpartition(".")[2].lstrip("_")
            return NAMES.get(name.removesuffix("s")) if name.endswith("s") else None
        return None

    # Conditions

    def _test(self, node: ast.expr, kinds: Kinds) -> tuple[Releases, Releases]:
        """Return the releases in which a condition may hold, and those in which it may not."""
        everywhere = (self.releases, self.releases)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            where, otherwise = self._test(node.operand, kinds)
            return otherwise, where
        if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
            where = self.releases
            for value in node.values:
                where = where & self._test(value, kinds)[0]
            return where, self.releases
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            return everywhere
        if node.func.id == "hasattr" and isinstance(node.args[1], ast.Constant):
            kind = self._kind(node.args[0], kinds)
            if kind is None:
                return everywhere
            having = self.has(kind, str(node.args[1].value))
            return having, self.releases - having
        function = self._functions.get(node.func.id)
        if function is not None and isinstance(function.body[-1], ast.Return) and len(function.body) == 1:
            return self._test(function.body[-1].value or ast.Constant(None), {})
        return everywhere


def _root(node: ast.expr) -> str:
    """Return the name that a chain of attributes starts with."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _called(node: ast.Call) -> str:
    """Return the name of a function, or of a method of self."""
    if isinstance(node.func, ast.Name):
        return node.func.id
    if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) and node.func.value.id == "self":
        return node.func.attr
    return ""


def parameters(signature: str) -> Iterator[str]:
    """Yield the parameters in a signature as pybind11 writes it, without self: `name: type = default`."""
    text = signature[signature.index("(") + 1 : signature.rindex(")", 0, signature.rfind("->"))]
    depth, start = 0, 0
    for position, character in enumerate(f"{text},"):
        depth += {"(": 1, "[": 1, "<": 1, "{": 1, ")": -1, "]": -1, ">": -1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parameter = text[start:position].strip()
            start = position + 1
            if parameter and not parameter.startswith("self:"):
                yield parameter
