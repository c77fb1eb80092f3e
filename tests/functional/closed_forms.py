"""Closed forms as the papers write them, for one prompt: what the package's own are compared with."""

import torch


def mopo_ratio(primary_B, secondary_BM, duals_M, tau, log_prior_B=None):
    """``exp((p + lambda . q) / tau)`` over its mean under the prior."""
    log_prior_B = torch.zeros_like(primary_B) if log_prior_B is None else log_prior_B
    tilt_B = (primary_B.double() + secondary_BM.double() @ duals_M.double()) / tau
    tilt_B = (tilt_B - tilt_B.max()).exp()
    return (tilt_B / (log_prior_B.double().softmax(0) @ tilt_B)).to(primary_B.dtype)
