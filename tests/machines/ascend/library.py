"""The calls that HIVM makes into Ascend's library: what each reads, computes and writes, and on which pipe.

The library's source is not public. Names, types and sizes of the arguments say what each must do; that kernels compute
what they should is the evidence. Rounding modes are those of HIVM's dialect.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..memory import Fault
from ..numbers import Unknown
from . import arithmetic
from .memory import MemRef, Step

if TYPE_CHECKING:
    from .core import Core

_TYPES = {
    "float": "f",
    "half": "f",
    "bfloat16_t": "f",
    "int8_t": "i",
    "int16_t": "i",
    "int32_t": "i",
    "bool": "b",
}
_TYPE = "|".join([*_TYPES, "uint8_t"])
_ROUND: dict[int, Callable[[np.ndarray], np.ndarray]] = {0: np.rint, 2: np.floor, 3: np.ceil, 4: np.trunc}
_VECTOR = {
    "add": {"f": np.add, "i": np.add}, "sub": {"f": np.subtract, "i": np.subtract},
    "mul": {"f": np.multiply, "i": np.multiply}, "div": {"f": np.divide},
    "max": {"f": np.fmax, "i": np.maximum}, "min": {"f": np.fmin, "i": np.minimum},
    "and": {"i": np.bitwise_and, "b": np.logical_and}, "or": {"i": np.bitwise_or, "b": np.logical_or},
    "shl": {"i": arithmetic.BINARY["arith.shli"]}, "shr": {"i": arithmetic.BINARY["arith.shrsi"]},
    "abs": {"f": np.abs}, "exp": {"f": np.exp}, "not": {"i": np.invert, "b": np.logical_not},
}  # fmt: skip
_COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
            "ge": np.greater_equal}  # fmt: skip

Arguments = list[Any]
"""Memrefs and numbers."""


def call(core: Core, name: str, arguments: Arguments) -> None:
    for pattern, does in _CALLS:
        if found := pattern.fullmatch(name):
            does(core, found, arguments)
            return
    raise Unknown(f"the call of {name}")


def _elementwise(core: Core, found: re.Match[str], arguments: Arguments) -> None:
    """Two memrefs, a memref and a number, or one memref; the result; room."""
    function = _VECTOR[found["op"]].get(_TYPES[found["type"]])
    if function is None:
        raise Unknown(f"the call of {found[0]}")
    operands = 1 if found["op"] in ("abs", "exp", "not") else 2
    step = core.issue("V")
    values = [_value(a, step) for a in arguments[:operands]]
    into, *room = arguments[operands:]
    if len({v.dtype for v in values}) != 1:
        raise Fault(f"operands of {', '.join(str(v.dtype) for v in values)}")
    _finish(function(*values), into, room, step)


def _select(core: Core, found: re.Match[str], arguments: Arguments) -> None:
    step = core.issue("V")
    condition, yes, no = (_value(a, step) for a in arguments[:3])
    _finish(np.where(condition, yes, no), arguments[3], arguments[4:], step)


def _compare(core: Core, found: re.Match[str], arguments: Arguments) -> None:
    step = core.issue("V")
    a, b = (_value(each, step) for each in arguments[:2])
    _finish(_COMPARE[found["op"]](a, b), arguments[2], arguments[3:], step)


def _cast(core: Core, found: re.Match[str], arguments: Arguments) -> None:
    step = core.issue("V")
    source, into, *room, mode = arguments
    values = _value(source, step)
    if found["from"] == "uint8_t":
        values = values.view(np.uint8)
    if found["how"] == "_with_overflow":  # the low bits
        result = values.astype(into.dtype)
    elif np.issubdtype(into.dtype, np.integer) and _TYPES.get(found["from"]) == "f":
        result = arithmetic.cast("arith.fptosi", _ROUND[int(mode)](values), into.dtype)
    elif int(mode) == 0:
        result = values.astype(into.dtype)
    else:
        raise Unknown(f"the call of {found[0]} with mode {int(mode)}")
    _finish(result, into, room, step)


def _fill(core: Core, found: re.Match[str], arguments: Arguments) -> None:
    value, into = arguments
    into.store(value, core.issue("V"))


def _fill_l1(core: Core, found: re.Match[str], arguments: Arguments) -> None:
    value, into = arguments
    into.store(value, core.issue("MTE2"))


def _arange(core: Core, found: re.Match[str], arguments: Arguments) -> None:
    into, first, step = arguments
    (size,) = into.sizes
    into.store((int(first) + int(step) * np.arange(size)).astype(into.dtype), core.issue("V"))


def _deinterleave(core: Core, found: re.Match[str], arguments: Arguments) -> None:
    source, into = arguments
    step = core.issue("V")
    into.store(source.load(step)[int(found["channel"]) :: int(found["channels"])], step)


def _copy(pipe: str) -> Callable[[Core, re.Match[str], Arguments], None]:
    def does(core: Core, found: re.Match[str], arguments: Arguments) -> None:
        source, into = arguments[:2]
        if source.sizes != into.sizes:
            raise Fault(f"a copy of {source.sizes} to {into.sizes}")
        step = core.issue(pipe)
        into.store(source.load(step), step)

    return does


def _reduce(core: Core, found: re.Match[str], arguments: Arguments) -> None:
    """`r`: all; `ra`: the first dimension of two; `ar`: the second."""
    source, into, *room, _ = arguments
    step = core.issue("V")
    values, axis = source.load(step), {"r": 0, "ra": 0, "ar": 1}[found["axes"]]
    if found["op"] == "sum":
        result = values.astype(np.float64 if _TYPES[found["type"]] == "f" else np.int64).sum(axis)
    else:
        result = _VECTOR[found["op"]][_TYPES[found["type"]]].reduce(values, axis)
    _finish(result.astype(values.dtype).reshape(into.sizes), into, room, step)


def _nd2nz(core: Core, found: re.Match[str], arguments: Arguments) -> None:
    """[rows, columns] → [columns / c, rows / 16, 16, c], c elements in 32 bytes; of what is beyond nothing is known."""
    source, into = arguments
    step = core.issue("MTE2")
    values = source.load(step)
    (rows, columns), (across, down, sixteen, c) = values.shape, into.sizes
    if sixteen != 16 or c * into.width != 32 or down != -(-rows // 16) or across != -(-columns // c):
        raise Fault(f"{values.shape} as {into.sizes}")
    whole = np.zeros((down * 16, across * c), values.dtype)
    whole[:rows, :columns] = values
    into.store(whole.reshape(down, 16, across, c).transpose(2, 0, 1, 3), step)


def _multiply(core: Core, found: re.Match[str], arguments: Arguments) -> None:
    """c [m, n] = a [m, k] · b, of tiles in L1, b as [n, k] where the name ends in `_tb`.

    The load into the matrix unit waits until a and b have come, and says when it has read them: four events, where
    they are not −1.
    """
    a, b, first, m, k, n, c, a_ready, b_ready, a_free, b_free, *_ = arguments
    m, k, n = int(m), int(k), int(n)
    for event in (a_ready, b_ready):
        if int(event) >= 0:
            core.order.wait_flag(core.number, "MTE2", "MTE1", int(event))
    load = core.issue("MTE1")
    left = _unpacked(a.load(load), m, k)
    right = _unpacked(b.load(load), n, k).T if found["turned"] else _unpacked(b.load(load), k, n)
    core.order.set_flag(core.number, "MTE1", "M", -1)
    for event in (a_free, b_free):
        if int(event) >= 0:
            core.order.set_flag(core.number, "MTE1", "MTE2", int(event))
    core.order.wait_flag(core.number, "MTE1", "M", -1)
    step = core.issue("M")
    across, down, _, sixteen = c.sizes
    before = np.zeros((m, n), c.dtype)
    if not first:
        before = _unpacked(c.load(step), m, n)
    whole = np.zeros((down * 16, across * sixteen), c.dtype)
    whole[:m, :n] = arithmetic.product(left, right, before)
    c.store(whole.reshape(down, 16, across, sixteen).transpose(2, 0, 1, 3), step)


def _fixpipe(core: Core, found: re.Match[str], arguments: Arguments) -> None:
    source, into, *modes = arguments
    if any(bool(mode) for mode in modes):
        raise Unknown(f"the call of {found[0]} with {[int(mode) for mode in modes]}")
    step = core.issue("FIX")
    into.store(_unpacked(source.load(step), *into.sizes), step)


def _unpacked(tiles: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """[columns / c, rows / 16, 16, c] → [rows, columns]"""
    across, down, sixteen, c = tiles.shape
    whole = tiles.transpose(1, 2, 0, 3).reshape(down * sixteen, across * c)
    if rows > whole.shape[0] or columns > whole.shape[1]:
        raise Fault(f"{rows} × {columns} elements of {tiles.shape}")
    return whole[:rows, :columns]


def _value(argument: Any, step: Step) -> np.ndarray:
    return argument.load(step) if isinstance(argument, MemRef) else argument


def _finish(result: np.ndarray, into: MemRef, room: list[Any], step: Step) -> None:
    for each in room:
        if isinstance(each, MemRef):
            each.spoil(step)
    into.store(result, step)


_CALLS = [
    (re.compile(pattern.replace("TYPE", _TYPE)), does)
    for pattern, does in (
        (r"v(?P<op>add|sub|mul|div|max|min|and|or)_[12]d_(?P<type>TYPE)", _elementwise),
        (r"v(?P<op>add|sub|mul|max|min|shl|shr)s_vs_[12]d_(?P<type>TYPE)", _elementwise),
        (r"v(?P<op>div)_vs_[12]d_(?P<type>TYPE)", _elementwise),
        (r"v(?P<op>abs|exp|not)_[12]d_(?P<type>TYPE)", _elementwise),
        (r"vsel_(vv|sv|vs)_[12]d_(bool_)?(TYPE)", _select),
        (r"vcmps?_(?P<op>eq|ne|lt|le|gt|ge)_[12]d_(TYPE)", _compare),
        (r"vcast_(?P<from>TYPE)_to_(?P<to>TYPE)_[12]d(?P<how>_with_(mode|temp|overflow))", _cast),
        (r"broadcast_scalar_(TYPE)_to_[12]d", _fill),
        (r"set_l1_2d_(TYPE)", _fill_l1),
        (r"arange_1d_(TYPE)", _arange),
        (r"deinterleave_channel_(?P<channel>\d)_from_(?P<channels>\d)_channels_1d_(TYPE)", _deinterleave),
        (r"load_gm_to_ubuf_[12]d_(TYPE)", _copy("MTE2")),
        (r"store_ubuf_to_gm_[12]d_(TYPE)", _copy("MTE3")),
        (r"copy_ubuf_to_ubuf_[12]d_(TYPE)", _copy("V")),
        (r"(enablevc_)?reduce_(?P<op>max|min|sum)_(?P<axes>r|ra|ar)_(?P<type>TYPE)", _reduce),
        (r"nd2nz_(TYPE)", _nd2nz),
        (r"mma_tile_(TYPE)_to_(TYPE)(?P<turned>_tb)?", _multiply),
        (r"fixpipe_nz2nd_(TYPE)_to_(TYPE)_4d_to_2d", _fixpipe),
    )
]
