"""``python -m proxytune_kernels``: the same as the ``proxytune`` command."""

from proxytune_kernels.cli import main

if __name__ == "__main__":
    main()
