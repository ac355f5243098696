"""Mask: a decision laid over a live model, reversible, and the gates that measure what a mask would do.

Reads    ModelGroups, a Mask value
Gives    LiveMask
Source   -  (a pre-hook on the inputs of the attention output and down projections equals slicing exactly, where no norm
         spans the heads; one that does is run over the kept heads)
Symbols  gate = a factor of ones, (batch, 1, width); its gradient is the first-order effect of removing a channel
"""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call

from loraprune.records import GroupKind, Mask, ModelGroups, ProjectionGroups


def full_mask(groups: ModelGroups) -> Mask:
    """Return the mask that keeps everything."""
    return Mask({kind: torch.ones(groups.depth, groups.count(kind), dtype=torch.bool) for kind in groups.layers})


_MASKS: "WeakKeyDictionary[nn.Module, LiveMask]" = WeakKeyDictionary()


def mask_of(model: nn.Module) -> "LiveMask":
    """Return the mask that lies over a model; raise ValueError where there is none."""
    if model not in _MASKS:
        raise ValueError("this model has no mask: make one with LiveMask(model, find_groups(model, config))")
    return _MASKS[model]


class _Hook:
    """Multiplies one consumer's input by its mask and the mask's factor and, while scoring, by a gate."""

    def __init__(self, module: nn.Module, consumer: ProjectionGroups) -> None:
        self.consumer = consumer
        self.factor: Tensor | None = None  # (width,), None while nothing is removed
        self.gate: Tensor | None = None  # (batch, 1, width)
        self.handle = module.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states = arguments[0]
        if self.factor is not None:
            states = states * self.factor.to(device=states.device, dtype=states.dtype)
        if self.gate is not None:
            states = (states * self.gate.to(states.device)).to(states.dtype)
        return (states, *arguments[1:])

    def set(self, kept: Tensor, factor: float) -> None:
        whole = bool(kept.all())
        self.factor = None if whole else kept.repeat_interleave(self.consumer.size).float() * factor


class _NormHook:
    """Runs a norm that spans all groups over the kept ones alone, as the cut model will; the others are 0 behind it."""

    def __init__(self, module: nn.Module, norm: ProjectionGroups) -> None:
        self.norm = norm
        self.indices: Tensor | None = None  # of the kept channels, None while nothing is removed
        self.handle = module.register_forward_hook(self)

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.indices is None:
            return output
        kept, self.indices = self.indices.to(output.device), None  # the norm is called once more, without this hook
        try:
            weights = {"weight": module.get_parameter("weight")[kept]}
            normed = functional_call(module, weights, (arguments[0][..., kept],))
        finally:
            self.indices = kept
        return torch.zeros_like(output).index_copy(-1, kept, normed)

    def set(self, kept: Tensor) -> None:
        whole = bool(kept.all())
        self.indices = None if whole else kept.repeat_interleave(self.norm.size).nonzero()[:, 0]


class LiveMask:
    """The mask of a live model. `model` may carry adapters: they sit behind the same inputs. `mask_of` finds it."""

    def __init__(self, model: nn.Module, groups: ModelGroups) -> None:
        _MASKS[model] = self
        self.groups = groups
        self.value = full_mask(groups)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        self._hooks: dict[tuple[GroupKind, int], _Hook] = {
            (kind, one.layer): _Hook(base.get_submodule(one.consumer.module), one.consumer)
            for kind, layers in groups.layers.items()
            for one in layers
        }
        self._norms: list[tuple[GroupKind, int, _NormHook]] = [
            (kind, one.layer, _NormHook(base.get_submodule(norm.module), norm))
            for kind, layers in groups.layers.items()
            for one in layers
            for norm in one.norms
        ]

    def set(self, mask: Mask) -> None:
        """Lay a mask over the model, in place of the one before."""
        self.value = mask
        for (kind, layer), hook in self._hooks.items():
            hook.set(mask.kept[kind][layer], mask.factor(kind, layer))
        for kind, layer, norm in self._norms:
            norm.set(mask.kept[kind][layer])

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in (*self._hooks.values(), *(norm for _, _, norm in self._norms)):
            hook.handle.remove()

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Run the model without its mask inside this block."""
        before = self.value
        self.set(full_mask(self.groups))
        try:
            yield
        finally:
            self.set(before)

    @contextmanager
    def gates(self, batch: int, device: torch.device) -> Iterator[dict[tuple[GroupKind, int], Tensor]]:
        """Give fresh float32 gates of ones, (batch, 1, width) each, that the forward pass inside this block meets."""
        gates: dict[tuple[GroupKind, int], Tensor] = {}
        for key, hook in self._hooks.items():
            width = hook.consumer.count * hook.consumer.size
            gates[key] = hook.gate = torch.ones(batch, 1, width, device=device, requires_grad=True)
        try:
            yield gates
        finally:
            for hook in self._hooks.values():
                hook.gate = None
