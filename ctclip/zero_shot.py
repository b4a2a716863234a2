"""For sbatch files: ``python -m ctclip.zero_shot --model runs/first/model --store store --output predictions``."""

import sys

from ctclip.cli import main

if __name__ == "__main__":
    main(["zero-shot", *sys.argv[1:]])
