"""A conversion that several machines do together: each makes some of the output's files.

All machines see SRC and OUT on a shared file system and decide the same plan; nothing else passes
between them. A part owns whole files, so no two machines ever write to one. Each keeps a journal
of its own beside them, and whoever finds all files finished shows the result.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lowbit.checkpoint.layout import Shard
from lowbit.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Part:
    """Part `number` of `count`, from 1."""

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise InputError(
                f"expected part I of N such as 2 of 4, the second of four machines, found {self.number} of {self.count}"
            )

    @classmethod
    def parse(cls, text: str) -> Part:
        """`2/4`; InputError for anything else."""
        match = re.fullmatch(r"\s*([0-9]+)\s*/\s*([0-9]+)\s*", text)
        if not match:
            raise InputError(f"expected --part I/N such as 2/4, the second of four machines, found {text!r}")
        return cls(number=int(match[1]), count=int(match[2]))

    @property
    def whole(self) -> bool:
        return self.count == 1

    def __str__(self) -> str:
        return f"part {self.number} of {self.count}"

    @property
    def journal(self) -> str:
        return "journal.jsonl" if self.whole else f"journal-{self.number}-of-{self.count}.jsonl"

    def shards(self, shards: Sequence[Shard]) -> frozenset[int]:
        """The numbers of this part's output files: neighbours, about as many bytes as every other part has.

        InputError where there are more parts than files.
        """
        if self.count > len(shards):
            raise InputError(
                f"expected no more parts than output files, found {self.count} parts and {len(shards)} files; "
                "give a smaller --max-shard-size (the same on every machine), or use fewer parts"
            )
        total, before, part, mine = sum(s.nbytes for s in shards), 0, -1, []
        for number, shard in enumerate(shards):
            fair = int(self.count * (before + shard.nbytes / 2) / total)
            # No part is left without a file, also where one file is larger than all others.
            part = min(max(fair, part, self.count - (len(shards) - number)), part + 1)
            before += shard.nbytes
            if part == self.number - 1:
                mine.append(number)
        return frozenset(mine)
