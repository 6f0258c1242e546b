"""A CUDA device without a card: tensors that say they are on it, compute on the CPU and count reads by the host."""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

CUDA = torch.device("cuda", 0)


class FakedTensor(torch.Tensor):
    """`values` on a faked device: to autograd, which wants a stream of a CUDA device, it is on `meta`."""

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device="meta",
            requires_grad=values.requires_grad,
        )

    def __init__(self, values: torch.Tensor):
        self.values_on_host = values.detach()

    def __repr__(self, **kwargs):
        return f"FakedTensor({self.values_on_host})"

    @property
    def device(self):
        return CUDA

    def tolist(self):
        return self.cpu().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on the faked device, outside of FakedCuda")


class FakedCuda(TorchDispatchMode):
    """
    Runs what is on the faked device. `reads`: the operators by which the host waited for it, in order. `uploads`:
    shapes of the tensors that the host sent to it.
    """

    def __init__(self):
        super().__init__()
        self.reads: list[str] = []
        self.uploads: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        wrappers = {}
        on_host = []

        def unwrap(x):
            if not isinstance(x, FakedTensor):
                if isinstance(x, torch.Tensor):
                    on_host.append(x)
                return x
            wrappers[id(x.values_on_host)] = x
            return x.values_on_host

        args, inner = tree_map(unwrap, args), tree_map(unwrap, kwargs)
        asked = kwargs.get("device")
        asked = None if asked is None else torch.device(asked).type
        on_device = asked in ("cuda", "meta") or (bool(wrappers) and asked != "cpu")
        if not on_device and not wrappers:
            return func(*args, **kwargs)

        name = func.overloadpacket.__name__
        is_copy = name in ("_to_copy", "copy_")
        mixed = [x for x in on_host if x.ndim]
        if on_device and is_copy:
            self.uploads += [tuple(x.shape) for x in on_host]
        if wrappers and mixed and not is_copy and name not in ("index", "index_put", "index_put_"):
            raise RuntimeError(f"{name}: tensors on cuda:0 and cpu, {[tuple(x.shape) for x in mixed]}")
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        counts = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)
        to_host = asked == "cpu" or (name == "copy_" and id(args[0]) not in wrappers)
        if (
            counts
            or to_host
            or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2")
        ):
            self.reads.append(name)
        if asked is not None:
            inner["device"] = torch.device("cpu")
        result = func(*args, **inner)
        if not on_device or (name == "copy_" and to_host):
            return result
        return tree_map_only(torch.Tensor, lambda x: wrappers[id(x)] if id(x) in wrappers else FakedTensor(x), result)


def to_cuda(values):
    """A tensor, a module (in place) or a container of them, on the faked device."""
    if isinstance(values, nn.Module):
        for module in values.modules():
            for name, parameter in module._parameters.items():
                module._parameters[name] = None if parameter is None else FakedTensor(parameter)
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else FakedTensor(buffer)
        return values
    return tree_map_only(torch.Tensor, FakedTensor, values)


@contextmanager
def faked_cuda():
    make = torch.tensor

    def tensor(*args, device=None, **kwargs):  # the one factory that no mode sees
        made = make(*args, **kwargs)
        return made if device is None else made.to(device)

    with patch("torch.cuda._lazy_init"), patch("torch.tensor", tensor), FakedCuda() as device:
        yield device
