"""`python -m gemtool` is the `gemtool` command."""

from gemtool.cli import main

if __name__ == "__main__":
    main()
