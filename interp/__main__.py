"""`python -m interp`: the commands, as `torchrun -m interp` calls them too."""

from interp.cli import main

main()
