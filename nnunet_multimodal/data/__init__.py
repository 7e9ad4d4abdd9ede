"""What networks are fed with: scribbles, appearances, pairs, and which slice belongs to which."""

from nnunet_multimodal.data.scribbles import simulate_label_scribbles, simulate_scribble

__all__ = ["simulate_label_scribbles", "simulate_scribble"]
