"""What a model's own forward hands to its decoder layers, recorded by running it with a stub in each one's place.

Masks, rotary tables, per-layer inputs, states that layers share: whatever the forward prepares arrives at the
stubs, so nothing about an architecture is assumed but a list of decoder layers, called once
each and in order, that turn hidden states into the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import InputError

Hold = Callable[[Tensor], Tensor]
"""A tensor → the same, put where there is room for it (see `ActivationCache.hold`)."""
INSTEAD = (
    "use what does not run the model: `lowbit convert` without --method and --calibration, and to compare weights "
    "`lowbit verify OUT --source SRC`"
)
"""Of `calibrate`, `search` and `eval`: what to do where a model cannot run layer by layer."""


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """A batch at the entrance of the decoder: what every layer gets beside the hidden states."""

    hidden: Tensor
    """[B, T, H], or of several streams [B, T, S, H], before the first layer."""
    kwargs: tuple[dict[str, Any], ...]
    """One per layer; what is equal for all batches of a shape (masks, rotary tables) is shared by reference."""


class Stub(nn.Module):
    """Stands for a decoder layer: records what it is called with, returns the hidden states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # Not a submodule: its tensors are on meta, and none of the model's.
        self.__dict__["layer"] = layer
        self.calls: list[tuple[Tensor, dict[str, Any]]] = []
        self.output: Tensor | None = None
        """Returned in place of the hidden states."""
        self.in_tuple = False
        """The model expects its layers to return (hidden states, attention weights)."""
        self.beside: object = None
        """What is returned for the attention weights."""

    def __getattr__(self, name: str) -> Any:
        # A model's forward may read facts from its layers (attention_type, layer_type, …).
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, object]:
        named = inspect.signature(self.__dict__["layer"].forward).bind_partial(hidden_states, *args).arguments
        first = next(iter(named))
        self.calls.append((hidden_states, {k: v for k, v in named.items() if k != first} | kwargs))
        out = hidden_states if self.output is None else self.output
        return (out, self.beside) if self.in_tuple else out


