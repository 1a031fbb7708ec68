"""A second device on the CPU: where tensors of both meet it is the error that torch makes of two GPUs."""

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

FAR = torch.device("cuda:1")
NEAR = torch.device("cpu")


class Far(torch.Tensor):
    """A tensor of the other device."""


class TwoDevices(TorchFunctionMode):
    """Inside, `FAR` is a device, though its numbers are the CPU's."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        if function == torch.Tensor.device.__get__:
            return FAR if isinstance(given[0], Far) else NEAR
        if function == torch.Tensor.__deepcopy__:
            return _copied(*args)
        named = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.device) or one == "cpu"]
        places = {isinstance(one, Far) for one in given if one.dim()}
        if not named and len(places) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, in {function.__name__}")
        is_far = named[0] == FAR if named else True in places
        args, kwargs = tree_map(_near, (args, kwargs))
        found = function(*args, **kwargs)
        return tree_map(lambda one: one.as_subclass(Far) if is_far and type(one) is torch.Tensor else one, found)


def _near(one):
    """An argument as the CPU takes it."""
    if isinstance(one, Far):
        return one.as_subclass(torch.Tensor)
    return NEAR if isinstance(one, torch.device) else one


def _copied(tensor, memo):
    if not isinstance(tensor, Far):
        return torch.Tensor.__deepcopy__(tensor, memo)
    if id(tensor) not in memo:
        copied = tensor.detach().as_subclass(torch.Tensor).clone().as_subclass(Far)
        memo[id(tensor)] = nn.Parameter(copied, False) if isinstance(tensor, nn.Parameter) else copied
    return memo[id(tensor)]


class _Bring(ModelHook):
    """What accelerate's hook does of a module on one device of several."""

    def __init__(self, device, *, back=False):
        self.device, self.back, self.given = device, back, None

    def pre_forward(self, module, *args, **kwargs):
        self.given = next(one.device for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor))
        return _to(self.device, args), _to(self.device, kwargs)

    def post_forward(self, module, output):
        return type(output)(**_to(self.given, {**output})) if self.back else output


def _to(device, values):
    return tree_map(lambda one: one.to(device) if isinstance(one, torch.Tensor) else one, values)


def spread_(model, *far):
    """Put modules of `model` on the other device, as accelerate does for a `device_map`."""
    for name, module in model.named_modules():
        is_far = any(name == one or name.startswith(f"{one}.") for one in far)
        if is_far:
            for key, value in module._parameters.items():
                if value is not None:
                    module._parameters[key] = nn.Parameter(value.data.as_subclass(Far), requires_grad=False)
            for key, value in module._buffers.items():
                module._buffers[key] = value.as_subclass(Far)
        if module is model or is_far or list(module.parameters(recurse=False)):
            add_hook_to_module(module, _Bring(FAR if is_far else NEAR, back=module is model))
    model.hf_device_map = {"": 0, **dict.fromkeys(far, 1)}
    return model
