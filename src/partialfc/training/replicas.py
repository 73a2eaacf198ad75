"""The backbone on several processes: a whole replica in each (DDP), or one copy in parts over all of them (FSDP2).

Everything that depends on which of the two it is stands here. Both give the mean of the processes' gradients. In parts,
a process keeps its rows of every parameter, gradient and optimizer state, as DTensors, and puts a unit of the network
together when its turn comes. Autocast stays in charge of precision, and not FSDP's policy, which would also round what
the networks keep out of autocast: so the numbers are those of DDP.
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

_LEAST_UNIT = 1 << 18  # parameters; below, a collective costs more than the memory is worth


def split_over_processes(network: nn.Module, device: torch.device, gradients: torch.dtype) -> None:
    """Replace the parameters by this process's parts of them, in place. Parameters are the same on all ranks before.

    Args:
        device: where the network is.
        gradients: what gradients are reduced in, if narrower than they are.

    Raises:
        InputError: the network has a parameter without dimensions, which cannot be split.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    for name, parameter in network.named_parameters():
        if parameter.ndim == 0:
            raise InputError(f"processes.backbone fsdp cannot split {name}, a single number: use ddp.")
        parameter.data = parameter.data.contiguous()  # FSDP takes no other memory format
    mesh = init_device_mesh(device.type, (world_size_of(),))
    policy = MixedPrecisionPolicy(reduce_dtype=gradients if gradients != torch.float32 else None)
    for unit in [*_units(network), network]:
        # The outermost unit too, so that parameters are parts whenever no pass is under way.
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        if device.type == "cpu" and isinstance(unit, FSDPModule):
            unit.set_force_sum_reduction_for_comms(True)  # not every gloo can average


def _units(network: nn.Module) -> Iterator[nn.Module]:
    """The parts of a network that are put together one after the other: large layers and members of lists of layers."""
    in_list = isinstance(network, nn.ModuleList | nn.Sequential)
    for child in network.children():
        if sum(parameter.numel() for parameter in child.parameters()) < _LEAST_UNIT:
            continue
        in_turn = in_list and not isinstance(child, nn.ModuleList | nn.Sequential)
        if in_turn or isinstance(child, nn.Linear):
            yield child
        else:
            yield from _units(child)


def replicated(network: nn.Module, gradients: torch.dtype) -> nn.Module:
    """The network with gradients that are the mean over all processes: itself for one process, or if it is in parts."""
    if world_size_of() == 1 or _is_split(network):
        return network
    with warnings.catch_warnings():
        # torch 2.13 deprecates the option before it has one in its place.
        warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
        # BatchNorm's statistics are those of rank 0's batches and travel when they are used, not in every step.
        result = DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
    if gradients == torch.bfloat16:
        # DDP refuses the hook by its name where there is no NCCL, though gloo reduces bfloat16 too.
        result.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
    return result


def warm_up_ddp_buckets(network: nn.Module, run: Callable[[], Tensor]) -> None:
    """Let DDP lay out the buffers in which it exchanges gradients as it will keep them; one backward pass.

    It does so after its first backward pass, in the order in which the gradients came. With three processes or more the
    layout decides in which order their gradients are added. So the first step of a resumed run would differ in its last
    bits from the same step of a run that was not interrupted, if a pass that does not count did not come first.

    Args:
        run: the output of a forward pass through `network`.
    """
    if isinstance(network, DistributedDataParallel):
        output = run()
        if output.requires_grad:
            (output.sum() * 0.0).backward()
        network.zero_grad()


def _is_split(network: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(network, FSDPModule)


def communicates_every_microbatch(network: nn.Module) -> bool:
    """Whether each micro-step's passes exchange something; otherwise the last one's backward pass alone does."""
    return _is_split(network)


def without_synchronisation(network: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Around the micro-steps of a step but the last, whose gradients need not be exchanged yet.

    In parts they are: else each process would hold the whole gradient, for which there may be no room, and the
    parameters travel in every micro-step anyway.
    """
    if isinstance(network, DistributedDataParallel):
        return network.no_sync()
    return contextlib.nullcontext()


def whole_network(network: nn.Module, skeleton: nn.Module | None) -> nn.Module:
    """An ordinary network with all parameters, on every rank. One collective a parameter if it is in parts.

    Args:
        skeleton: the same network on the meta device if it is in parts; None if it is not, which gives it back.
    """
    if skeleton is None:
        return network
    result = copy.deepcopy(skeleton)
    tensors = {name: full_tensor(tensor) for name, tensor in network.state_dict().items()}
    result.load_state_dict(tensors, assign=True)
    for name, buffer in network.named_buffers():
        if name not in tensors:  # one that is no part of the state
            layer, _, leaf = name.rpartition(".")
            result.get_submodule(layer).register_buffer(leaf, buffer, persistent=False)
    return result


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put a whole state_dict into a network, of which each process takes its parts. No collective."""
    own = network.state_dict()
    parts = {name: shard_like(value, own.get(name, value)) for name, value in weights.items()}
    network.load_state_dict(parts)
