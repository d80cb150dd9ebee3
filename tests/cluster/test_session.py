"""What a job takes of the cluster."""

import pytest

from cluster import session


@pytest.mark.parametrize(
    ("gpus", "cpus"),
    [(1.0, 12), (2.0, 24), (0.5, 6), (0.01, 1), (0.0, 1)],
)
def test_a_gpu_comes_with_its_share_of_the_poorest_nodes_cpus(gpus: float, cpus: float) -> None:
    nodes = [{"CPU": 4.0}, {"CPU": 96.0, "GPU": 8.0}, {"CPU": 64.0, "GPU": 4.0}]
    assert session.cpus_beside(nodes, gpus) == cpus


def test_without_a_gpu_in_sight_a_worker_has_one_cpu() -> None:
    assert session.cpus_beside([{"CPU": 64.0}], 1.0) == 1


@pytest.mark.parametrize(("workers", "counts"), [(2, (2, 2)), ("2", (2, 2)), ("1:2", (1, 2)), ("2:2", (2, 2))])
def test_workers_are_a_number_or_a_span(ray_local: None, workers: int | str, counts: tuple[int, int]) -> None:
    assert session.Resources.of(workers).counts == counts


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ("two", "workers: 'two' is neither a number, such as 2, nor MIN:MAX, such as 1:4"),
        ("1:", "workers: '1:' is neither a number"),
        ("0", "workers: 0 is too few; at least 1"),
        ("3:2", "workers: 3:2 has its maximum below its minimum"),
        ("3:5", "3 workers with 1 CPU each need 3 CPU; the cluster has 2"),
    ],
)
def test_what_cannot_be_is_refused(ray_local: None, workers: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        session.Resources.of(workers)
