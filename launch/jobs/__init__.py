"""The parts of the training jobs that launch/train.py runs."""
