"""Schedules and files as they are written on a command line."""

import ast
import glob

from kopt import checks, schedules

METHODS = "repeat", "offset", "lasting"


def evaluated(text: str):
    """The schedule that an expression says, of schedules by name, numbers, `*`, `>>` and their methods alone."""
    try:
        found = _value(ast.parse(text.strip(), mode="eval").body, text)
    except (SyntaxError, TypeError) as error:
        raise ValueError(f"`schedule` must be an expression of Python. Received: schedule={text!r}: {error}") from None
    return found if isinstance(found, schedules.Schedule) else _refuse(text)


def _value(node, text):
    match node:
        case ast.Name(id=name):
            return _kind(name, text)()
        case ast.Call(func=ast.Name(id=name)):
            return _kind(name, text)(*_arguments(node, text), **_named(node, text))
        case ast.Call(func=ast.Attribute(value=of, attr=name)) if name in METHODS:
            schedule = _value(of, text)
            if isinstance(schedule, schedules.Schedule):
                return getattr(schedule, name)(*_arguments(node, text), **_named(node, text))
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _value(left, text) * _value(right, text)
        case ast.BinOp(left=left, op=ast.RShift(), right=right):
            return _value(left, text) >> _value(right, text)
        case ast.Constant(value=int() | float() | str() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [_value(part, text) for part in parts]
    return _refuse(text)


def _arguments(node, text) -> list:
    return [_value(one, text) for one in node.args]


def _named(node, text) -> dict:
    return {one.arg or _refuse(text): _value(one.value, text) for one in node.keywords}


def _kind(name, text):
    kind = getattr(schedules, name, None)
    is_one = isinstance(kind, type) and issubclass(kind, schedules.Schedule) and kind is not schedules.Schedule
    return kind if is_one else _refuse(text)


def _refuse(text):
    names = ", ".join(sorted(name for name, kind in vars(schedules).items() if isinstance(kind, type)))
    return checks.refuse("schedule", f"an expression of {names}, numbers, `*`, `>>`, {', '.join(METHODS)}", text)


def files(pattern: str) -> list[str]:
    """The files of a pattern, which a shell leaves alone behind `name=`; what is none stays, to be complained about."""
    return sorted(glob.glob(pattern, recursive=True)) or [pattern]
