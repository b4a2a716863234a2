"""Entry point for launchers: ``deepspeed --module ctclip.train``, ``torchrun -m ctclip.train``, ``srun python -m
ctclip.train``."""

import sys

from ctclip.cli import command

if __name__ == "__main__":
    command(["train", *sys.argv[1:]])
