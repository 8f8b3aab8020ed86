"""Finding visual heads: token grids, calibration images, chase, automatic head scores, pictures (SparseMM §3)."""
