"""What launchers call: ``deepspeed --module ctclip.adapt``, ``torchrun -m ctclip.adapt``."""

import sys

from ctclip.cli import main

if __name__ == "__main__":
    main(["adapt", *sys.argv[1:]])
