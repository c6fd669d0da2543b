"""The arithmetic in Detectron2's own YAML files, computed without running code."""

import ast
import math
import operator
from typing import Any, Callable, Dict

__all__ = ["compute"]

_MOST_CHARACTERS = 1000
_MOST_VALUES = 10_000
_LARGEST = 1e15

_OPERATORS: Dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_FUNCTIONS: Dict[str, Callable] = {"float": float, "int": int, "max": max, "min": min, "range": range, "round": round}


def compute(text: str) -> Any:
    """
    Value of an expression of numbers, lists, tuples and list comprehensions, with ``+ - * / // % **`` and the
    functions float, int, max, min, range and round.

    Detectron2's ``Base-RetinaNet.yaml`` holds such an expression under the tag ``!!python/object/apply:eval``.

    Args:
        text: Python's notation, for example ``"[[x, x * 2**(1.0/3)] for x in [32, 64]]"``.

    Returns:
        A number, or a list or tuple of such values, at most 10,000 of them.

    Raises:
        ValueError: it is anything else, or too large.
    """
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(f"an expression of {len(text)} characters; at most {_MOST_CHARACTERS} are computed")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        return _Computation().value(tree.body, {})
    except (SyntaxError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text!r} cannot be computed: {str(error) or type(error).__name__}") from error


class _Computation:
    def __init__(self):
        self.num_values = 0

    def value(self, node: ast.AST, names: Dict[str, Any]) -> Any:
        self._count(1)
        if isinstance(node, ast.Constant):
            return _number(node.value)
        if isinstance(node, ast.Name) and node.id in names:
            return names[node.id]
        if isinstance(node, (ast.List, ast.Tuple)):
            values = [self.value(each, names) for each in node.elts]
            return values if isinstance(node, ast.List) else tuple(values)
        if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
            return _number(_OPERATORS[type(node.op)](_number(self.value(node.operand, names))))
        if isinstance(node, ast.BinOp):
            left, right = (_number(self.value(each, names)) for each in (node.left, node.right))
            return _power(left, right) if isinstance(node.op, ast.Pow) else _number(_operator(node.op)(left, right))
        if isinstance(node, ast.ListComp) and len(node.generators) == 1:
            return self._comprehension(node, names)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
            return self._call(node, names)
        raise ValueError(f"it holds {type(node).__name__}, and only numbers, lists and arithmetic are computed")

    def _comprehension(self, node: ast.ListComp, names: Dict[str, Any]) -> list:
        loop = node.generators[0]
        if loop.ifs or loop.is_async or not isinstance(loop.target, ast.Name):
            raise ValueError("only plain comprehensions, [... for x in ...], are computed")
        values = self.value(loop.iter, names)
        return [self.value(node.elt, {**names, loop.target.id: each}) for each in values]

    def _call(self, node: ast.Call, names: Dict[str, Any]) -> Any:
        if node.keywords:
            raise ValueError(f"{node.func.id} with named arguments is not computed")
        given = [self.value(each, names) for each in node.args]
        result = _FUNCTIONS[node.func.id](*given)
        if isinstance(result, range):
            self._count(len(result))
            return list(result)
        return _number(result)

    def _count(self, more: int) -> None:
        self.num_values += more
        if self.num_values > _MOST_VALUES:
            raise ValueError(f"it has more than {_MOST_VALUES} values")


def _operator(op: ast.operator) -> Callable:
    if type(op) not in _OPERATORS:
        raise ValueError(f"the operator {type(op).__name__} is not computed")
    return _OPERATORS[type(op)]


def _power(base: Any, exponent: Any) -> Any:
    if abs(exponent) > 64:
        raise ValueError(f"the exponent {exponent} is above 64")
    return _number(base**exponent)


def _number(value: Any) -> Any:
    if type(value) not in (int, float):
        raise ValueError(f"{value!r} is no number")
    if not (math.isfinite(value) and abs(value) <= _LARGEST):
        raise ValueError(f"{value!r} is no finite number up to {_LARGEST:g}")
    return value
