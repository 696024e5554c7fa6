"""Nodes that Slurm loses: the work of one is gone, that of the other goes on unseen."""

from __future__ import annotations

import pytest

from tests.slurm_cluster import kill, processes, slurm_cluster
from tests.slurm_runs import (
    begin,
    finish,
    long_run,
    requeues,
    require_equal,
    undisturbed_shards,
    until,
)

pytestmark = pytest.mark.slow


def test_lost_nodes_cost_nothing_but_time(run_of, tiny_run, tmp_path, tmp_path_factory):
    undisturbed = undisturbed_shards(tiny_run, tmp_path_factory.mktemp("undisturbed"))
    run = long_run(run_of, tiny_run, tmp_path)
    zombies: list[int] = []
    with slurm_cluster() as cluster:
        try:
            job = begin(run, tasks=3)
            zombies += cluster.cut_off(cluster.node_of(f"{job}_1"))
            cluster.lose_node(cluster.node_of(f"{job}_2"))
            until(lambda: requeues(run) == {0: 0, 1: 1, 2: 1}, "Slurm saw both", run)
            assert set(zombies) <= set(processes()), "it works on beside its second attempt"
            finish(run)
            until(lambda: not set(zombies) & set(processes()), "the zombie sees the end", run)
        finally:
            kill(zombies)
    require_equal(run, undisturbed)
