"""The batch in flight: what is left of a collected batch, and how another number of processes takes it over.

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
    """A collected batch on one process, and its minibatches that are still to come.

    Args:
        experience: the rows of this process.
        minibatches: which of them, one tensor of indices for each minibatch; empty where a minibatch has fewer rows
            than there are processes and none is here.
        shares: of each minibatch its rows, mean over the processes, by this process's own number of them.
    """

    experience: Experience
    minibatches: list[Tensor]
    shares: list[float]

    def take(self) -> Experience:
        """The next minibatch."""
        rows, share = self.minibatches.pop(0), self.shares.pop(0)
        if len(rows):
            return replace(self.experience.select(rows), row_share=self.experience.row_share * share)
        # Every process takes part in every update; what nobody counts has no gradient.
        stand_in = self.experience.select(torch.arange(1))
        mask_BT, valid_BN = torch.zeros_like(stand_in.mask_BT), torch.zeros_like(stand_in.valid_BN)
        return replace(stand_in, row_share=0.0, mask_BT=mask_BT, valid_BN=valid_BN)

    def plain(self) -> dict[str, Any]:
        """As plain containers and tensors, for a checkpoint."""
        return {
            "experience": _to_plain(self.experience),
            "minibatches": [rows.tolist() for rows in self.minibatches],
            "shares": list(self.shares),
        }

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "InFlight":
        """Out of a checkpoint."""
        rows = [torch.tensor(indices, dtype=torch.int64) for indices in plain["minibatches"]]
        return cls(_to_experience(plain["experience"]), rows, list(plain["shares"]))


def shared_anew(parts: Sequence[InFlight], processes: int) -> list[InFlight]:
    """The same minibatches on another number of processes.

    Each minibatch keeps the rows that it would have had over all processes, so the update is the same. The responses
    to a prompt stay on one process, unless a minibatch has fewer prompts than there are processes.

    Args:
        parts: of the processes that collected the batch.
        processes: number of those that go on with it.
    """
    whole = _together([part.experience for part in parts])
    starts = torch.tensor([0, *(len(part.experience) for part in parts)]).cumsum(0).tolist()
    dealt: list[list[Tensor]] = [[] for _ in range(processes)]
    shares: list[list[float]] = [[] for _ in range(processes)]
    for of_parts in zip(*(part.minibatches for part in parts), strict=True):
        rows = torch.cat([indices + start for indices, start in zip(of_parts, starts, strict=False)])
        for number, mine in enumerate(_deal(rows, whole.group_B, processes)):
            dealt[number].append(mine)
            shares[number].append(len(rows) / processes / max(len(mine), 1))
    return [_only_needed(whole, *mine) for mine in zip(dealt, shares, strict=True)]


def _deal(rows: Tensor, group_B: Tensor | None, processes: int) -> list[Tensor]:
    """Rows in as equal numbers as their prompts allow, a share for each process."""
    groups = rows if group_B is None else group_B[rows]
    kinds, group_of_rows = groups.unique(return_inverse=True)
    if len(kinds) < processes:
        return [rows[torch.arange(len(rows)) * processes // max(len(rows), 1) == p] for p in range(processes)]
    return [rows[group_of_rows * processes // len(kinds) == p] for p in range(processes)]


def _only_needed(whole: Experience, minibatches: list[Tensor], shares: list[float]) -> InFlight:
    """Without the rows that no minibatch has; one is kept, to stand in."""
    needed = torch.cat([torch.zeros(0, dtype=torch.int64), *minibatches]).unique()
    if len(needed) == 0:
        needed = torch.zeros(1, dtype=torch.int64)
    return InFlight(whole.select(needed), [torch.searchsorted(needed, rows) for rows in minibatches], shares)


def _together(parts: Sequence[Experience]) -> Experience:
    """Rows of all parts in order, padded to the longest prompt and response; prompts get numbers of their own."""
    prompt = max(part.responses.prompt_length for part in parts)
    length = max(part.mask_BT.shape[1] for part in parts)
    padded = [_padded(part, prompt, length) for part in parts]
    joined = {f.name: _joined([getattr(part, f.name) for part in padded]) for f in fields(Experience)}
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


def _joined(values: Sequence[Any]) -> Any:
    """Tensors and lists behind each other, in records and by name as well; of anything else the first."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    if is_dataclass(first) and not isinstance(first, type):
        return replace(first, **{f.name: _joined([getattr(v, f.name) for v in values]) for f in fields(first)})
    if isinstance(first, list):
        return [item for value in values for item in value]
    if isinstance(first, dict):
        return {name: _joined([value[name] for value in values]) for name in first}
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
