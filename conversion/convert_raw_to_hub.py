"""Convert a raw checkpoint to a complete Hub repository: `neo-hf convert` as a script."""

import sys

from neo_hf_cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
