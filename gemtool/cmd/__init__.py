"""One file a verb: arguments, then run, then the core loop."""
