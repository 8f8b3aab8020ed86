"""Finished runs: stored cells, statistics, tables, figures, the paper's numbers, cards. Needs no model and no host."""
