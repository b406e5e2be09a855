"""Which networks no other beats, by the definition."""

from hypothesis import given
from hypothesis import strategies as st

from compactcli.pareto import NOISE, marks, optimal

POINTS = st.lists(st.tuples(st.integers(1, 4).map(float), st.integers(1, 40).map(float)), min_size=1, max_size=8)
SHARES = st.sampled_from([0.0, 0.05, 0.3])


@given(POINTS, SHARES)
def test_one_at_least_is_best(points, noise):
    """Beating one another in turn is not possible, however much is taken for equal."""
    assert any(optimal(points, noise))


@given(POINTS)
def test_without_noise_it_is_dominance(points):
    """No worse in both, and better in one."""
    for (good, cost), best in zip(points, optimal(points), strict=True):
        dominated = any(g >= good and c <= cost and (g, c) != (good, cost) for g, c in points)
        assert best != dominated


@given(st.floats(0.1, 100.0), st.floats(0.96, 1.04))
def test_what_computes_the_same_is_as_fast_as_the_other(latency, drift):
    """Two times of one network differ on a busy machine: neither is the better for that, and both lose to what is better."""
    same = [latency, latency * drift]
    assert marks([90.0, 90.0], {"latency": same, "macs": [7, 7]}) == [["latency", "macs"]] * 2
    assert marks([90.0, 91.0], {"latency": same}) == [[], ["latency"]]
    assert marks([90.0, 90.0], {"macs": [7, 6]}) == [[], ["macs"]]


@given(st.floats(0.1, 100.0))
def test_what_is_clearly_faster_is(latency):
    slower = latency * (1 + 2 * NOISE["latency"])
    assert marks([90.0, 90.0], {"latency": [latency, slower]}) == [["latency"], []]
    assert marks([90.0, 91.0], {"latency": [latency, slower]}) == [["latency"], ["latency"]]
