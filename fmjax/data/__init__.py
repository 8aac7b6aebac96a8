"""Data: toy densities, the offline digits, and the input pipeline that turns arrays into batches."""
