"""Training of dictionaries on a source of activations: the loop, what it logs, what it keeps to be taken up again."""

from interp.dictionaries.training.learner import Job
from interp.dictionaries.training.settings import TrainSettings
from interp.dictionaries.training.train import Trained, train
from interp.processes import Processes

__all__ = ["Job", "Processes", "TrainSettings", "Trained", "train"]
