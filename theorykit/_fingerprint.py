"""What a stored result depends on, as one digest.

The digest covers the values of the config (thresholds left out), the code that ``run`` reaches, the versions that can
change a number, and the contents of external data files. Code is compared as syntax trees without docstrings, so
comments, formatting and documentation may change freely.

Which code counts is found without importing anything:

- in the experiment's own file, ``run`` and everything it reaches by name, transitively; of ``Config`` only the methods,
  properties and class constants, because the field values are in the digest already;
- every project module imported by that code, transitively and as a whole file, also by imports inside functions;
- a package whose ``__init__`` resolves names lazily (it binds ``__getattr__``) counts as a whole when a name is taken
  from it, since the file that will answer is not known before the import;
- of a package that is merely on the way to a submodule, only the statements of ``__init__`` that have an effect.

Modules loaded by a computed name (``importlib.import_module``) are not seen.
"""

import ast
import copy
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import symtable
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxlib
import numpy as np

from theorykit import _files

# They judge or store numbers and do not make them, so an edit of them must not retrain anything.
IGNORED = frozenset(
    f"theorykit.{name}"
    for name in ("verify", "_verdict", "_statistics", "results", "_experiment", "_fingerprint", "_files")
)

_STARTED = time.time()
_LOADED: dict[str, tuple[Any, str]] = {}


class Fingerprint(NamedTuple):
    """Digest of a result's ingredients.

    ``digest`` is the SHA-256 of all; ``ingredients`` maps each ingredient's name to its own digest or value, so that a
    stale result can say what changed; ``sources`` maps each project module to its file and the digest of its code.
    """

    digest: str
    ingredients: dict[str, Any]
    sources: dict[str, tuple[Path, str]]


def fingerprint(
    module: str,
    config: Any,
    *,
    packages: Sequence[str],
    data: Sequence[Path] = (),
    ignore: frozenset[str] = IGNORED,
) -> Fingerprint:
    """Digest of everything that the arrays of one experiment depend on.

    Parameters
    ----------
    module
        Dotted name of the experiment's module, for instance ``"experiments.ntk_width"``.
    config
        The experiment's config, a dataclass instance.
    packages
        Top-level packages whose code counts as the project's.
    data
        External data files; their contents count, not their places.
    ignore
        Modules that never count.

    Returns
    -------
    Fingerprint

    Raises
    ------
    ModuleNotFoundError
        If a package or the module's file is not found.
    TypeError
        If the config holds a value that has no JSON form.
    """
    roots = {package: _root(package) for package in packages}
    path = _file(roots, module)
    if path is None:
        raise ModuleNotFoundError(f"no file for the experiment {module} below {list(map(str, roots.values()))}")
    reached = _reached(_tree(path.read_bytes()), ("run", "Config"))
    own = _digest("\n".join(map(ast.dump, reached)))
    sources = {module: (path, own)}
    entries = _closure(roots, _targets(reached, module, is_package=False), ignore | {module}, sources)
    ingredients = {
        "config": values(config),
        "run": own,
        **dict(sorted(entries.items())),
        **environment(),
        **{f"data file {i}, {Path(file).name}": _files.digest(file) for i, file in enumerate(data)},
    }
    return Fingerprint(_digest(json.dumps(ingredients, sort_keys=True)), ingredients, sources)


def values(config: Any) -> dict[str, Any]:
    """The fields of a config that decide its result, in JSON's types; thresholds are left out."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"a config must be an instance of a dataclass, got {config!r}: decorate Config with @dataclass")
    return {
        field.name: _plain(getattr(config, field.name), field.name)
        for field in dataclasses.fields(config)
        if "threshold" not in field.metadata
    }


def thresholds(config: Any) -> dict[str, dict[str, Any]]:
    """The thresholds of a config, each with its value and its reason."""
    return {
        field.name: {
            "value": _plain(getattr(config, field.name), field.name),
            "reason": field.metadata["threshold"],
        }
        for field in dataclasses.fields(config)
        if "threshold" in field.metadata
    }


def environment() -> dict[str, str]:
    """What can change a number without any code of the project changing."""
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "numpy": np.__version__,
        "backend": jax.default_backend(),
        "x64": str(jax.config.jax_enable_x64),
    }


def edited_since_loaded(sources: Mapping[str, tuple[Path, str]], before: frozenset[str]) -> list[str]:
    """Modules whose file was edited after this process loaded them.

    A result computed now would come from the old code and carry the digest of the new one. A module counts as fresh if
    it was loaded by the present call (it is not in ``before``, the names of the modules loaded earlier), was reloaded
    since it was last seen, or its code is as last seen; one never seen before must be older than this process.
    """
    edited = []
    for name, (path, digest) in sources.items():
        module = sys.modules.get(name)
        if module is None:
            continue
        spec, known = _LOADED.get(name, (None, None))
        if spec is None:
            stale = name in before and path.stat().st_mtime > _STARTED
        else:
            stale = spec is module.__spec__ and known != digest
        if stale:
            edited.append(name)
        else:
            _LOADED[name] = (module.__spec__, digest)
    return edited


def _plain(value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else repr(float(value))  # JSON has no infinity
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, tuple | list):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    raise TypeError(
        f"the config's field {where} holds {type(value).__name__}, which has no JSON form: use numbers, strings, "
        "tuples, dicts with string keys or nested dataclasses"
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _root(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the package {package!r} is not importable: run from the repository's root, or add that to PYTHONPATH"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _file(roots: Mapping[str, Path], module: str) -> Path | None:
    top, *rest = module.split(".")
    if top not in roots:
        return None
    base = roots[top].joinpath(*rest)
    for candidate in (base / "__init__.py", base.with_name(f"{base.name}.py")):
        if candidate.is_file():
            return candidate
    return None


class _Strip(ast.NodeTransformer):
    """Drop what never changes a number: docstrings, and blocks for type checkers or for use as a script."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if getattr(node, "body", None) == [] and not isinstance(node, ast.Module):
            node.body = [ast.Pass()]
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else self.generic_visit(node)

    def visit_If(self, node: ast.If) -> Any:
        test = ast.unparse(node.test)
        never = test in ("TYPE_CHECKING", "typing.TYPE_CHECKING") or test.startswith("__name__ ==")
        self.generic_visit(node)
        return node.orelse if never else node


