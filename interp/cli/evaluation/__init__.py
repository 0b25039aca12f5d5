"""What `interp evaluate` is made of: settings, data, the run and its folder, the page."""
