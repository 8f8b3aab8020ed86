"""Measurements that a user can repeat: `sparsemm-lmms bench`."""
