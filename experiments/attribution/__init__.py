"""Which attribution to believe: four experiments, each one table in docs/experiments/ and one command."""
