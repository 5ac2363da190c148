"""A Ray cluster of several machines, which come and go.

It has a Ray session of its own, in another process than `test_ray_workers` or after it, which has to be the first to
import Ray.
"""

from dataclasses import replace

import pytest

from storyadapter import Checkpoint, api
from storyadapter.method.events import Event, StepFinished
from tests.storyadapter.runtime.test_ray_workers import PLAN, run, same_bytes

pytestmark = pytest.mark.cluster


def give_up(message: str) -> None:
    raise TimeoutError(message)


def test_a_machine_that_joins_draws_and_one_that_goes_away_loses_nothing(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(api._RAY_BEYOND_LOOPBACK, "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    plan = replace(PLAN, steps=20)
    expected = run(api.open_checkpoint(checkpoint, backend="eager"), plan)
    pipeline = api.open_workers(checkpoint, workers=2, backend="eager", address=cluster.address)
    try:
        assert len(pipeline.processes) == 1
        monkeypatch.setattr("storyadapter.runtime.ray_pipeline._WAITS_SILENTLY", 0)
        with pytest.raises(TimeoutError, match="each takes 1 CPU, and 0 of the cluster's 1 CPUs are free"):
            api.open_workers(checkpoint, workers=1, backend="eager", address=cluster.address, on_wait=give_up)
        second = cluster.add_node(num_cpus=1)
        while len(pipeline.processes) == 1:
            run(pipeline, PLAN)
        removed = 0

        def remove(event: Event) -> None:
            nonlocal removed
            if isinstance(event, StepFinished) and event.step == 5 and not removed:
                removed += 1
                cluster.remove_node(second, allow_graceful=False)

        assert same_bytes(run(pipeline, plan, remove), expected)
        assert pipeline.restarts == 1
    finally:
        pipeline.close()
        ray.shutdown()
        cluster.shutdown()
