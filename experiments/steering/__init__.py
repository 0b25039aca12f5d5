"""What interventions on generation do: one table, each beside its controls; tables in docs/experiments/steering.md."""
