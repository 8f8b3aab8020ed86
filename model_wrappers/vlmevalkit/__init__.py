"""VLMEvalKit: the model classes, their names, and its run.py."""
