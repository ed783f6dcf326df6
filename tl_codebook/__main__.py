"""``python -m tl_codebook`` and ``accelerate launch -m tl_codebook`` are the command line."""

import sys

from tl_codebook.cli import main

if __name__ == "__main__":
    sys.exit(main())
