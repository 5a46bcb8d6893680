"""`python -m redi`, and with it `torchrun -m redi` and `accelerate launch -m redi`."""

from redi.cli import main

main()
