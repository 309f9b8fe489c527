"""The shipped checkpoints at work: what they gain, measured on bundles as a user exports them."""
