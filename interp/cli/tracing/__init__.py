"""`interp trace`, in parts: settings, inputs, cost, run folder, page."""
