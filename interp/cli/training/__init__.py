"""`interp train`, in parts: settings, the run, its folder and page."""
