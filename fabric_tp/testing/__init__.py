"""Find out whether a model computes the same in parallel as on one device, before renting GPUs."""

from fabric_tp.testing.parity import Report, check_parity, next_token_loss
from fabric_tp.testing.replicas import assert_replicas_in_sync

__all__ = ["Report", "assert_replicas_in_sync", "check_parity", "next_token_loss"]
