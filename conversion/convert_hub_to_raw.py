"""Convert a NEO in Hub format to the layout of the released checkpoints: `neo-hf export` as a script."""

import sys

from neo_hf_cli import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
