"""The commands that drive the trainer. Their modules import the standard library only at their top."""
