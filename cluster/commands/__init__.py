"""The command line's parser, and the commands that need nothing above the floor."""
