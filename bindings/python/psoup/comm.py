"""Several processes that train one run."""

from __future__ import annotations

import os
from ctypes import CFUNCTYPE, addressof, c_char_p, c_void_p, cast, create_string_buffer
from typing import TYPE_CHECKING, Any, List, Mapping, Optional

from . import _abi
from ._library import Handle, call, create, encoded, lib, new, record
from .context import Context, default_context

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import CommOptions

__all__ = ["Comm"]


class Comm(Handle):
    """The other processes, over TCP: the `comm` of sft, train_rewards, dpo and Ppo, which every one of them
    calls alike.

        comm = psoup.Comm.launched()  # None where this process is alone
        psoup.sft(model, examples, "P1A", comm=comm)
        if comm is None or comm.rank == 0:
            model.save_adapter("P1A", "out")

    Rank 0 listens at address:port; the others connect to it.
    """

    def __init__(self, context: Optional[Context] = None, **options: Unpack[CommOptions]) -> None:
        made_by = context or default_context()
        struct = new(_abi.psoup_comm_options, dict(options))
        self._own(create(_abi.psoup_comm, lib.psoup_comm_tcp_create, made_by.handle, struct, long=True),
                  lib.psoup_comm_free, [made_by])

    @classmethod
    def launched(cls, context: Optional[Context] = None,
                 environment: Optional[Mapping[str, str]] = None) -> Optional["Comm"]:
        """By the variables of torchrun, Slurm or mpirun; None where the world is one process."""
        variables = os.environ if environment is None else environment
        kept: List[Any] = []

        def variable(user: Any, name: bytes) -> Optional[int]:
            value = variables.get(name.decode())
            if value is None:
                return None
            kept.append(create_string_buffer(encoded(value)))
            return addressof(kept[-1])

        # As an address: a callback that returned c_char_p would leak its bytes.
        address_fn = CFUNCTYPE(c_void_p, c_void_p, c_char_p)(variable)
        struct = new(_abi.psoup_comm_options)
        call(lib.psoup_comm_launch, cast(address_fn, _abi.psoup_variable_fn), None, struct)
        return cls(context, **record(struct)) if struct.world > 1 else None

    def nccl(self, context: Context) -> "Comm":
        """The same, but that sums of the context's GPU memory are NCCL's."""
        twin = Comm.__new__(Comm)
        twin._own(create(_abi.psoup_comm, lib.psoup_comm_nccl_create, context.handle, self.handle, long=True),
                  lib.psoup_comm_free, [context, self])
        return twin

    @property
    def rank(self) -> int:
        return self.handle.contents.rank

    @property
    def world(self) -> int:
        return self.handle.contents.world

    def __repr__(self) -> str:
        return "<psoup.Comm closed>" if self.closed else "<psoup.Comm rank %d of %d>" % (self.rank, self.world)
