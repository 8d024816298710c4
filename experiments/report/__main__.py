"""Write the report of a run or a sweep: `python -m experiments.report RUN_OR_SWEEP`."""

from __future__ import annotations

import argparse
from pathlib import Path

from common.errors import TandemError
from common.process.exits import USER_ERROR, fail, printing
from experiments.report.writer import write_report


@printing()
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report", description="Write the report of a run or of a sweep."
    )
    parser.add_argument(
        "directory", type=Path, help="the folder of a run (it holds results.json) or of a sweep (it holds jobs)"
    )
    try:
        print(write_report(parser.parse_args().directory))
    except TandemError as error:
        fail(str(error), USER_ERROR)


if __name__ == "__main__":
    main()
