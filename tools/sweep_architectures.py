"""Take a tiny model of every architecture of transformers through streamslr, and write the table of the models guide.

    python tools/sweep_architectures.py [--only llama,gpt2]

About 190 models, a few seconds each. Each has a folder of its own, which goes when it is done.
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path

from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.architectures import ARCHITECTURES, BEGIN, END, GUIDE, sweep, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="model types, separated by commas; the guide is then left alone")
    args = parser.parse_args()
    logging.getLogger("streamslr").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    outcomes = []
    for architecture in args.only.split(",") if args.only else ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(sweep(architecture, Path(folder)))
        print(architecture, outcomes[-1].result, outcomes[-1].reason, sep="\t", flush=True)
    if not args.only:
        before, _, rest = GUIDE.read_text().partition(BEGIN)
        GUIDE.write_text(f"{before}{BEGIN}\n{table(outcomes)}{END}{rest.partition(END)[2]}")
    if any(outcome.result == "wrong" for outcome in outcomes):
        raise SystemExit("a result is wrong")


if __name__ == "__main__":
    main()
