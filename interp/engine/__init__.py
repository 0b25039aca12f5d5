"""How a run happens: watching a model, its anatomy and proof, attention taps, hooks, re-entry."""
