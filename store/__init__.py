"""The prediction store: what a teacher predicted at every timestep, committed shard by shard."""

from store.errors import DamagedShard, RolloutNotFound, StoreError
from store.plan import Plan
from store.reader import PredictionStore
from store.shard import Rollout, Timestep
from store.verify import verify

__all__ = [
    "DamagedShard",
    "Plan",
    "PredictionStore",
    "Rollout",
    "RolloutNotFound",
    "StoreError",
    "Timestep",
    "verify",
]
