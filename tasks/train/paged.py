"""AdamW whose moments live in memory that the GPU and the host share.

QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3) pages them: where a long row leaves no
room on the GPU the driver moves moments to the host and back, in place of running out of memory.
bitsandbytes does it; this makes its state one that a checkpoint can hold and put back.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.optim import PagedAdamW32bit


class PagedAdamW(PagedAdamW32bit):  # type: ignore[misc]
    """As torch's AdamW up to roundings, with moments in float32. On a CPU nothing is paged."""

    def state_dict(self) -> dict[str, Any]:
        """All of it tensors, as that of torch's AdamW is: bitsandbytes' own has them in a dict
        more, for FSDP."""
        told = torch.optim.Optimizer.state_dict(self)
        state = {
            index: {**slots, "step": torch.tensor(slots["step"])}
            for index, slots in told["state"].items()
        }
        return {**told, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Moments come back into pages of their own: as loaded they would stay on the GPU."""
        super().load_state_dict(state_dict, move_to_device)
        for weight, slots in self.state.items():
            slots["step"] = int(slots["step"])
            for name in ("state1", "state2"):
                slots[name] = self.get_state_buffer(weight).copy_(slots[name])
