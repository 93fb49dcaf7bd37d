"""A pretend accelerator for machines without one: finds code that mixes CPU and device tensors.

with pretend_device() as device:
    main(["--device", device])  # which is the default there, as with a GPU

The device is "meta", but here its tensors hold numbers: a DeviceTensor wraps a CPU tensor, and each
operation runs on the tensors inside, so that results are those of the CPU. It raises RuntimeError
where a GPU does: a CPU tensor beside one of the device, written from one, or indexed by one;
a generator of the other device; .numpy(). As on a GPU, copies, CPU tensors as indices, and CPU
tensors of no dimension are fine. (It knows nothing of what a GPU lacks, or rounds differently,
of a shape that is changed in place, or of torch.tensor with a device.)
"""

import contextlib
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = "meta"
GENERATOR = torch.Generator
COPIES = ("aten::copy_", "aten::_foreach_copy_")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
LISTS = ("aten::cat", "aten::stack")  # here a GPU refuses even CPU tensors of no dimension


def on_device(x):
    """Is this tensor, generator, device or name of a device the pretend one's?"""
    if isinstance(x, GENERATOR):
        return x._cdata in DeviceGenerator.made
    if isinstance(x, torch.Tensor):
        return isinstance(x, DeviceTensor)
    return isinstance(x, (str, torch.device)) and torch.device(x).type == DEVICE


def unwrap(x):
    return x.inner if isinstance(x, DeviceTensor) else x


def check(func, args, kwargs, tensors, target):
    """Raise a RuntimeError where a GPU does; target: is the result on the pretend device?"""
    if any(x.device.type == DEVICE and not on_device(x) for x in tensors):
        raise RuntimeError(f"{func}: a {DEVICE} tensor without numbers; pretend_device missed it")
    for x in tree_leaves((args, kwargs)):
        if isinstance(x, GENERATOR) and on_device(x) != target:
            raise RuntimeError(f"{func}: the generator is on another device than the tensor")
    name, arguments = func._schema.name, func._schema.arguments
    if name in COPIES or not any(map(on_device, tensors)):
        return
    values = {argument.name: x for argument, x in zip(arguments, args)} | kwargs
    written = [values.get(a.name) for a in arguments if a.alias_info and a.alias_info.is_write]
    written = {id(x) for x in tree_leaves(written)}
    if name in INDEXING and on_device(args[0]):
        tensors = [x for x in args[2:] if isinstance(x, torch.Tensor)]  # CPU indices are fine
    for x in tensors:
        if not on_device(x) and (x.ndim or id(x) in written or name in LISTS):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{DEVICE} and cpu: {func} met a CPU tensor of shape {list(x.shape)}"
            )


def run(owner, func, types, args=(), kwargs=None):
    """The operation on the CPU tensors inside; what is new is wrapped where it should be."""
    kwargs = dict(kwargs or {})
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    device = kwargs.get("device")
    target = any(map(on_device, tensors)) if device is None else on_device(device)
    check(func, args, kwargs, tensors, target)
    if on_device(device):
        kwargs["device"] = torch.device("cpu")
    given = {id(unwrap(x)): x for x in tensors}  # what is written in place stays the same object

    def wrap(x):
        new = isinstance(x, torch.Tensor) and id(x) not in given
        return DeviceTensor(x) if new and target else given.get(id(x), x)

    return tree_map(wrap, func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs)))


class PretendMode(TorchDispatchMode):
    """Sees also what has no DeviceTensor among its arguments: factories, copies to the device."""

    __torch_dispatch__ = run


class DeviceTensor(torch.Tensor):
    """A tensor of the pretend device; inner is the CPU tensor with its numbers."""

    __torch_dispatch__ = classmethod(run)
    __torch_function__ = torch._C._disabled_torch_function_impl
    is_meta = False  # it has numbers

    @staticmethod
    def __new__(cls, inner):
        more = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        more |= {"dtype": inner.dtype, "device": DEVICE}
        self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **more)
        self.inner = inner
        return self

    def __reduce_ex__(self, protocol):  # torch.save writes the CPU tensor
        return self.inner.__reduce_ex__(protocol)

    def tolist(self):
        return self.inner.tolist()

    def __format__(self, spec):
        return format(self.inner, spec)


class DeviceGenerator(GENERATOR):
    """torch.Generator, which for the pretend device gives one of the CPU, and remembers it."""

    made = {}  # by address, as the dispatcher hands on another Python object; none is ever freed

    def __new__(cls, device="cpu"):
        if not on_device(device):
            return GENERATOR(device)
        self = super().__new__(cls)
        return cls.made.setdefault(self._cdata, self)


def attention(original, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
    """F.scaled_dot_product_attention: the CPU's kernel; torch would take one that rounds else."""
    if not on_device(query) or attn_mask is not None or dropout_p or query.ndim != 4:
        return original(query, key, value, attn_mask, dropout_p, is_causal, **more)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, 0.0, is_causal, scale=more.get("scale"))[0]


def current_accelerator(check_available=False):
    """As of a torch that was built for CUDA: what is there has to be asked for."""
    return torch.device(DEVICE if check_available else "cuda")


@contextlib.contextmanager
def pretend_device():
    """The name of a device that is not the CPU; all that is patched is restored at the end."""
    patch = mock.patch.multiple
    with (
        patch(torch, Generator=DeviceGenerator),
        patch(torch.accelerator, current_accelerator=current_accelerator),
        patch(torch.__future__, get_swap_module_params_on_conversion=lambda: True),  # by Module.to
        patch(F, scaled_dot_product_attention=partial(attention, F.scaled_dot_product_attention)),
        PretendMode(),
    ):
        yield DEVICE
