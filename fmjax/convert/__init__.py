"""Public PyTorch checkpoints as parameters of fmjax's networks; files are read without executing anything in them."""
