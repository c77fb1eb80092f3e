"""Count, mean and standard deviation over batches and processes.

Legend: B rows, N columns, K parts.
"""

import torch
from torch import Tensor
from torchmetrics import Metric


class Moments(Metric):
    """Count, mean and standard deviation of each column, over batches and processes; NaN entries are left out.

    Batches and processes are merged by the update of Chan et al. (1979), *Updating Formulae and a Pairwise Algorithm
    for Computing Sample Variances*: no difference of large sums, whatever the origin of the scores. In float64.

    >>> moments = Moments(1)
    >>> moments.update(torch.tensor([[1.0], [float("nan")], [2.0]]))
    >>> moments.update(torch.tensor([[6.0]]))
    >>> [float(moment_N) for moment_N in moments.compute()]
    [3.0, 3.0, 2.6457513110645907]
    """

    full_state_update = False
    parts_3N: Tensor  # count, mean, sum of squared deviations from the mean

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.add_state("parts_3N", torch.zeros(3, columns, dtype=torch.float64), dist_reduce_fx=_merged)

    def update(self, scores_BN: Tensor) -> None:
        """Add rows; there may be none."""
        present_BN = torch.isfinite(scores_BN)
        kept_BN = scores_BN.double().where(present_BN, 0.0)
        count_N = present_BN.sum(0).double()
        mean_N = kept_BN.sum(0) / count_N.clamp(min=1)
        squares_N = (kept_BN - mean_N).where(present_BN, 0.0).square().sum(0)
        added_3N = torch.stack([count_N, mean_N, squares_N]).to(self.parts_3N.device)
        self.parts_3N = _merged(torch.stack([self.parts_3N, added_3N]))

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Count, mean (NaN without entries) and standard deviation (0 with one entry), each (N,)."""
        count_N, mean_N, squares_N = self.parts_3N
        return count_N, mean_N.where(count_N > 0, torch.nan), (squares_N / (count_N - 1).clamp(min=1)).sqrt()


def moments(scores_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and standard deviation of each column over all processes; NaN entries are left out."""
    metric = Moments(scores_BN.shape[1]).to(scores_BN.device)
    metric.update(scores_BN)
    return metric.compute()


def _merged(parts_K3N: Tensor) -> Tensor:
    count_KN, mean_KN, squares_KN = parts_K3N.unbind(1)
    count_N = count_KN.sum(0)
    mean_N = (count_KN * mean_KN).sum(0) / count_N.clamp(min=1)
    return torch.stack([count_N, mean_N, (squares_KN + count_KN * (mean_KN - mean_N).square()).sum(0)])
