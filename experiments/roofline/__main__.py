"""Print this machine's limits, a table and one line of JSON: `python -m experiments.roofline`."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict

from common.errors import TandemError
from common.process.exits import FAILURE, expect_output, fail, printing
from experiments.load.machine import Watch
from experiments.report.console import print_json
from experiments.report.limits import print_limits
from experiments.roofline.limits import SECONDS, measure_limits


@printing()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.roofline", description="Measure this machine's limits.")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long to repeat each way (%(default)s)")
    options = parser.parse_args()
    if not 0 <= options.seconds <= 60:
        parser.error(f"--seconds must lie in [0, 60], got {options.seconds}.")
    expect_output("the limits")
    watch = Watch()
    try:
        limits, risen = measure_limits(options.seconds), watch.rise()
    except TandemError as error:
        fail(str(error), FAILURE)
    foreign = risen.get("foreign_cpu_seconds")
    share = None if foreign is None else min(1.0, foreign / (risen["watched_seconds"] * (os.cpu_count() or 1)))
    print_limits(limits, share)
    print_json(asdict(limits) | {"foreign_cpu_share": share})


if __name__ == "__main__":
    main()
