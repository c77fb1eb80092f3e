"""What is promised of a combiner's update. The contract test holds every combiner to its word."""

from enum import StrEnum


class Claim(StrEnum):
    """A property of a combiner that ``tests/combiners/claims.py`` knows how to check. Combiners claim what they have.

    It is one of a collected batch that was observed and then combined, whatever is in it.
    """

    SIMPLEX = "simplex"  # weights are at least 0 and sum to 1
    PERMUTATION = "permutation"  # the order of the objectives does not matter
    MONOTONE = "monotone"  # what is at least as good in each objective never gets the lower score in its batch
    ONE_OBJECTIVE = "one objective"  # one alone: its advantage, to the bit; of scores, the score less its prompt's mean
    COMMON_SCALE = "common scale"  # the update's direction does not depend on a unit that all objectives share
    OWN_SCALE = "own scale"  # nor on the unit of any one of them
    SHIFT = "shift"  # nor on a constant on one objective's scores
    NON_CONFLICT = "no conflict"  # no objective gets worse to first order where gradients are taken, before clipping
    MIN_NORM = "min norm"  # no convex combination of the gradients, as they are scaled, is shorter


CONVEX = frozenset({Claim.SIMPLEX, Claim.PERMUTATION, Claim.MONOTONE})
"""What every convex combination has whose weights are the same for all responses."""
