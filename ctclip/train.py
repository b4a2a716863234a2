"""For launchers: ``deepspeed --module ctclip.train``, ``torchrun -m ctclip.train``, ``srun python -m ctclip.train``."""

import sys

from ctclip.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
