"""`cmt export`: a checkpoint as files that run without PyTorch, checked against it on images."""
