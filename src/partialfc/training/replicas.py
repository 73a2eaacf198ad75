"""The backbone on several processes: a whole replica in each (DDP), or sharded over all of them (FSDP2).

All code that depends on which of the two it is stands here. Both give the mean of the processes' gradients. Under FSDP
a process keeps its rows of every parameter, gradient and optimizer state, as DTensors, and a unit of the network is
gathered just before it is used. Precision stays with autocast rather than FSDP's policy, which would also round what
the networks exclude from autocast: so the numbers are those of DDP.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from partialfc.core.errors import InputError
from partialfc.distributed.collectives import world_size_of
from partialfc.distributed.sharded import full_tensor, shard_like

_MIN_UNIT = 1 << 18  # parameters; below, a collective costs more than the memory is worth


def shard_over_processes(network: nn.Module, device: torch.device, gradients: torch.dtype) -> None:
    """Replace the parameters, which are the same on all ranks, by this rank's shards, in place.

    Args:
        device: where the network is.
        gradients: dtype in which gradients are reduced.

    Raises:
        InputError: the network has a parameter without dimensions, which cannot be sharded.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    for name, parameter in network.named_parameters():
        if parameter.ndim == 0:
            raise InputError(f"processes.backbone fsdp cannot split {name}, a single number: use ddp.")
        parameter.data = parameter.data.contiguous()  # FSDP takes no other memory format
    mesh = init_device_mesh(device.type, (world_size_of(),))
    policy = MixedPrecisionPolicy(reduce_dtype=gradients if gradients != torch.float32 else None)
    for unit in [*fsdp_units(network), network]:
        # The root unit is resharded too, so that parameters are sharded whenever no pass is under way.
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        if device.type == "cpu" and isinstance(unit, FSDPModule):
            unit.set_force_sum_reduction_for_comms(True)  # not every gloo can average


def fsdp_units(network: nn.Module) -> Iterator[nn.Module]:
    """The parts of a network that are gathered in turn: large linear layers, and large members of lists of layers."""
    in_list = isinstance(network, nn.ModuleList | nn.Sequential)
    for child in network.children():
        if sum(parameter.numel() for parameter in child.parameters()) < _MIN_UNIT:
            continue
        is_member = in_list and not isinstance(child, nn.ModuleList | nn.Sequential)
        if is_member or isinstance(child, nn.Linear):
            yield child
        else:
            yield from fsdp_units(child)


def replicated(network: nn.Module, gradients: torch.dtype) -> nn.Module:
    """Wrap the network in DDP, so that gradients are the mean over all processes.

    It is returned as it is for one process, and if it is sharded, since FSDP takes the mean itself.
    """
    if world_size_of() == 1 or uses_fsdp(network):
        return network
    with warnings.catch_warnings():
        # torch 2.13 deprecates the option without a replacement.
        warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
        # BatchNorm's running statistics are those of rank 0, broadcast before they are used, not in every step.
        result = DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
    if gradients == torch.bfloat16:
        # By its name, DDP refuses the hook without NCCL, although gloo reduces bfloat16 too.
        result.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
    return result


def warm_up_ddp_buckets(network: nn.Module, forward: Callable[[], Tensor]) -> None:
    """Let DDP lay out its gradient buckets before the first step, by a backward pass whose gradients are dropped.

    DDP rebuilds its buckets after its first backward pass, in the order in which gradients arrived. With three or more
    processes, the layout decides in which order their gradients are added: without this pass, the first step of a
    resumed run would differ in its last bits from the same step of an uninterrupted run.

    Args:
        forward: returns the output of a forward pass through `network`.
    """
    if isinstance(network, DistributedDataParallel):
        output = forward()
        if output.requires_grad:
            (output.sum() * 0.0).backward()
        network.zero_grad()


def uses_fsdp(network: nn.Module) -> bool:
    """Whether the network is sharded, so that every micro-step communicates and not only the last backward pass."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(network, FSDPModule)


def without_synchronisation(network: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Around the micro-steps of a step but the last: DDP does not reduce gradients there.

    FSDP does: otherwise each process would hold the whole gradient, for which there may be no room, and parameters are
    gathered in every micro-step anyway.
    """
    if isinstance(network, DistributedDataParallel):
        return network.no_sync()
    return contextlib.nullcontext()


def whole_network(network: nn.Module, skeleton: nn.Module | None) -> nn.Module:
    """An ordinary network with full parameters, on every rank. One collective a parameter if it is sharded.

    Args:
        skeleton: the same network on the meta device if `network` is sharded; None returns `network` itself.
    """
    if skeleton is None:
        return network
    result = copy.deepcopy(skeleton)
    tensors = {name: full_tensor(tensor) for name, tensor in network.state_dict().items()}
    result.load_state_dict(tensors, assign=True)
    for name, buffer in network.named_buffers():
        if name not in tensors:  # a non-persistent buffer
            layer, _, leaf = name.rpartition(".")
            result.get_submodule(layer).register_buffer(leaf, buffer, persistent=False)
    return result


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load a full state_dict into a network, which may be sharded. No collective."""
    own = network.state_dict()
    network.load_state_dict({name: shard_like(value, own.get(name, value)) for name, value in weights.items()})
