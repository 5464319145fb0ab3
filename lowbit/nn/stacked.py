"""Experts stacked in memory, and named one by one in the checkpoint: what maps the one to the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lowbit.nn.linear import SCALES, as_stored_scale, wrong_codes
from lowbit.nn.stored import QuantModule, codes_of


class StackedModule(QuantModule):
    """The buffers of a mixture's experts, one stack [E, …] per projection and content.

    The state_dict is that of the checkpoint, one entry per expert: `{i}.{projection}.weight`, `.weight_scale`, …;
    loading copies into the stacks, and so does assigning to `experts.3.gate_proj.weight`.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    projections: dict[str, str]
    """gate, up, down → the projection's name on disk."""
    suffixes: dict[str, str]
    """Content (`codes`, `scale`, …) → the name of its tensor on disk, below the projection's."""

    def __init__(self) -> None:
        super().__init__()
        self._on_meta: dict[tuple[str, int], Tensor] = {}

    def stored_modules(self, name: str) -> list[str]:
        """The modules of a checkpoint that this one, called `name`, is: one per expert and projection."""
        return [f"{name}.{i}.{p}" for i in range(self.num_experts) for p in self.projections.values()]

    def shape_of(self, projection: str) -> tuple[int, int]:
        """[N, K] of one expert's projection."""
        down = projection == "down"
        sizes = (self.hidden_size, self.intermediate_size)
        return sizes if down else sizes[::-1]

    def shape_tensor(self, name: str) -> Tensor:
        """int64 [2]: what a packed layout stores beside the codes of the projection called `name` on disk."""
        projection = next(p for p, n in self.projections.items() if n == name)
        return torch.tensor(self.shape_of(projection), dtype=torch.int64)

    def stack(self, projection: str, content: str) -> Tensor:
        """The buffer of a projection's `codes`, `packed`, `scale`, `input_scale`, …: [E, …]."""
        buffer = self._buffers[f"{self.projections[projection]}_{self.suffixes[content]}"]
        assert buffer is not None
        return buffer

    def disk_tensors(self) -> Iterator[tuple[str, str, int, Tensor]]:
        """(name on disk below this module, buffer, expert, view into the stack)."""
        for i in range(self.num_experts):
            for name in self.projections.values():
                for content, suffix in self.suffixes.items():
                    buffer = f"{name}_{suffix}"
                    if content != "shape":
                        stack = self._buffers[buffer]
                        assert stack is not None
                        yield f"{i}.{name}.{suffix}", buffer, i, stack[i]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, buffer, expert, view in self.disk_tensors():
            destination[prefix + name] = on_its_own(view, self._buffers[buffer], expert)
        if "shape" in self.suffixes:
            for i in range(self.num_experts):
                for name in self.projections.values():
                    destination[f"{prefix}{i}.{name}.{self.suffixes['shape']}"] = self.shape_tensor(name)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        known = set()
        scales = tuple("_" + self.suffixes[c] for c in SCALES if c in self.suffixes)
        codes = "_" + self.suffixes[codes_of(self.suffixes)]
        for name, buffer, expert, view in list(self.disk_tensors()):
            known.add(name)
            value = state_dict.get(prefix + name)
            if value is None:
                missing_keys.append(prefix + name)
                continue
            if buffer.endswith(codes) and (problem := wrong_codes(prefix + name, value, view)):
                error_msgs.append(problem)
                continue
            value = as_stored_scale(value, view) if buffer.endswith(scales) else value
            if value.shape != view.shape:
                error_msgs.append(
                    f"size mismatch for {prefix}{name}: expected {list(view.shape)}, found {list(value.shape)}"
                )
                continue
            self.put(buffer, expert, value)
        if strict:
            for key in state_dict:
                name = key[len(prefix) :]
                shape_of = "shape" in self.suffixes and name.endswith("." + self.suffixes["shape"])
                # torch.distributed's set_model_state_dict adds the stacks themselves, by the names of buffers.
                own = name in self._buffers and state_dict[key] is self._buffers[name]
                if key.startswith(prefix) and not (name in known or shape_of or own):
                    unexpected_keys.append(key)

    @torch.no_grad()
    def put(self, buffer: str, expert: int, value: Tensor) -> None:
        """Copy one expert's tensor into its stack; a stack on meta becomes real on the value's device."""
        stack = self._buffers[buffer]
        assert stack is not None
        if stack.is_meta and not value.is_meta:
            stack = torch.empty_like(stack, device=value.device)
            self._buffers[buffer] = stack
        fill(stack, expert, value)

    def view_of(self, buffer: str, expert: int) -> Tensor:
        """One expert's tensor in its stack: always the same object for a stack on meta, by which transformers tells
        tensors that are offloaded from those that are tied."""
        stack = self._buffers[buffer]
        assert stack is not None
        return self._on_meta.setdefault((buffer, expert), stack[expert]) if stack.is_meta else stack[expert]

    def __getattr__(self, name: str) -> Any:
        # `experts.3.gate_proj.weight`, as loaders walk to a tensor of the checkpoint.
        if name.isdigit() and int(name) < self.num_experts:
            return _Expert(self, int(name))
        return super().__getattr__(name)


