"""Take a tiny model of every architecture of transformers through streamslr, and write the table of the models guide.

    python tools/sweep_architectures.py [--only llama,gpt2]
    python tools/sweep_architectures.py --families

About 190 models, a few seconds each. Each has a folder of its own, which goes when it is done. The table of families is
written from tests/support/families.py, whose tests (`pytest tests/test_families.py`, slow) hold it to what runs.
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path

from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.architectures import ARCHITECTURES, BEGIN, FAMILIES_BEGIN, GUIDE, replace_section, sweep, table
from tests.support.families import families_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="model types, separated by commas; the guide is then left alone")
    parser.add_argument("--families", action="store_true", help="write the table of families alone; runs no model")
    args = parser.parse_args()
    if args.families:
        replace_section(GUIDE, FAMILIES_BEGIN, families_table())
        return
    logging.getLogger("streamslr").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    outcomes = []
    for architecture in args.only.split(",") if args.only else ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(sweep(architecture, Path(folder)))
        print(architecture, outcomes[-1].result, outcomes[-1].reason, sep="\t", flush=True)
    if not args.only:
        replace_section(GUIDE, BEGIN, table(outcomes))
    if any(outcome.result == "wrong" for outcome in outcomes):
        raise SystemExit("a result is wrong")


if __name__ == "__main__":
    main()
