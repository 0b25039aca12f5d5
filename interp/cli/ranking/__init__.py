"""What `interp heads` is made of: settings, batches, evidence beside a ranking, the run and its folder, the page."""
