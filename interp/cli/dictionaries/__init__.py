"""What `interp evaluate sae` does."""
