"""Uploads are decoded in processes of their own, which can be killed without harm.

A codec that hangs, crashes or asks for all the memory takes its own process along, not the service,
and only the image that did it is refused.
"""

from service.images.pool import Decoders

__all__ = ["Decoders"]
