"""Train codebooks: the trainer, its recipe, and the pieces that it is made of."""

from tl_codebook.training.config import CodebookTrainingConfig
from tl_codebook.training.data import collate, load_dataset_from, tokenize_dataset
from tl_codebook.training.initialisation import initialise_codes_
from tl_codebook.training.losses import codebook_loss, parameter_groups
from tl_codebook.training.metrics import site_figures
from tl_codebook.training.schedule import k_at_step
from tl_codebook.training.trainer import CodebookTrainer

__all__ = [
    "CodebookTrainer",
    "CodebookTrainingConfig",
    "codebook_loss",
    "collate",
    "initialise_codes_",
    "k_at_step",
    "load_dataset_from",
    "parameter_groups",
    "site_figures",
    "tokenize_dataset",
]
