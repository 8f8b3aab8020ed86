"""Kinds of token grid, one file a kind; ``base`` holds what they share."""
