"""A batch on several machines, through Ray Data: what each worker runs, and the command's side."""
