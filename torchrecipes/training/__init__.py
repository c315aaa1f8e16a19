"""What a run needs beside its model and data: folder, precision, checkpoints, budget, metrics, signals."""
