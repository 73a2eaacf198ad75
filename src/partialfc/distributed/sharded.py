"""Tensors whose rows are spread over the ranks (DTensor), and ordinary ones alike.

DTensor's module takes half a second to import, so it is imported where such a tensor may appear.
"""

from __future__ import annotations

from torch import Tensor

from partialfc.distributed.activity import activity


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of the tensor."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_shard(tensor: Tensor) -> Tensor:
    """This process's part, in the same memory; an ordinary tensor itself."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank; an ordinary one itself. One collective for a sharded one."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor
    with activity("in an all-gather of a tensor", waits=True):
        result: Tensor = tensor.full_tensor().detach()
    return result


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of the part of a full tensor that `like` holds of its own, sharded alike; `tensor` if `like` is full."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return tensor
    # Without a source rank, each rank cuts its part out of its own copy; a view of it would keep all of it in memory.
    shard: Tensor = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).clone()
    return shard
