"""The batch in flight: the rest of a collected batch, and its redistribution over another number of processes.

Legend: B sequences, P prompt tokens (left-padded), T response tokens (right-padded), L = P + T.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from moa_lightning.types import Experience, Responses, RewardTable


@dataclass
class InFlight:
    """A collected batch on one process, with the minibatches that are still to come.

    Args:
        experience: the rows of this process.
        minibatches: row indices of each minibatch; empty if the minibatch has no row on this process.
        shares: for each minibatch, the mean number of rows per process divided by this process's number of rows.
    """

    experience: Experience
    minibatches: list[Tensor]
    shares: list[float]

    def take(self) -> Experience:
        """Remove and return the next minibatch."""
        rows, share = self.minibatches.pop(0), self.shares.pop(0)
        if len(rows):
            return replace(self.experience.select(rows), row_share=self.experience.row_share * share)
        # Every process takes part in every update. A fully masked row contributes no gradient.
        placeholder = self.experience.select(torch.arange(1))
        mask_BT, valid_BN = torch.zeros_like(placeholder.mask_BT), torch.zeros_like(placeholder.valid_BN)
        return replace(placeholder, row_share=0.0, mask_BT=mask_BT, valid_BN=valid_BN)

    def plain(self) -> dict[str, Any]:
        """Convert to plain containers and tensors, for a checkpoint."""
        return {
            "experience": _to_plain(self.experience),
            "minibatches": [rows.tolist() for rows in self.minibatches],
            "shares": list(self.shares),
        }

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "InFlight":
        """Restore from a checkpoint."""
        rows = [torch.tensor(indices, dtype=torch.int64) for indices in plain["minibatches"]]
        return cls(_to_experience(plain["experience"]), rows, list(plain["shares"]))


def redistribute(parts: Sequence[InFlight], processes: int) -> list[InFlight]:
    """Distribute the same minibatches over another number of processes.

    Each minibatch keeps its rows over all processes, so the update is the same. The responses to a prompt stay on one
    process, unless a minibatch has fewer prompts than there are processes.

    Args:
        parts: of the processes that collected the batch.
        processes: number of processes of the resumed run.
    """
    everything = _concatenate([part.experience for part in parts])
    starts = torch.tensor([0, *(len(part.experience) for part in parts)]).cumsum(0).tolist()
    dealt: list[list[Tensor]] = [[] for _ in range(processes)]
    shares: list[list[float]] = [[] for _ in range(processes)]
    for of_parts in zip(*(part.minibatches for part in parts), strict=True):
        rows = torch.cat([indices + start for indices, start in zip(of_parts, starts, strict=False)])
        for number, mine in enumerate(_deal(rows, everything.group_B, processes)):
            dealt[number].append(mine)
            shares[number].append(len(rows) / processes / max(len(mine), 1))
    return [_drop_unused(everything, *mine) for mine in zip(dealt, shares, strict=True)]


def _deal(rows: Tensor, group_B: Tensor | None, processes: int) -> list[Tensor]:
    """Split rows over the processes, as evenly as possible without splitting a prompt's rows."""
    groups = rows if group_B is None else group_B[rows]
    kinds, group_of_rows = groups.unique(return_inverse=True)
    if len(kinds) < processes:
        return [rows[torch.arange(len(rows)) * processes // max(len(rows), 1) == p] for p in range(processes)]
    return [rows[group_of_rows * processes // len(kinds) == p] for p in range(processes)]


def _drop_unused(experience: Experience, minibatches: list[Tensor], shares: list[float]) -> InFlight:
    """Drop the rows that no minibatch has. At least one is kept as a placeholder."""
    needed = torch.cat([torch.zeros(0, dtype=torch.int64), *minibatches]).unique()
    if len(needed) == 0:
        needed = torch.zeros(1, dtype=torch.int64)
    return InFlight(experience.select(needed), [torch.searchsorted(needed, rows) for rows in minibatches], shares)


def _concatenate(parts: Sequence[Experience]) -> Experience:
    """Concatenate rows, padded to the longest prompt and response. Prompts are renumbered: parts share no index."""
    prompt = max(part.responses.prompt_length for part in parts)
    length = max(part.mask_BT.shape[1] for part in parts)
    padded = [_padded(part, prompt, length) for part in parts]
    joined = {f.name: _concatenate_values([getattr(part, f.name) for part in padded]) for f in fields(Experience)}
    groups, start = [], 0
    for part in padded:
        if part.group_B is not None:
            groups.append(part.group_B + start)
            start = int(groups[-1].max()) + 1
    return Experience(**joined | {"group_B": torch.cat(groups) if groups else None, "row_share": 1.0})


def _padded(part: Experience, prompt: int, length: int) -> Experience:
    left, right = prompt - part.responses.prompt_length, length - part.mask_BT.shape[1]
    responses = replace(
        part.responses,
        input_ids_BL=pad(part.responses.input_ids_BL, (left, right)),
        attention_mask_BL=pad(part.responses.attention_mask_BL, (left, right)),
        mask_BT=pad(part.responses.mask_BT, (0, right)),
    )
    of_tokens: dict[str, Any] = {"responses": responses}
    for field in fields(Experience):
        value = getattr(part, field.name)
        if isinstance(value, Tensor) and field.name.endswith("_BT"):
            of_tokens[field.name] = pad(value, (0, right))
        elif isinstance(value, Tensor) and field.name.endswith("_BTN"):
            of_tokens[field.name] = pad(value, (0, 0, 0, right))
    return replace(part, **of_tokens)


def _concatenate_values(values: Sequence[Any]) -> Any:
    """Concatenate tensors and lists, also inside records and dicts; of anything else return the first."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    if is_dataclass(first) and not isinstance(first, type):
        return replace(
            first, **{f.name: _concatenate_values([getattr(v, f.name) for v in values]) for f in fields(first)}
        )
    if isinstance(first, list):
        return [item for value in values for item in value]
    if isinstance(first, dict):
        return {name: _concatenate_values([value[name] for value in values]) for name in first}
    return first


_RENAMED = {"charge_B": "kl_penalty_B"}  # in older checkpoints


def _to_plain(record: Any) -> Any:
    if is_dataclass(record):
        return {f.name: _to_plain(getattr(record, f.name)) for f in fields(record)}
    return record.cpu() if isinstance(record, Tensor) else record


def _to_experience(plain: dict[str, Any]) -> Experience:
    plain = {_RENAMED.get(name, name): value for name, value in plain.items()}
    return Experience(
        **{**plain, "responses": Responses(**plain["responses"]), "rewards": RewardTable(**plain["rewards"])}
    )
