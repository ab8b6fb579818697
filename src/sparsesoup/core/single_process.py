"""Refusal of launches of several processes (torchrun, accelerate launch, mpirun): pruning runs in one."""

import os
import sys

from sparsesoup.core.errors import UserError

# Set by torchrun and accelerate, by Intel MPI and MPICH, by Open MPI, and by MVAPICH: those that accelerate reads.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def require_single_process() -> None:
    """Raise a UserError if this process is one of several ranks, from the environment and from torch.distributed.

    torch is looked at where it is imported already, and not imported.
    """
    ranks = {name: os.environ.get(name, "") for name in WORLD_SIZES}
    count, source = max([(int(size) if size.isdecimal() else 1, name) for name, size in ranks.items()])
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        count, source = max((count, source), (torch.distributed.get_world_size(), "torch.distributed"))
    if count > 1:
        raise UserError(
            f"pruning runs in one process, this is one of {count} ({source}); start a single one, as without "
            f"torchrun, accelerate launch or mpirun"
        )
