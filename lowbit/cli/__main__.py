"""`python -m lowbit.cli`, which is what `torchrun -m` and `accelerate launch -m` need."""

from lowbit.cli import main

main()
