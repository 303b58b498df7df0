"""The subcommands of `mmembed`: a file each, whose `add` gives its parser to `mmembed.cli`."""
