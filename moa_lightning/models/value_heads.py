"""N value heads on one hidden state.

Legend: B sequences, T tokens, N objectives, D hidden size.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moa_lightning.errors import UserError

FILE_NAME = "value_heads.safetensors"


class ValueHeads(nn.Module):
    """One linear layer from the last hidden state to N values. It stays in float32 under mixed precision.

    Weights and biases start at 0, so that the first advantages are the rewards themselves.

    Args:
        hidden_size: D.
        objectives: names of the N objectives, in order.
    """

    def __init__(self, hidden_size: int, objectives: Sequence[str]) -> None:
        super().__init__()
        self.objectives = tuple(objectives)
        self.linear = nn.Linear(hidden_size, len(self.objectives))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Values (B, T, N), float32."""
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            values_BTN: Tensor = self.linear(hidden_BTD.to(self.linear.weight.dtype))
        return values_BTN.float()

    def save(self, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the heads and the names of their objectives into the policy's folder.

        Args:
            folder: the policy's.
            state: the unsharded state dict; ``None`` takes the heads' own, which must not be sharded.
        """
        state = self.state_dict() if state is None else state
        tensors = {name.removeprefix("linear."): value.detach().cpu().contiguous() for name, value in state.items()}
        save_file(tensors, Path(folder) / FILE_NAME, metadata={"objectives": "\n".join(self.objectives)})

    def restore(self, folder: str | Path) -> bool:
        """Load heads that were saved for the same objectives, in any order. Returns False if there is no file.

        Raises:
            UserError: the file is for other objectives or another hidden size.
        """
        file = Path(folder) / FILE_NAME
        if not file.is_file():
            return False
        with safe_open(file, framework="pt") as opened:
            names = (opened.metadata() or {}).get("objectives", "").split("\n")
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  (not a dict)
        if sorted(names) != sorted(self.objectives):
            raise UserError(
                f"{file} holds value heads for {', '.join(names)}, not for {', '.join(self.objectives)}; remove the "
                "file to start with new heads"
            )
        if tensors["weight"].shape[1] != self.linear.in_features:
            raise UserError(
                f"{file} is for hidden size {tensors['weight'].shape[1]}, the policy has {self.linear.in_features}; "
                "remove the file to start with new heads"
            )
        order = [names.index(name) for name in self.objectives]
        self.linear.load_state_dict({key: value[order] for key, value in tensors.items()})
        return True