_STACKS: Any = WeakTensorKeyDictionary()
"""What `on_its_own` gave and somebody holds → the stack that it lies in, and the expert."""


def on_its_own(view: Tensor, stack: Tensor | None, expert: int) -> Tensor:
    """The same memory as a storage of its own, that of one expert in `stack`; `stack_of` finds the stack again.

    Who saves a state_dict (accelerate, safetensors' save_model) takes tensors in one storage for one tensor
    under several names, and drops all but the first.
    """
    if type(view) is not Tensor or view.is_meta or not view.numel() or not view.is_contiguous():
        return view
    try:
        # As bytes, since not every dtype can be handed over.
        alone = torch.from_dlpack(view.detach().view(-1).view(torch.uint8))
    except (RuntimeError, BufferError):  # a device that hands nothing over
        return view
    alone = alone.view(view.dtype).view(view.shape)
    _STACKS[alone] = (stack, expert)
    return alone


def stack_of(parts: Sequence[Tensor]) -> Tensor | None:
    """The stack whose experts `parts` are, all of them and in their order, as `on_its_own` gave them; else None."""
    found = [_STACKS.get(part, (None, -1)) for part in parts]
    stack = found[0][0]
    whole = stack is not None and stack.shape[0] == len(parts)
    return stack if whole and all(f[0] is stack and f[1] == i for i, f in enumerate(found)) else None


def fill(stack: Tensor, expert: int, value: Tensor) -> None:
    """Copy a checkpoint's tensor of one expert into its place: codes bit for bit, scales by value."""
    stack[expert].copy_(value.view(stack.dtype) if value.element_size() == stack.element_size() else value)


class _Expert(nn.Module):
    """One expert of the stacks, for loaders that set tensors by their dotted name."""

    def __init__(self, experts: StackedModule, index: int) -> None:
        super().__init__()
        for name in experts.projections.values():
            self._modules[name] = _Projection(experts, index, name)


class _Projection(nn.Module):
    """One expert's projection; a tensor assigned to it is copied into the stack."""

    def __init__(self, experts: StackedModule, index: int, name: str) -> None:
        super().__init__()
        self.__dict__["_experts"], self.__dict__["_index"], self.__dict__["_name"] = experts, index, name
        for content, suffix in experts.suffixes.items():
            self._buffers[suffix] = (
                experts.shape_tensor(name)
                if content == "shape"
                else experts.view_of(f"{name}_{suffix}", index)
            )

    def __setattr__(self, name: str, value: Any) -> None:
        experts = self.__dict__.get("_experts")
        if experts is None or name not in self._buffers:
            super().__setattr__(name, value)
            return
        buffer = f"{self.__dict__['_name']}_{name}"
        if buffer in experts._buffers:
            experts.put(buffer, self.__dict__["_index"], value.data)
            # transformers' mark of what needs no initialization.
            experts._buffers[buffer]._is_hf_initialized = True
