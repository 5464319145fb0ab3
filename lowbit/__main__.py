"""`python -m lowbit` is the command line, also for `torchrun -m lowbit …` and `accelerate launch -m lowbit …`."""

from lowbit.cli import main

if __name__ == "__main__":
    main()
