"""Weights that training spreads over processes (FSDP2, DeepSpeed ZeRO-3): this process's part of them, and the whole.

Every function here that gathers must be called by all processes.
"""

from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from bd3lm_hf.modeling.linear_bd3lm import is_sharded


def has_shards(model: nn.Module) -> bool:
    """Whether any weight of a model is split over several processes."""
    return any(map(is_sharded, model.modules()))


def reshard(model: nn.Module) -> None:
    """Have every weight in its part again: FSDP2 leaves some whole after a pass, and these would not see a change."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def prepare_fsdp(plugin: Any) -> None:
    """Have accelerate's FSDP plugin keep noise and loss in float32.

    Raises:
        ValueError: version 1, which flattens the weights.
    """
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version {plugin.fsdp_version} is not supported: use 2, as in training/launch/fsdp2.yaml."
        )
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = spare_float32(plugin.mixed_precision_policy)


def spare_float32(policy: MixedPrecisionPolicy) -> MixedPrecisionPolicy:
    """A policy that computes in low precision, but leaves the noise, the loss and sums of gradients in float32."""
    return replace(policy, cast_forward_inputs=False, output_dtype=None, reduce_dtype=torch.float32)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of a tensor that this process holds; they share its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor that is to be spread as `like` is."""
    if isinstance(like, DTensor):
        tensor = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return local_part(tensor)


def whole(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The whole tensor, gathered from the parts that processes hold of it as they do of `like`."""
    if not isinstance(like, DTensor):
        return part
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=shape, stride=stride).full_tensor()


def whole_model(model: Any) -> Any:
    """A copy of a sharded model with every weight whole, for this process alone; it runs without the other processes.

    Takes the memory of the weights, a fraction of what training takes with gradients and moments.

    Raises:
        ValueError: the model is wrapped, by PEFT for example.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"a {type(model).__name__} cannot be evaluated while its weights are spread over processes: train it "
            f"with DDP (training/launch/ddp.yaml)."
        )
    reshard(model)
    # `fully_shard` makes the class of a model a subclass of its own.
    plain: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    with torch.device("meta"):
        copy: Any = plain(model.config)
    copy.generation_config = model.generation_config
    for name, parameter in model.named_parameters():
        with _gathered(parameter):
            tensor = whole(local_part(parameter), parameter)
            tensor = tensor if isinstance(parameter, DTensor) else tensor.clone()
        owner, _, leaf = name.rpartition(".")
        copy.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        copy.get_submodule(owner)._buffers[leaf] = buffer.clone()
    return copy.train(model.training)


def _gathered(parameter: nn.Parameter) -> Any:
    """A context in which a weight that ZeRO-3 spreads is whole."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    # Not one of our requirements: a model with such a weight comes with the library.
    return import_module("deepspeed").zero.GatheredParameters([parameter])


__all__ = [
    "has_shards",
    "local_part",
    "part_like",
    "prepare_fsdp",
    "reshard",
    "spare_float32",
    "whole",
    "whole_model",
]
