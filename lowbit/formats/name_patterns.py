"""Patterns by which a config names modules: few, and true also where an engine calls what is around them otherwise."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

# What a model calls its layers, `decoder_layers` too.
_LAYERS = ("layers", r"\blayer", r"\bblocks", r"\bblock", r"\bh")
# But for those of layers: patterns take in all experts of a layer, or none.
_NUMBERS = re.compile("".join(rf"(?<!{name}\.)" for name in _LAYERS) + r"(?<=\.)\d+(?=\.)")
# The same in an escaped name.
_NUMBERS_ESCAPED = re.compile("".join(rf"(?<!{name}\\\.)" for name in _LAYERS) + r"(?<=\\\.)\d+(?=\\\.)")
_LAYER = [re.compile(rf"{name}\\\.(\\d\+|\d+)") for name in (r"\w*layers", *_LAYERS[1:])]


def alike(names: Iterable[str]) -> list[str]:
    """One name for all that a pattern takes in together: a hundred thousand experts are a few hundred names."""
    return list(dict.fromkeys(_NUMBERS.sub("0", name) for name in names))


def name_patterns(members: Iterable[str], outside: Iterable[str]) -> list[str]:
    """Names → a short list of names and `re:` patterns that matches them and none of `outside`.

    Layer and expert numbers become `\\d+` where that takes in nothing else: an engine tries
    every target for every module, so 46,000 names would take minutes to load. What comes before the
    layers is left open: engines have `language_model.model.layers` for `model.language_model.layers`, and translate
    names, but not patterns; SGLang has `layers` for Mixtral's `model.layers`.
    """
    left, others = list(members), alike(outside)
    targets: list[str] = []
    for any_layer in (True, False):
        by_pattern: dict[tuple[str, ...], list[str]] = {}
        for name in left:
            by_pattern.setdefault(_generalized(name, any_layer), []).append(name)
        left = []
        for patterns, matched in by_pattern.items():
            fitting = [p for p in patterns if not any(re.match(p, o) for o in others)]
            in_one_layer = not any_layer and len(patterns) > 1
            if fitting and (len(matched) > 1 or in_one_layer):
                targets.append("re:" + fitting[0])
            else:
                left.extend(matched)
    return list(dict.fromkeys(targets + left))


def _generalized(name: str, any_layer: bool) -> tuple[str, ...]:
    """Patterns of a name with any numbers in it, also that of the layer or not, the widest first."""
    number = re.compile(r"(?<=\\\.)\d+(?=\\\.)") if any_layer else _NUMBERS_ESCAPED
    pattern = number.sub(r"\\d+", re.escape(name)) + "$"
    layers = next((found for layer in _LAYER if (found := layer.search(pattern))), None)
    if layers is None:
        return (pattern,)
    before, after = pattern[: layers.start()], pattern[layers.start() :]
    wrapped = (rf".*language_model\.(.*\.)?{after}",) if "language_model" in before else ()
    return (rf".*\b{after}", *wrapped, pattern)


def towers(ignored: Iterable[str], quantized: Iterable[str]) -> list[str]:
    """Parts of names that only modules in float have, the outermost: `visual` of `model.visual.blocks.0.attn.qkv`."""
    parts = {part for name in quantized for part in name.split(".")}
    found: dict[str, None] = {}
    for name in ignored:
        # Not a module's own name, and nothing in a numbered layer: names tell those apart.
        above = itertools.takewhile(lambda part: not part.isdigit(), name.split(".")[:-1])
        if tower := next((part for part in above if part not in parts), ""):
            found[tower] = None
    return list(found)


def wherever(ignored: Iterable[str], quantized: Iterable[str]) -> list[str]:
    """Patterns for modules in float whose names engines change before they compare them with those that are ignored.

    All of a tower, since engines join and rename what is in it, and SGLang has `visual` for `model.visual`. And what is
    in layers: SGLang has `layers` for Mixtral's `model.layers`, and translates names of other models that it then asks
    for as they were.
    """
    names, outside = list(ignored), list(quantized)
    whole = [rf"(.*\.)?{re.escape(tower)}\..*" for tower in towers(names, outside)]
    others = [name for name in names if not any(re.match(tower, name) for tower in whole)]
    return [*(f"re:{t}" for t in whole), *(p for p in name_patterns(others, outside) if p.startswith("re:"))]
