"""What the code of a module does: found by reading it, or by running it on stand-ins."""
