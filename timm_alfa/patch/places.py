"""Where ALFA's lines belong in a training script like timm's: found in its syntax tree, whatever its line numbers."""

from __future__ import annotations

import ast
import tokenize
from collections.abc import Iterator
from io import BytesIO

from ..errors import UsageError

__all__ = ["find_insertions", "source_encoding"]

_Scope = ast.Module | ast.FunctionDef | ast.AsyncFunctionDef


def find_insertions(source: bytes) -> dict[int, bytes]:
    """What to insert after which line.

    Args:
        source: A script without ALFA's lines.

    Returns:
        Whole lines, indented and ended as their surroundings are, by the number (from 1) of the line before.

    Raises:
        UsageError: For the first place that is not there, or not beyond doubt.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"is not a Python file ({error})") from None

    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "timm.task"]
    if not imports:
        raise UsageError("does not import from timm.task, as timm's train.py does from v1.0.27 on")

    parsing, _ = _one_assignment(tree, "parse_args", "args = parser.parse_args(...)")
    args, parser = _target(parsing), _receiver(parsing)
    creating, function = _one_assignment(tree, "ClassificationTask", "task = ClassificationTask(...)")
    task = _target(creating)
    if args not in _names(function) | _names(tree):
        raise UsageError(f"the function that creates the task does not know the arguments as {args}")
    taken = _assignments(function, "get_trainable_module")
    if not taken or taken[0].lineno < creating.lineno or _receiver(taken[0]) != task:
        raise UsageError(
            "the model is not taken from the task, as timm's train.py does from v1.0.27 on: "
            f"model = {task}.get_trainable_module()"
        )
    configured = [node for node in _assignments(function, "resolve_data_config") if node.lineno < creating.lineno]
    data_config = f", {_target(configured[-1])}" if configured else ""
    training, around = _one_assignment(tree, "train_one_epoch", "train_metrics = train_one_epoch(...)")
    folders = _assignments(function, "get_outdir")
    if around is not function or training.lineno < creating.lineno:
        raise UsageError("train_one_epoch(...) is not called after the task is created, in the same function")
    if len(folders) != 1 or folders[0].lineno > training.lineno:
        raise UsageError("output_dir = get_outdir(...) is not found once before training, in the same function")
    metrics, folder = _target(training), _target(folders[0])

    places: list[tuple[ast.stmt, str]] = [
        (imports[-1], "import timm_alfa.script"),
        (_last_flag(tree, parsing, parser), f"timm_alfa.script.add_arguments({parser})"),
        (parsing, f"timm_alfa.script.check_arguments({args})"),
        (_outermost_if(function, creating), f"{task} = timm_alfa.script.wrap_task({args}, {task}{data_config})"),
        (training, f"{metrics}.update(timm_alfa.script.epoch_metrics({args}, {task}, {folder}))"),
    ]
    lines = source.splitlines(keepends=True)
    return dict(_line_after(statement, text, lines, source_encoding(source)) for statement, text in places)


def source_encoding(source: bytes) -> str:
    """The encoding that a Python file, ``source``, declares, as a name to encode and decode parts of it with."""
    return tokenize.detect_encoding(BytesIO(source).readline)[0].removesuffix("-sig")


def _line_after(statement: ast.stmt, text: str, lines: list[bytes], encoding: str) -> tuple[int, bytes]:
    assert statement.end_lineno is not None
    assert statement.end_col_offset is not None
    first, last = lines[statement.lineno - 1], lines[statement.end_lineno - 1]
    indent = first[: len(first) - len(first.lstrip())]
    rest = last.decode(encoding).encode()[statement.end_col_offset :].strip()  # the tree counts bytes of UTF-8
    if len(indent) != statement.col_offset or (rest and not rest.startswith(b"#")):
        raise UsageError(f"line {statement.lineno}: a statement to insert after shares its line with another")
    end = b"\r\n" if last.endswith(b"\r\n") else b"\n"
    return statement.end_lineno, indent + text.encode(encoding) + end


def _one_assignment(tree: ast.Module, name: str, shown: str) -> tuple[ast.Assign, _Scope]:
    """The only ``x = name(...)`` or ``x = y.name(...)``, and the function (or module) that it is in."""
    found = [(node, scope) for scope in _scopes(tree) for node in _assignments(scope, name)]
    if len(found) != 1:
        raise UsageError(f"{shown} is expected once, and found {len(found)} times")
    return found[0]


def _scopes(tree: ast.Module) -> list[_Scope]:
    return [tree, *(node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))]


def _own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """Everything in a function but not in functions and classes inside it."""
    for child in ast.iter_child_nodes(scope):
        yield child
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            yield from _own_nodes(child)


def _assignments(scope: _Scope, name: str) -> list[ast.Assign]:
    """``x = name(...)`` and ``x = y.name(...)`` with one plain name on the left, in order."""
    found = [
        node
        for node in _own_nodes(scope)
        if isinstance(node, ast.Assign)
        and len(node.targets) == 1
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Call)
        and _callee(node.value) == name
    ]
    return sorted(found, key=lambda node: node.lineno)


def _callee(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _target(node: ast.Assign) -> str:
    target = node.targets[0]
    assert isinstance(target, ast.Name)
    return target.id


def _receiver(node: ast.Assign) -> str:
    call = node.value
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
        return call.func.value.id
    raise UsageError(f"line {node.lineno}: expected a call of a method of something with a plain name")


def _names(scope: _Scope) -> set[str]:
    """Names that a scope binds or takes."""
    bound = {node.id for node in _own_nodes(scope) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return bound | {node.arg for node in _own_nodes(scope) if isinstance(node, ast.arg)}


def _last_flag(tree: ast.Module, parsing: ast.Assign, parser: str) -> ast.stmt:
    """The last statement that adds a flag, in the block where the parser is made; at least the latter."""
    for scope in _scopes(tree):
        made = [
            index
            for index, node in enumerate(scope.body)
            if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and _callee(node.value) == "ArgumentParser"
            and parser in {getattr(x, "id", "") for x in node.targets}
        ]
        if not made or not (scope is tree or parsing in _own_nodes(scope)):
            continue
        last = scope.body[made[-1]]
        for node in scope.body[made[-1] + 1 :]:
            call = node.value if isinstance(node, ast.Expr) else None
            if isinstance(call, ast.Call) and _callee(call) == "add_argument":
                last = node
        if scope is tree or last.lineno < parsing.lineno:
            return last
    raise UsageError(f"{parser} = argparse.ArgumentParser(...) is not found where {parser}.parse_args(...) can see it")


def _outermost_if(function: _Scope, node: ast.stmt) -> ast.stmt:
    """The statement that holds ``node`` and all alternatives to it."""
    parents = {child: parent for parent in ast.walk(function) for child in ast.iter_child_nodes(parent)}
    while isinstance(parent := parents[node], ast.If):
        node = parent
    return node
