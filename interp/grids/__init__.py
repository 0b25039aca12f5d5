"""Which pixels each image token stands for, family by family.

One file for each kind of layout; `families.py` says which model takes which.
"""

from interp.grids.families import explain, image_token_ids, patches_of
from interp.grids.tower import TowerGrid, tower_patches

__all__ = ["TowerGrid", "explain", "image_token_ids", "patches_of", "tower_patches"]
