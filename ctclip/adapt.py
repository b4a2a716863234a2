"""Entry point for launchers: ``deepspeed --module ctclip.adapt``, ``torchrun -m ctclip.adapt``."""

import sys

from ctclip.cli import command

if __name__ == "__main__":
    command(["adapt", *sys.argv[1:]])
