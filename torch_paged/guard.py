"""What stands between Autograd, or a compiler, and an operator that has no derivative and writes its arguments."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def guarded(op: Any, device: str = "", kernel: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """An Autograd-key kernel that refuses what would need a backward, and marks mutated tensors as changed.

    Where nothing stands between Autograd and the device's `kernel`, it calls that without a second dispatch.
    """
    names, mutated = _arguments(op)
    redispatch, below = op.redispatch, torch._C._after_autograd_keyset
    plain = torch._C.DispatchKeySet.from_raw_repr(0)
    if kernel:
        for key in (device, f"Autograd{device}"):
            plain = plain.add(getattr(torch._C.DispatchKey, key))
    direct = plain.raw_repr()

    def guard(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            for arg in (*args, *kwargs.values()):
                if isinstance(arg, list) or getattr(arg, "requires_grad", False):
                    _refuse_grad(op, names, args, kwargs)
        if forward_ad._current_level >= 0:
            _refuse_tangents(op, names, args, kwargs)
        if kernel and keyset.raw_repr() == direct:
            result = kernel(*args, **kwargs)
        else:
            result = redispatch(keyset & below, *args, **kwargs)
        for position in mutated:
            _mark_changed(args[position] if position < len(args) else kwargs.get(names[position]))
        return result

    return guard


def refusing_lost_offsets(op: Any, fake: Callable[..., Any]) -> Callable[..., Any]:
    """`fake`, which refuses to write views whose offset in their storage is symbolic.

    Inductor loses such an offset, and everything would be written to the beginning of the storage (PyTorch's issue
    198068).
    """
    names, mutated = _arguments(op)
    written = {names[position] for position in mutated}

    def checked(*args: Any, **kwargs: Any) -> Any:
        for name, tensor in _named_tensors(names, args, kwargs):
            if name.partition("[")[0] in written and not isinstance(tensor.storage_offset(), int):
                raise ValueError(
                    f"{name} must not be a view whose offset in its storage depends on dynamic sizes, got offset "
                    f"{tensor.storage_offset()}: compiled, it would be written elsewhere (PyTorch's issue 198068); "
                    "pass a tensor of its own, or keep its sizes static (torch._dynamo.mark_static)"
                )
        return fake(*args, **kwargs)

    return checked


def _arguments(op: Any) -> tuple[list[str], list[int]]:
    """Names of an operator's arguments, and the positions of those that it writes."""
    arguments = op._schema.arguments
    mutated = [i for i, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write]
    return [argument.name for argument in arguments], mutated


def _refuse_grad(op: Any, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for name, tensor in _named_tensors(names, args, kwargs):
        if tensor.requires_grad:
            raise NotImplementedError(
                f"{op._schema.name} has no backward, but {name} requires grad: "
                "call it under torch.no_grad() or torch.inference_mode(), or pass a detached tensor"
            )


def _refuse_tangents(op: Any, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for name, tensor in _named_tensors(names, args, kwargs):
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{op._schema.name} has no forward derivative, but {name} has a tangent: "
                "pass its primal, see torch.autograd.forward_ad.unpack_dual"
            )


def _named_tensors(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, list):
            yield from ((f"{name}[{i}]", item) for i, item in enumerate(value))


def _mark_changed(value: Tensor | list[Tensor] | None) -> None:
    """Raise the version, as in-place operators of PyTorch do, so that autograd notices a stale saved tensor."""
    for tensor in [value] if isinstance(value, Tensor) else value or ():
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
