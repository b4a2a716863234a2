"""Entry point for sbatch files: ``python -m ctclip.zero_shot --model runs/first/model --store store --output
predictions``."""

import sys

from ctclip.cli import command

if __name__ == "__main__":
    command(["zero-shot", *sys.argv[1:]])
