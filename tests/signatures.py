"""What the sources of a package define, without importing it: its modules, the signatures of functions and classes.

Enough for checking how we call a package whose wheel can't be installed here. What a source does while it is imported
(decorators that change a signature, names made at run time) is not seen.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from inspect import Parameter, Signature

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Sources:
    """A package, by the texts of its files."""

    def __init__(self, read: Callable[[str], str | None]) -> None:
        """`read` gives the text of a file such as `vllm/config/__init__.py`, or None."""
        self._read = read
        self.module = cache(self._module)

    def _module(self, name: str) -> Module | None:
        path = name.replace(".", "/")
        for file in (f"{path}.py", f"{path}/__init__.py"):
            text = self._read(file)
            if text is not None:
                return Module(self, name, ast.parse(text), is_package=file.endswith("__init__.py"))
        return None

    def find(self, module: str, name: str) -> Found | None:
        """What `from module import name` gets, followed to where it is defined."""
        here = self.module(module)
        return here.find(name) if here is not None else None


@dataclass(frozen=True)
class Found:
    """A definition, and the module that it stands in. `node` is a module's own tree for a module."""

    module: Module
    node: ast.AST


class Module:
    def __init__(self, sources: Sources, name: str, tree: ast.Module, *, is_package: bool) -> None:
        self.sources, self.name, self.tree, self._is_package = sources, name, tree, is_package

    @cached_property
    def _names(self) -> dict[str, ast.AST]:
        """Definitions at the top level, also those under `if`, `try` and `with`; of several the first."""
        names: dict[str, ast.AST] = {}
        for node in _statements(self.tree.body):
            for name in _defined(node):
                names.setdefault(name, node)
        return names

    def find(self, name: str) -> Found | None:
        node = self._names.get(name)
        if isinstance(node, ast.ImportFrom):
            module = self._absolute(node)
            original = next(a.name for a in node.names if (a.asname or a.name) == name)
            return self.sources.find(module, original) or Found(self, node)
        if node is not None:
            return Found(self, node)
        inner = self.sources.module(f"{self.name}.{name}") if self._is_package else None
        if inner is not None:
            return Found(inner, inner.tree)
        return self._lazy(name)

    def _lazy(self, name: str) -> Found | None:
        """A name that the module's `__getattr__` imports, by a table such as vLLM's {"LLM": ".entrypoints.llm:LLM"}."""
        for table in (node for node in ast.walk(self.tree) if isinstance(node, ast.Dict)):
            for key, value in zip(table.keys, table.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == name and isinstance(value, ast.Constant):
                    module, _, attribute = str(value.value).partition(":")
                    return self.sources.find(self.name + module, attribute)
        return None

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        above = self.name.split(".")
        above = above[: len(above) - node.level + self._is_package]
        return ".".join([*above, *([node.module] if node.module else [])])


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        for block in ("body", "orelse", "finalbody"):
            if not isinstance(node, Function | ast.ClassDef):
                yield from _statements(getattr(node, block, []))
        for handler in getattr(node, "handlers", []):
            yield from _statements(handler.body)


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, Function | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import):
        return [alias.asname or alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.AnnAssign):
        return [node.target.id] if isinstance(node.target, ast.Name) else []
    if isinstance(node, ast.Assign):
        return [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return []


class Class:
    """A class with its bases, as far as these are in the package."""

    def __init__(self, found: Found) -> None:
        assert isinstance(found.node, ast.ClassDef), ast.dump(found.node)[:200]
        self.module, self.node = found.module, found.node

    @cached_property
    def bases(self) -> list[Class]:
        found = []
        for base in self.node.bases:
            plain = base.value if isinstance(base, ast.Subscript) else base  # Engine[Init, Update]
            known = self.module.find(plain.id) if isinstance(plain, ast.Name) else None
            if known is not None and isinstance(known.node, ast.ClassDef):
                found.append(Class(known))
        return found

    @property
    def lineage(self) -> Iterator[Class]:
        """This class, then what it inherits from."""
        yield self
        for base in self.bases:
            yield from base.lineage

    def method(self, name: str) -> Function | None:
        for each in self.lineage:
            for node in each.node.body:
                if isinstance(node, Function) and node.name == name:
                    return node
        return None

    @property
    def abstract(self) -> set[str]:
        """Methods that a subclass must define."""
        left: dict[str, bool] = {}
        for each in self.lineage:
            for node in each.node.body:
                if isinstance(node, Function):
                    decorated = {ast.unparse(decorator) for decorator in node.decorator_list}
                    left.setdefault(node.name, "abstractmethod" in decorated or "abc.abstractmethod" in decorated)
        return {name for name, is_abstract in left.items() if is_abstract}

    @property
    def fields(self) -> dict[str, bool]:
        """Annotated attributes of a dataclass or the like, and whether each has a default."""
        found: dict[str, bool] = {}
        for each in reversed(list(self.lineage)):
            for node in each.node.body:
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    if "ClassVar" in ast.unparse(node.annotation):
                        continue
                    value = "" if node.value is None else ast.unparse(node.value)
                    if "init=False" in value:
                        continue
                    has_default = bool(value) and (not value.startswith("field(") or "default" in value)
                    found[node.target.id] = has_default
        return found

    def annotation(self, name: str) -> str:
        """Of a field, as it stands in the source."""
        for each in self.lineage:
            for node in each.node.body:
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
                    return ast.unparse(node.annotation)
        raise AssertionError(f"{self.node.name} has no field {name}")

    @property
    def attributes(self) -> set[str]:
        """All names that an instance may have: methods, fields, and what methods assign to `self`."""
        names = set()
        for each in self.lineage:
            for node in ast.walk(each.node):
                if isinstance(node, Function):
                    names.add(node.name)
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    names.add(node.attr)
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    names.add(node.target.id)
        return names

    @property
    def signature(self) -> Signature:
        """Of a call of the class."""
        init = self.method("__init__")
        if init is not None:
            return signature(init, bound=True)
        parameters = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=None if has_default else Parameter.empty)
            for name, has_default in self.fields.items()
        ]
        return Signature(parameters)


