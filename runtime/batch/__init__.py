"""Several sequences at once: their loops ask for runs, and an engine performs the runs of all in few."""
