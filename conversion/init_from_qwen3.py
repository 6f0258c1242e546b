"""Turn a Qwen3 LLM into a NEO that is ready for pre-training: `neo-hf init` as a script."""

import sys

from neo_hf_cli import main

if __name__ == "__main__":
    main(["init", *sys.argv[1:]])
