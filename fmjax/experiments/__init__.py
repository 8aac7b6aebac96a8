"""The laboratory: everything that reads a config or writes the folder of a run."""
