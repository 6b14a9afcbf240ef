"""The commands of the command line, a module each; `gcahng.cli.COMMANDS` lists them."""