class Recorder:
    """Runs `base`, whose decoder layers are `stubs`, on token ids and gives what its layers would be called with."""

    def __init__(self, base: nn.Module, stubs: Sequence[Stub]) -> None:
        self.base, self.stubs = base, stubs
        self.streams_first = False
        """Layers hand on [S, B, T, H], several residual streams (Gemma 3n); others' streams are before H."""
        self._shared: dict[tuple[int, int], list[dict[str, Any]]] = {}

    @torch.no_grad()
    def __call__(self, ids: Tensor, hold: Hold) -> LayerCall:
        """Token ids [B, T] → the call. Raises InputError for a model that cannot run layer by layer."""
        shape = (ids.shape[0], ids.shape[1])
        if not self._shared:
            self._find_returned(ids)
        if shape not in self._shared:
            # On other tokens: what differs then depends on them, and is kept for each batch.
            self._shared[shape] = self._run(ids.flip(0, 1).roll(1, 1))[1]
        hidden, kwargs = self._run(ids)
        seen: dict[int, Any] = {}
        shared = self._shared[shape]
        for mine, common in zip(kwargs, shared, strict=True):
            for key, value in mine.items():
                if id(value) not in seen:
                    seen[id(value)] = _common(value, common.get(key), hold)
                mine[key] = seen[id(value)]
                if isinstance(value, Tensor) and mine[key] is not common.get(key):
                    common[key] = None  # this batch's own: nothing to compare with
        return LayerCall(hidden=hidden, kwargs=tuple(kwargs))

    def _find_returned(self, ids: Tensor) -> None:
        """Let the stubs return what the model takes from a layer: hidden states, or a tuple that begins with them."""
        problem: Exception | None = None
        for in_tuple in (False, True):
            for stub in self.stubs:
                stub.in_tuple = in_tuple
            try:
                self._run(ids)
                break
            except (InputError, ValueError, TypeError, AttributeError) as error:
                problem = problem or error
        else:
            assert problem is not None
            if isinstance(problem, InputError):
                raise problem
            raise _refusal("a model that can run", f"{type(problem).__name__}: {problem}") from problem
        if in_tuple:
            self._refuse_more_states(ids)

    def _refuse_more_states(self, ids: Tensor) -> None:
        """A second thing that a layer returns must not be what the next one gets (ZAYA's routers do that)."""
        mark = object()
        for stub in self.stubs:
            stub.beside = mark
        try:
            calls = self._run(ids)[1]
        finally:
            for stub in self.stubs:
                stub.beside = None
        for name in (n for call in calls for n, value in call.items() if value is mark):
            raise _refusal("layers that hand on hidden states alone", f"{name} handed on beside them")

    def _run(self, ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        with self._recording():
            self.base(input_ids=ids, use_cache=False)
            calls = [stub.calls for stub in self.stubs]
        if any(len(c) != 1 for c in calls):
            raise _refusal(
                "decoder layers that are called once each", f"{[len(c) for c in calls]} calls of them"
            )
        states = [c[0][0] for c in calls]
        self.streams_first = states[0].dim() == 4 and states[0].shape[1:3] == ids.shape
        if not self.streams_first and (states[0].dim() < 3 or states[0].shape[:2] != ids.shape):
            raise _refusal(
                "hidden states [B, T, H], [B, T, S, H] or [S, B, T, H] between decoder layers",
                f"{list(states[0].shape)}",
            )
        if any(s.data_ptr() != states[0].data_ptr() or s.shape != states[0].shape for s in states):
            raise _refusal(
                "decoder layers that follow one another", "a model that changes what passes between them"
            )
        return self.ours(states[0]), [c[0][1] for c in calls]

    def ours(self, hidden: Tensor) -> Tensor:
        """What a layer gives → hidden states [B, T, …, H]."""
        return hidden.permute(1, 2, 0, 3) if self.streams_first else hidden

    def theirs(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, T, …, H] → what a layer takes."""
        return hidden.permute(2, 0, 1, 3) if self.streams_first else hidden

    @contextmanager
    def _recording(self) -> Iterator[None]:
        for stub in self.stubs:
            stub.calls.clear()
        try:
            yield
        finally:
            for stub in self.stubs:
                stub.calls = []


def _refusal(expected: str, found: str) -> InputError:
    return InputError(
        f"expected {expected}, found {found}; this architecture cannot run layer by layer: {INSTEAD}"
    )


def _common(value: Any, common: Any, hold: Hold) -> Any:
    """`common` where it equals `value`, else `value`, its tensors held."""
    if isinstance(value, Tensor):
        if isinstance(common, Tensor) and _equal(value, common):
            return common
        return hold(value)
    if type(value) is tuple:
        others = common if isinstance(common, tuple) and len(common) == len(value) else (None,) * len(value)
        return tuple(_common(v, c, hold) for v, c in zip(value, others, strict=True))
    return value


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.device == b.device and torch.equal(a, b)


def moved(kwargs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Keywords of a layer with what was held elsewhere on `device`."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return tuple(move(v) for v in value) if type(value) is tuple else value

    return {key: move(value) for key, value in kwargs.items()}


def shared_states(kwargs: dict[str, Any]) -> list[Tensor]:
    """Tensors in the mappings that layers hand one another beside the hidden states (Gemma 4's keys and values)."""
    found: list[Tensor] = []
    for value in kwargs.values():
        if isinstance(value, MutableMapping):
            for entry in value.values():
                found += [
                    t for t in (entry if isinstance(entry, tuple) else (entry,)) if isinstance(t, Tensor)
                ]
    return found


def shares_states(kwargs: dict[str, Any]) -> bool:
    """Whether the layer gets a mapping in which layers leave something for later ones."""
    return any(isinstance(value, MutableMapping) for value in kwargs.values())
