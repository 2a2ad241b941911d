"""``python -m polarpack_image``: the command line."""

from .cli import main

main()
