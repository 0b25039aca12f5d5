"""What rankings of heads are worth: four experiments, each one command, their tables in docs/experiments/heads.md."""
