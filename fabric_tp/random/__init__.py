"""One seed gives one run on any mesh: initial parameters, dropout, and the states that a checkpoint needs."""

from fabric_tp.random.initial import broadcast, initialize, shared_seed
from fabric_tp.random.states import get_state, set_state

__all__ = ["broadcast", "get_state", "initialize", "set_state", "shared_seed"]
