"""Weights that training spreads over processes (FSDP2, DeepSpeed ZeRO-3): the part of this process, and the whole.

All processes must call the functions that gather.
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


def num_parameters(model: nn.Module, *, only_trainable: bool = False) -> int:
    """Count the parameters of a model, also those that DeepSpeed ZeRO-3 replaces by empty tensors."""
    parameters = [p for p in model.parameters() if p.requires_grad or not only_trainable]
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)


def reshard(model: nn.Module) -> None:
    """Drop gathered copies of weights: FSDP2 keeps some after a forward pass, and changes would not reach them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def prepare_fsdp(plugin: Any) -> None:
    """Have accelerate's FSDP plugin keep noise and loss in float32.

    Raises:
        ValueError: if the plugin has version 1, which flattens the weights.
    """
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version {plugin.fsdp_version} is not supported: use 2, as in training/launch/fsdp2.yaml."
        )
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = spare_float32(plugin.mixed_precision_policy)


def spare_float32(policy: MixedPrecisionPolicy) -> MixedPrecisionPolicy:
    """Return a policy that computes in low precision, but keeps noise, loss and sums of gradients in float32."""
    return replace(policy, cast_forward_inputs=False, output_dtype=None, reduce_dtype=torch.float32)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process holds; it shares the memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the part of a whole tensor that this process holds when it is spread as `like` is."""
    if isinstance(like, DTensor):
        tensor = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return local_part(tensor)


def whole(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor, gathered from parts that are spread as `like` is."""
    if not isinstance(like, DTensor):
        return part
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=shape, stride=stride).full_tensor()


def whole_model(model: Any) -> Any:
    """Return a copy of a sharded model with every weight whole, which runs without the other processes.

    This takes the memory of the weights, a fraction of what training takes with gradients and moments.

    Raises:
        ValueError: if the model is wrapped, for example by PEFT.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"a {type(model).__name__} cannot be evaluated while its weights are spread over processes: train it "
            f"with DDP (training/launch/ddp.yaml)."
        )
    reshard(model)
    # `fully_shard` replaces the class of a model by a subclass, which could not be saved.
    plain: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    # Without memory for weights that are replaced below.
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
    """Return a context in which a weight that ZeRO-3 spreads is whole."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    # Not one of our requirements. A model has such weights only if deepspeed is installed.
    return import_module("deepspeed").zero.GatheredParameters([parameter])
