"""What a user's pattern means: a module's name (or that of a parent), a glob, or `re:` + a regular expression.

A recipe may name each of tens of thousands of experts, so names are looked up, and only what is not a plain name is
tried against every module.
"""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator

from lowbit.errors import InputError

NAMED = 10
"""Patterns that mean nothing, of which each is told: those of another model's recipe may be thousands."""


class Patterns:
    """Patterns in the order in which they decide. Raises InputError for one that is no regular expression."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self.all = tuple(patterns)
        self._named: dict[str, list[int]] = defaultdict(list)
        self._tried: list[tuple[int, re.Pattern[str]]] = []
        for place, pattern in enumerate(self.all):
            if (tried := _compiled(pattern)) is None:
                self._named[pattern.removesuffix(".weight")].append(place)
            else:
                self._tried.append((place, tried))

    def matching(self, *names: str) -> list[str]:
        """Those that mean a module of one of these names, in order."""
        places = {place for name in names for place in self._places(name)}
        return [self.all[place] for place in sorted(places)]

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Those that mean none of these modules: most likely typing errors."""
        used = {place for name in names for place in self._places(name)}
        return [pattern for place, pattern in enumerate(self.all) if place not in used]

    def warnings(self, names: Collection[str]) -> list[str]:
        """What to say of those, where `names` are all modules, with what may be meant instead."""
        unmatched = self.unmatched(names)
        few = len(unmatched) <= NAMED
        found = [
            f"pattern {p!r} matches no module{_instead(p, names) if few else ''}" for p in unmatched[:NAMED]
        ]
        if not few:
            found.append(
                f"{len(unmatched) - NAMED} more patterns match no module, of {len(self.all)} in all; are they for "
                "this model?"
            )
        return found

    def _places(self, name: str) -> Iterator[int]:
        end = len(name) if self._named else 0
        while end > 0:
            yield from self._named.get(name[:end], ())
            end = name.rfind(".", 0, end)
        for place, tried in self._tried:
            # As compressed-tensors does: from the name's start on.
            if tried.match(name):
                yield place


def _instead(pattern: str, names: Iterable[str]) -> str:
    """What to write for modules below what it names, or behind what was left out before."""
    if pattern.startswith("re:"):
        tried = [f"re:.*{pattern[3:]}", f"re:{pattern[3:].removesuffix('$')}"]
    else:
        glob = pattern.removesuffix(".weight")
        tried = [f"{glob}.*", f"*.{glob}", f"*.{glob}.*"]
    for other in tried:
        means = Patterns([other])
        if (first := next((n for n in names if means.matching(n)), None)) is not None:
            return f"; {other!r} does, such as {first}"
    return ""


def _compiled(pattern: str) -> re.Pattern[str] | None:
    """None for a plain name."""
    if not pattern.startswith("re:"):
        glob = pattern.removesuffix(".weight")
        return re.compile(fnmatch.translate(glob)) if any(c in glob for c in "*?[") else None
    try:
        return re.compile(pattern[3:])
    except re.error as error:
        raise InputError(
            f"pattern {pattern!r}: expected a regular expression after 're:' ({error}); "
            "use a module name, a glob such as '*.down_proj', or correct it"
        ) from error
