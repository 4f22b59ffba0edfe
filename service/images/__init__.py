"""Uploads are decoded in separate processes, which can be killed without harm.

A codec that hangs, crashes or asks for all the memory ends its own process, not the service, and
only the image that caused it is refused.
"""
