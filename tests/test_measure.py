"""What surrounds the windows of a run."""

from experiments.measure import PROBED, sparing


def test_the_bandwidth_is_probed_beside_every_long_window_and_beside_short_ones_for_a_share_of_the_time() -> None:
    now, probes = 0.0, 0

    def probe() -> float:
        nonlocal now, probes
        now, probes = now + 1.0, probes + 1
        return float(probes)

    spared = sparing(probe, lambda: now)
    assert spared() == 1.0
    for expected in (2.0, 3.0):
        now += 1 / PROBED
        assert spared() == expected
    answers = []
    for _ in range(3 * int(1 / PROBED)):
        now += 1.0
        answers.append(spared())
    assert answers == sorted(answers) and answers[0] == 3.0 and answers[-1] == probes == 6.0