def signature(function: Function, *, bound: bool = False) -> Signature:
    """Of a function; without its first parameter where it is `bound` to an object."""
    given = function.args
    plain = [*given.posonlyargs, *given.args]
    defaults = [Parameter.empty] * (len(plain) - len(given.defaults)) + [None] * len(given.defaults)
    parameters = [
        Parameter(argument.arg, Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for argument, default in zip(plain, defaults, strict=True)
    ]
    static = any(ast.unparse(decorator) == "staticmethod" for decorator in function.decorator_list)
    parameters = parameters[1:] if bound and not static else parameters
    if given.vararg:
        parameters.append(Parameter(given.vararg.arg, Parameter.VAR_POSITIONAL))
    for argument, value in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        default = Parameter.empty if value is None else None
        parameters.append(Parameter(argument.arg, Parameter.KEYWORD_ONLY, default=default))
    if given.kwarg:
        parameters.append(Parameter(given.kwarg.arg, Parameter.VAR_KEYWORD))
    return Signature(parameters)


def takes(has: Signature, call: ast.Call) -> str | None:
    """Why the signature doesn't take this call's arguments; None where it does, as far as they can be counted."""
    positional = [argument for argument in call.args if not isinstance(argument, ast.Starred)]
    named = [keyword.arg for keyword in call.keywords if keyword.arg is not None]
    whole = len(positional) == len(call.args) and len(named) == len(call.keywords)
    if has.parameters and all(p.kind is Parameter.KEYWORD_ONLY for p in has.parameters.values()) and positional:
        # The generated __init__ of a dataclass takes its fields in order.
        names = list(has.parameters)[: len(positional)]
        positional, named = [], [*names, *named]
    try:
        bind: Callable[..., inspect.BoundArguments] = has.bind if whole else has.bind_partial
        bind(*positional, **dict.fromkeys(named))
    except TypeError as error:
        return str(error)
    return None
