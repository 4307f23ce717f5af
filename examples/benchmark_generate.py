"""Decoding with and without a draft on one GPU, beside transformers' own ways and beside what the memory allows.

    python examples/benchmark_generate.py --shape qwen2.5-7b --contexts 4096 32768 131072 --rounds --csv calls.csv

The same as `longspec-hf bench`. With `--shape` the model has random weights and the draft is scripted: it does all the
work of a real one and then guesses right at the rate that gives `--tau` tokens a round. Times are CUDA events.
"""

from __future__ import annotations

import argparse

from longspec_hf.bench.run import add_arguments, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
