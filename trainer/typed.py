"""From plain YAML data to typed dataclasses: sizes such as 8Mi, unknown keys with the close match, choices and minima.

Knows nothing of any particular config; trainer/config.py holds the groups. Every error is one ValueError line: value, rule,
remedy.
"""

import dataclasses
import difflib
import math
import re
import typing
from dataclasses import field
from decimal import Decimal, InvalidOperation

# Ki Mi Gi are powers of 2, k M G powers of 10
_SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def parse_size(text: str) -> Decimal:
    """Read a number with an optional size suffix: '8Mi' -> 8388608, '143.36M' -> 143360000."""
    match = re.fullmatch(r"\s*([-+]?[0-9_.]+(?:[eE][-+]?[0-9]+)?)\s*([kMG]|[KMG]i)?\s*", text)
    try:
        return Decimal(match.group(1)) * _SUFFIXES[match.group(2) or ""]
    except (AttributeError, InvalidOperation):
        raise ValueError(f"{text!r} is no number; write 128Ki, 8Mi, 143.36M, 0.01 or 1e-3") from None


def format_size(number: int) -> str:
    """Write an integer the way `parse_size` reads it, with the largest suffix that is exact in few digits."""
    for suffix in ("Gi", "Mi", "Ki"):
        if number and number % _SUFFIXES[suffix] == 0:
            return f"{number // _SUFFIXES[suffix]}{suffix}"
    return str(number)


def one_of(default: str, *choices: str):
    return field(default=default, metadata={"choices": choices})


def list_of(*items):
    return field(default_factory=lambda: list(items))


def required(minimum=None):
    return field(default=None, metadata={"required": True, "minimum": minimum})


def at_least(default, minimum):
    return field(default=default, metadata={"minimum": minimum})


def build(cls: type, plain, prefix: str = "", root: type | None = None):
    """Build dataclass `cls` from nested plain data; `prefix` and `root` place it in the whole for the messages."""
    if not isinstance(plain, dict):
        raise ValueError(
            f"{prefix.rstrip('.') or 'config'}: {plain!r} is no group of keys; write it as key: value lines"
        )
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in plain:
        if key not in fields:
            raise ValueError(_unknown_key(prefix, str(key), list(fields), root or cls))
    values = {}
    for name, f in fields.items():
        key = prefix + name
        if dataclasses.is_dataclass(f.type):
            values[name] = build(f.type, plain.get(name) or {}, key + ".", root or cls)
        elif plain.get(name) is not None:
            values[name] = _value(plain[name], f, key)
        elif f.metadata.get("required"):
            raise ValueError(f"{key}: no value; set it in the YAML file or on the command line as {key}=...")
    return cls(**values)


def _unknown_key(prefix: str, key: str, known: list[str], root: type) -> str:
    where = f"in {prefix.rstrip('.')!r}" if prefix else "at the top level"
    # a key at the wrong level (lr=0.01 for lr.ref_lr, model.P_mean for noise.P_mean) is as common a slip as a typo
    for f in dataclasses.fields(root):
        if dataclasses.is_dataclass(f.type) and key in {g.name for g in dataclasses.fields(f.type)}:
            return f"{prefix}{key}: unknown key {where}; did you mean {f.name}.{key}?"
    match = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    if match:
        return f"{prefix}{key}: unknown key {where}; did you mean {prefix}{match[0]}?"
    return f"{prefix}{key}: unknown key {where}; known are {', '.join(known)}"


def _value(value, f: dataclasses.Field, key: str):
    if isinstance(value, bool) and "true" in f.metadata.get("choices", ()):  # YAML's own true, beside another word
        value = str(value).lower()
    value = _typed(value, f.type, key)
    choices, minimum = f.metadata.get("choices"), f.metadata.get("minimum")
    if choices and value not in choices:
        close = difflib.get_close_matches(str(value), [str(c) for c in choices], 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{key}={value}: must be one of {', '.join(str(c) for c in choices)}{hint}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{key}={value}: must be at least {minimum}")
    return value


def _typed(value, kind, key: str):
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            raise ValueError(f"{key}={value!r}: must be a list, written [a, b]")
        (item,) = typing.get_args(kind)
        return [_typed(v, item, f"{key}[{i}]") for i, v in enumerate(value)]
    if kind is dict and isinstance(value, dict):
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    if kind in (int, float) and isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            number = parse_size(value) if isinstance(value, str) else Decimal(repr(value))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        if not math.isfinite(float(number)):
            raise ValueError(f"{key}={value}: must be finite; leave it out for its default")
        if kind is float:
            return float(number)
        if number == number.to_integral_value():
            return int(number)
    names = {int: "a whole number (128Ki and 8Mi are fine)", float: "a number", bool: "true or false", str: "text"}
    raise ValueError(f"{key}={value!r}: must be {names.get(kind, kind)}")
