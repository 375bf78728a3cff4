"""How this project's source uses another package: what it imports, what it calls and with what, whom it subclasses."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Use:
    """A place in our source."""

    file: str
    module: str  # of the other package
    name: str  # in that module; "" for the module itself
    attribute: str  # of what the name stands for; "" for the name itself
    node: ast.AST  # the import, the call, the attribute, or the class that has it as its base

    @property
    def place(self) -> str:
        return f"{self.file}:{getattr(self.node, 'lineno', 0)} ({'.'.join(self.path)})"

    @property
    def path(self) -> list[str]:
        return [part for part in (self.module, self.name, self.attribute) if part]


def uses(package: str, folder: Path = ROOT / "rlaif_ray") -> list[Use]:
    """Of a package, in all files."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text()
        if package in text:
            found += list(_uses_in(str(path.relative_to(folder.parent)), ast.parse(text), package))
    return found


def _uses_in(file: str, tree: ast.Module, package: str) -> Iterator[Use]:
    known: dict[str, tuple[str, str]] = {}  # our name for it: module, name there
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package and not node.level:
            for alias in node.names:
                known[alias.asname or alias.name] = (str(node.module), alias.name)
                yield Use(file, str(node.module), alias.name, "", node)
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == package and "." in alias.name:
                    yield Use(file, alias.name, "", "", node)
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in known and id(node) in called:
            yield Use(file, *known[node.id], "", called[id(node)])
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            yield Use(file, *known[node.value.id], node.attr, called.get(id(node), node))
        elif isinstance(node, ast.ClassDef):
            for base in node.bases:
                plain = base.value if isinstance(base, ast.Subscript) else base
                if isinstance(plain, ast.Name) and plain.id in known:
                    yield Use(file, *known[plain.id], "", node)


def calls_on(owner: str, *files: str) -> list[tuple[str, ast.Call]]:
    """Calls of methods of an object, such as `self._llm`; each with its place."""
    found = []
    for file in files:
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and ast.unparse(node.func.value) == owner
            ):
                found.append((f"{file}:{node.lineno}", node))
    return found