@functools.cache  # keyed by content, hence never stale
def _tree(source: bytes) -> ast.Module:
    return _Strip().visit(ast.parse(source))


@functools.cache
def _code_digest(source: bytes) -> str:
    return _digest(ast.dump(_tree(source)))


def _reached(tree: ast.Module, start: Sequence[str]) -> list[ast.stmt]:
    """Top-level statements that the names in ``start`` reach, in the file's order."""
    statements = [piece for statement in tree.body for piece in _split(statement)]
    binders = defaultdict(list)
    kept, todo = set(), list(start)
    for i, statement in enumerate(statements):
        bound = _bound(statement)
        if bound is None:
            kept.add(i)
            todo += _names(statement)
        for name in bound or ():
            binders[name].append(i)
    seen = set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for i in binders[name]:
            kept.add(i)
            todo += _names(statements[i])
    return [statements[i] for i in sorted(kept)]


def _split(statement: ast.stmt) -> list[ast.stmt]:
    """One statement per imported name, and Config without its fields."""
    if isinstance(statement, ast.Import):
        return [ast.Import([alias]) for alias in statement.names]
    if isinstance(statement, ast.ImportFrom):
        return [ast.ImportFrom(statement.module, [alias], statement.level) for alias in statement.names]
    if isinstance(statement, ast.ClassDef) and statement.name == "Config":
        body = [s for s in statement.body if not isinstance(s, ast.AnnAssign) or "ClassVar" in ast.dump(s.annotation)]
        config = copy.copy(statement)
        config.body = body or [ast.Pass()]
        return [config]
    return [statement]


def _bound(statement: ast.stmt) -> set[str] | None:
    """Names that a statement defines or changes; None for one that must always be kept, for its effects."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        name = statement.names[0].asname or statement.names[0].name.split(".")[0]
        return None if name == "*" else {name}
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        # Also X of X[i] = ... and of X.y = ...: the statement changes what X is.
        return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    return None


def _names(statement: ast.stmt) -> set[str]:
    """Module-level names that a statement uses; local variables of functions do not count."""
    todo = [symtable.symtable(ast.unparse(statement), "<statement>", "exec")]
    found = set()
    while todo:
        table = todo.pop()
        outermost = table.get_type() == "module"
        found |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and (outermost or s.is_global())}
        todo += table.get_children()
    return found


def _targets(statements: Sequence[ast.stmt], module: str, *, is_package: bool) -> Iterator[tuple[str, str | None]]:
    """(module, name taken from it or None) for each import in the statements, wherever it stands."""
    for statement in statements:
        for node in ast.walk(statement):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield alias.name, None
                    if not alias.asname:  # binds the top-level package, whose other members are then in reach
                        yield alias.name.split(".")[0], None
            elif isinstance(node, ast.ImportFrom):
                here = module.split(".") if is_package else module.split(".")[:-1]
                above = here[: len(here) - (node.level - 1)] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                for alias in node.names:
                    yield base, alias.name


def _closure(
    roots: Mapping[str, Path],
    targets: Iterator[tuple[str, str | None]],
    ignore: frozenset[str],
    sources: dict[str, tuple[Path, str]],
) -> dict[str, str]:
    """Digest of each project module that the targets reach; ``sources`` is filled on the way."""
    entries: dict[str, str] = {}
    todo, seen = list(targets), set()
    while todo:
        target = todo.pop()
        base, name = target
        if target in seen or base.split(".")[0] not in roots:
            continue
        seen.add(target)
        module = f"{base}.{name}" if name and _file(roots, f"{base}.{name}") else base
        parents = module.split(".")[:-1]
        for i in range(len(parents)):
            todo += _add_effects(roots, ".".join(parents[: i + 1]), entries)
        path = _file(roots, module)
        if path is None or module in ignore or f"module {module}" in entries:
            continue
        source = path.read_bytes()
        is_package = path.name == "__init__.py"
        entries[f"module {module}"] = _code_digest(source)
        sources[module] = (path, entries[f"module {module}"])
        todo += _targets(_tree(source).body, module, is_package=is_package)
        if is_package and any("__getattr__" in (_bound(s) or ()) for s in _tree(source).body):
            todo += [(f"{module}.{child}", None) for child in _submodules(path.parent)]
    return entries


def _add_effects(roots: Mapping[str, Path], package: str, entries: dict[str, str]) -> list[tuple[str, str | None]]:
    """Count the statements of a package's ``__init__`` that act when a submodule is imported; return their imports."""
    path = _file(roots, package)
    if path is None or f"import of {package}" in entries:
        return []
    body = [
        s for s in _tree(path.read_bytes()).body if not (_bound(s) and not isinstance(s, ast.Import | ast.ImportFrom))
    ]
    if not body:
        return []
    entries[f"import of {package}"] = _digest("\n".join(map(ast.dump, body)))
    return list(_targets(body, package, is_package=True))


def _submodules(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts:
            yield ".".join(parts)
