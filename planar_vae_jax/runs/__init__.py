"""One run in one folder: flags, files, checkpoints, the training loop; knows no model and no data set."""
