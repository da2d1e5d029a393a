"""How results are made: block by block from calibration statistics, or by training."""
