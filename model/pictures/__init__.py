"""Image bytes → the picture that the network is given: one reader for service and training."""

from typing import Literal

Polarity = Literal["white_hot", "black_hot"]
"""Of an infrared picture: whether warm (or bright) is white, as trained on, or black."""

__all__ = ["Polarity"]
