"""The hosts' side of the package: lmms-eval models named `<family>_<method>`."""
