"""The command `sparrow` with FSDP on CPU: accelerate takes it from processes with GPUs only, torch shards anywhere."""

import sys

from accelerate import state

from modeling_sparrow.cli import main

_initialise = state.AcceleratorState.__init__


def _initialise_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    is_first = not state.AcceleratorState._shared_state
    _initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if is_first:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = state.DistributedType.FSDP
        state.PartialState._shared_state["distributed_type"] = self.distributed_type


if __name__ == "__main__":
    state.AcceleratorState.__init__ = _initialise_with_fsdp
    sys.exit(main())
