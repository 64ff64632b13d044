"""What is split how: a plan is derived from an architecture, or the user's; checked as a whole, applied, and shown."""

from fabric_tp.plan.derive import derive_feed_forward_plan, derive_plan
from fabric_tp.plan.mixers import CannotSplit
from fabric_tp.plan.options import TransformerOptions
from fabric_tp.plan.plan import Plan, apply_plan, check_plan, resolve, tie, tied_parameters
from fabric_tp.plan.table import table

__all__ = [
    "CannotSplit",
    "Plan",
    "TransformerOptions",
    "apply_plan",
    "check_plan",
    "derive_feed_forward_plan",
    "derive_plan",
    "resolve",
    "table",
    "tie",
    "tied_parameters",
]
