"""`python -m turbowan`."""

from .cli.main import main

main()
