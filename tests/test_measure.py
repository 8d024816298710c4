"""What surrounds the windows of a run."""

import re

import pytest

from common.config import EngineConfig
from common.errors import ConfigError
from experiments.config import EngineSpec
from experiments.measure import PROBED, expect_fits, sparing
from experiments.workload import WorkloadConfig, draw
from tests.backends import checkpoint


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


@pytest.mark.parametrize(("beyond", "raising"), [(0, True), (1, False)])
def test_a_request_that_is_too_long_is_met_with_advice_that_can_help(beyond: int, raising: bool) -> None:
    model = checkpoint("tiny-llama")
    longest = model.config.max_position + beyond
    asked = WorkloadConfig.of({"name": "long", "num_requests": 1, "prompt_len": longest - 1, "output_len": 1})
    workload = draw(asked, 0, model.config.vocab_size, frozenset())
    spec = EngineSpec(label="torch", name="torch", config=EngineConfig(max_model_len=128))
    with pytest.raises(ConfigError, match=f"request of {longest} tokens") as refused:
        expect_fits(workload, spec, model)
    assert bool(re.search("raise max_model_len, to", str(refused.value))) == raising
    assert "serves 128" in str(refused.value) and f"{model.config.max_position}" in str(refused.value)
