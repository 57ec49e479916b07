"""From a command line to settings, policies and cells."""
