"""What `interp attribute` is made of: settings, what is asked, the run and its folder, the page."""
