"""`python -m sparsemm_lmms`: the command line, as `accelerate launch -m sparsemm_lmms eval ...` needs it."""

from sparsemm_lmms.cli import main

if __name__ == "__main__":
    main()
