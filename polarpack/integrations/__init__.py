"""Other libraries' worlds, each met in a module of its own that imports its library when loaded."""
