"""`sparsemm-lmms families`: every family on tiny random checkpoints, through everything that is said of it."""
