"""Write table and report of a sweep, complete or not: `python -m experiments.sweep FOLDER`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.errors import TandemError
from common.process.exits import FAILURE, USER_ERROR, fail, printing
from experiments.sweep.table import finish


@printing()
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sweep", description="Make table and report of a sweep as far as it is."
    )
    parser.add_argument("folder", type=Path, help="the folder of one sweep, such as runs/sweeps/NAME")
    try:
        well = finish(parser.parse_args().folder)
    except TandemError as error:
        fail(str(error), USER_ERROR)
    sys.exit(0 if well else FAILURE)


if __name__ == "__main__":
    main()
