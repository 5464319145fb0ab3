"""One readable file that says how a model is quantized: scheme, exceptions, method, data.

    scheme: int8
    ignore: [lm_head]
    overrides:
      "re:.*layers\\.0\\..*": fp8
      "*.down_proj": float
    method: rotate-gptq            # or a mapping: {name: gptq, rounding: {act_order: false}}
    data: {path: prompts.jsonl, samples: 128, length: 2048, seed: 0}

`calibrate`, `convert` and `search` read and write it, as YAML or JSON. Unknown keys, schemes
and methods are errors that name the nearest right one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lowbit.checkpoint.headers import no_duplicates
from lowbit.errors import InputError
from lowbit.quality import SEEDS
from lowbit.scheme import get_scheme, nearest

KEYS = ("version", "scheme", "ignore", "keep", "overrides", "method", "data", "notes")
_DATA_KEYS: Mapping[str, type] = {"path": str, "samples": int, "length": int, "seed": int}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A validated recipe."""

    scheme: str
    """Name of the main scheme."""
    ignore: tuple[str, ...] = ()
    """Patterns of modules that stay in float (see `checkpoint.rules.Selection`)."""
    keep: tuple[str, ...] = ()
    """Patterns of modules that are carried as found."""
    overrides: Mapping[str, str] = field(default_factory=dict)
    """Pattern → scheme name or `float`; the first that matches decides."""
    method: str | Mapping[str, Any] | None = None
    """A method's name, or a mapping of its settings; None: plain rounding."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """`path`, `samples`, `length`, `seed`."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What whoever wrote it wants to tell; `search` leaves its curve here. Not interpreted."""

    def __post_init__(self) -> None:
        get_scheme(self.scheme)
        for pattern, name in self.overrides.items():
            if name != "float":
                try:
                    get_scheme(name)
                except ValueError as error:
                    raise InputError(f"recipe: override {pattern!r}: {error}") from error
        if unknown := sorted(set(self.data) - set(_DATA_KEYS)):
            raise InputError(f"recipe: data: unknown keys {unknown}; expected some of {list(_DATA_KEYS)}")

    def to_dict(self) -> dict[str, Any]:
        """The file's content; empty parts are left out."""
        out: dict[str, Any] = {"version": 1, "scheme": self.scheme}
        for key in ("ignore", "keep"):
            if getattr(self, key):
                out[key] = list(getattr(self, key))
        for key in ("overrides", "data", "notes"):
            if getattr(self, key):
                out[key] = dict(getattr(self, key))
        if self.method is not None:
            out["method"] = self.method if isinstance(self.method, str) else dict(self.method)
        return out

    def save(self, path: str | Path) -> None:
        """Write as JSON for `.json`, as YAML otherwise."""
        path = Path(path)
        if path.suffix == ".json":
            path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
            return
        import yaml

        class Dumper(yaml.SafeDumper):
            def represent_sequence(
                self, tag: str, sequence: Any, flow_style: bool | None = None
            ) -> yaml.SequenceNode:
                numbers = all(isinstance(item, int | float) for item in sequence)
                return super().represent_sequence(tag, sequence, numbers or flow_style)

        text = yaml.dump(self.to_dict(), Dumper=Dumper, sort_keys=False, allow_unicode=True)
        path.write_text(text, encoding="utf-8")


def recipe_from(data: Any, where: str = "recipe") -> Recipe:
    """A parsed YAML or JSON document → Recipe. Raises InputError naming what is wrong."""
    if not isinstance(data, Mapping):
        raise InputError(f"{where}: expected a mapping with a scheme, found {type(data).__name__}")
    for key in data:
        if key not in KEYS:
            raise InputError(
                f"{where}: unknown key {key!r}; did you mean {nearest(str(key), list(KEYS))}? "
                f"Known: {', '.join(KEYS)}"
            )
    if data.get("version", 1) != 1:
        raise InputError(f"{where}: expected version 1, found {data['version']!r}; use a newer lowbit")
    if not isinstance(data.get("scheme"), str):
        raise InputError(
            f"{where}: expected `scheme`, the name of one (int8, fp8, …), found {data.get('scheme')!r}"
        )
    lists, mappings = {}, {}
    for key in ("ignore", "keep"):
        value = data.get(key) or []
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            raise InputError(f"{where}: expected a list of patterns for {key}, found {value!r}")
        lists[key] = tuple(value)
    for key in ("overrides", "data", "notes"):
        value = data.get(key) or {}
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: expected a mapping for {key}, found {value!r}")
        mappings[key] = dict(value)
    if any(not isinstance(text, str) for item in mappings["overrides"].items() for text in item):
        raise InputError(
            f"{where}: expected a pattern and a scheme's name or float for every override, found "
            f"{mappings['overrides']}; quote what YAML takes for a number or a truth"
        )
    for key, value in mappings["data"].items():
        kind = _DATA_KEYS.get(key, object)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InputError(f"{where}: data: expected {kind.__name__} as {key}, found {value!r}")
        if key == "seed" and isinstance(value, int) and abs(value) > SEEDS:
            raise InputError(f"{where}: data: expected a seed of 64 bits, found {value}")
        if key in ("samples", "length") and isinstance(value, int) and value < 1:
            raise InputError(f"{where}: data: expected at least 1 as {key}, found {value}")
    method = data.get("method")
    if method is not None and not (method and isinstance(method, str | Mapping)):
        raise InputError(f"{where}: expected a method's name or a mapping, found {method!r}")
    try:
        return Recipe(
            scheme=get_scheme(data["scheme"]).name, ignore=lists["ignore"], keep=lists["keep"],
            overrides=mappings["overrides"], method=method, data=mappings["data"], notes=mappings["notes"],
        )  # fmt: skip
    except ValueError as error:
        raise InputError(f"{where}: {str(error).removeprefix('recipe: ')}") from error


def _parse_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=partial(no_duplicates, what="key"))


def _parse_yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = ((key.value, value) for key, value in node.value if isinstance(key, yaml.ScalarNode))
            no_duplicates(keys, "key")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a YAML or JSON file. Raises InputError naming file and key."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows' editors put a mark before it
    except OSError as error:
        raise InputError(f"expected a recipe at {path}, found none: {error}") from error
    except ValueError as error:
        raise InputError(
            f"expected UTF-8 in {path}, found something else: {error}; save it as UTF-8"
        ) from error
    try:
        data = _parse_json(text) if path.suffix == ".json" else _parse_yaml(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"expected YAML or JSON in {path}, found: {error}") from error
    return recipe_from(data, str(path))
