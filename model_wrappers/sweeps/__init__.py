"""Sweeps over methods and budgets on lmms-eval's tasks: resumable runs, tables, statistics, figures and cards."""
