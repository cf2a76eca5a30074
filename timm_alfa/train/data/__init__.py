"""From a folder, a stream or a package to batches."""
