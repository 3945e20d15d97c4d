"""`python -m streamslr`, which torchrun starts on each rank."""

from streamslr.cli import main

main()
